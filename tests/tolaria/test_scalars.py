"""DeviceReading numbers from a device without ever waiting for it.

There is no GPU here: a stand-in for torch keeps the order of what is queued, and fails
the test when anything is called for which the host would have to wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import inf, isnan, nan
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from esper_otel.tolaria.scalars import CopyTimer, DeviceReading, ScalarReader


class Stream:
    """What was queued on the device and not done yet."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.now_ms = 0.0

    def work(self, milliseconds: float) -> None:
        def do() -> None:
            self.now_ms += milliseconds

        self.queue.append(do)

    def finish(self) -> None:
        queue, self.queue = self.queue, []
        for done in queue:
            done()


class Event:
    broken = False

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing
        self.passed = True
        self.at_ms = nan

    def record(self, stream: Stream) -> None:
        self.passed = False

        def passes() -> None:
            self.passed, self.at_ms = True, stream.now_ms

        stream.queue.append(passes)

    def query(self) -> bool:
        if Event.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.passed

    def elapsed_time(self, other: Event) -> float:
        assert self.timed
        assert other.timed
        assert self.passed
        assert other.passed
        return other.at_ms - self.at_ms

    def synchronize(self) -> None:
        raise AssertionError("waited for an event")

    wait = synchronize


class Tensor:
    """On the GPU, or in pinned memory."""

    def __init__(self, value: float, kind: str, stream: Stream, count: int = 1) -> None:
        self._value = value
        self.stream = stream
        self.device = SimpleNamespace(type=kind, index=0 if kind == "cuda" else None)
        self.is_cpu = kind == "cpu"
        self.count = count
        self.complex = False

    def numel(self) -> int:
        return self.count

    def is_complex(self) -> bool:
        return self.complex

    def detach(self) -> Tensor:
        return self

    def reshape(self, shape: tuple[int, ...]) -> Tensor:
        assert shape == ()
        return self

    def copy_(self, source: Tensor, *, non_blocking: bool) -> None:
        assert non_blocking, "the copy would be waited for"
        assert self.device.type == "pinned"

        def copies() -> None:
            self._value = source._value

        self.stream.queue.append(copies)

    def item(self) -> float:
        assert self.device.type != "cuda", "the host waited for the device"
        return self._value

    def unbind(self) -> list[Tensor]:
        return [Tensor(nan, "pinned", self.stream) for _ in range(self.count)]

    def _waits(self, *_: Any) -> Any:
        raise AssertionError("the host waited for the device")

    __float__ = __bool__ = __int__ = tolist = cpu = numpy = to = _waits


class FakeTorch(SimpleNamespace):
    Tensor = Tensor
    float64 = "float64"

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream()
        self.capturing = False
        self.initialised = True
        self.pools = 0
        self.cuda = SimpleNamespace(
            Event=Event,
            current_stream=lambda device=None: self.stream,
            current_device=lambda: 0,
            is_current_stream_capturing=lambda: self.capturing,
            is_initialized=lambda: self.initialised,
            synchronize=self._waits,
        )

    def _waits(self) -> None:
        raise AssertionError("the host waited for the device")

    def empty(self, count: int, *, dtype: str, pin_memory: bool) -> Tensor:
        assert pin_memory
        assert dtype == "float64"
        self.pools += 1
        return Tensor(nan, "pinned", self.stream, count)

    def no_grad(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def scalar(self, value: float, kind: str = "cuda") -> Tensor:
        return Tensor(value, kind, self.stream)


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    fake = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(Event, "broken", False)
    return fake


def begun(reader: ScalarReader, value: object) -> DeviceReading:
    reading = reader.read_async(value)
    assert isinstance(reading, DeviceReading)
    return reading


# --- numbers that are here already


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.5, 1.5), (3, 3.0), (True, 1.0), (np.float32(0.5), 0.5), (np.int64(7), 7.0), (inf, inf)],
)
def test_a_number_is_itself(value: object, expected: float) -> None:
    number = ScalarReader().read_async(value)
    assert type(number) is float
    assert number == expected


def test_a_real_tensor_on_the_cpu_is_read_at_once() -> None:
    torch = pytest.importorskip("torch")
    reader = ScalarReader()
    loss = (torch.ones(1, requires_grad=True) * 2.5).sum()
    assert reader.read_async(loss) == 2.5
    assert reader.read_async(torch.tensor([[7]])) == 7.0
    assert reader.read_async(torch.tensor(True)) == 1.0
    assert isnan(reader.read_async(torch.tensor(nan)))
    assert loss.requires_grad
    assert reader.lost == 0


def test_what_is_no_single_real_number_is_lost_and_never_raises() -> None:
    torch = pytest.importorskip("torch")

    class Sharded(torch.Tensor):
        def full_tensor(self) -> Any:
            raise AssertionError("a collective")

        item = full_tensor

    reader = ScalarReader()
    garbage = [
        None,
        "0.5",
        [1.0],
        object(),
        1 + 2j,
        torch.ones(2),
        torch.ones(0),
        torch.tensor(1j),
        torch.ones((), device="meta"),
        torch.ones(()).as_subclass(Sharded),
    ]
    for thing in garbage:
        reading = begun(reader, thing)
        assert reading.ready()
        assert reading.value() is None
    assert reader.lost == len(garbage)


def test_without_torch_numbers_are_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    reader = ScalarReader()
    assert reader.read_async(2) == 2.0
    assert begun(reader, object()).value() is None


# --- numbers on the device


def test_a_cuda_scalar_arrives_when_the_device_gets_there(torch: FakeTorch) -> None:
    reader = ScalarReader()
    torch.stream.work(30.0)
    reading = begun(reader, torch.scalar(0.25))
    assert not reading.ready()
    assert reading.value() is None, "not here yet"
    torch.stream.finish()
    assert reading.ready()
    assert reading.value() == 0.25
    assert reader.lost == 0


@pytest.mark.parametrize("value", [nan, inf])
def test_a_nan_that_was_measured_is_not_a_lost_value(torch: FakeTorch, value: float) -> None:
    reading = begun(ScalarReader(), torch.scalar(value))
    torch.stream.finish()
    assert reading.value() == pytest.approx(value, nan_ok=True)


def test_readings_come_in_any_order_and_keep_their_value(torch: FakeTorch) -> None:
    reader = ScalarReader(slots=4)
    readings = [begun(reader, torch.scalar(float(i))) for i in range(4)]
    torch.stream.finish()
    assert [reading.value() for reading in reversed(readings)] == [3.0, 2.0, 1.0, 0.0]
    assert [reading.value() for reading in readings] == [0.0, 1.0, 2.0, 3.0]


def test_slots_are_used_again_for_ever(torch: FakeTorch) -> None:
    reader = ScalarReader(slots=2)
    for step in range(100):
        reading = begun(reader, torch.scalar(float(step)))
        torch.stream.finish()
        assert reading.value() == float(step)
    assert torch.pools == 1
    assert reader.lost == 0


def test_a_late_reader_still_gets_its_value_when_its_slot_is_used_again(
    torch: FakeTorch,
) -> None:
    reader = ScalarReader(slots=2)
    early = begun(reader, torch.scalar(1.0))
    for step in range(10):
        torch.stream.finish()
        begun(reader, torch.scalar(100.0 + step))  # and never read
    assert early.value() == 1.0
    assert reader.lost == 0


def test_too_far_ahead_of_the_device_readings_are_lost_and_counted(torch: FakeTorch) -> None:
    reader = ScalarReader(slots=2)
    kept = [begun(reader, torch.scalar(1.0)), begun(reader, torch.scalar(2.0))]
    over = begun(reader, torch.scalar(3.0))
    assert over.ready()
    assert over.value() is None
    assert reader.lost == 1
    torch.stream.finish()
    assert [reading.value() for reading in kept] == [1.0, 2.0]
    again = begun(reader, torch.scalar(4.0))
    torch.stream.finish()
    assert again.value() == 4.0


def test_while_a_graph_is_captured_nothing_is_queued_and_no_event_is_asked(
    torch: FakeTorch,
) -> None:
    reader = ScalarReader()
    before = begun(reader, torch.scalar(1.0))
    torch.stream.finish()
    torch.capturing = True
    assert begun(reader, torch.scalar(2.0)).value() is None
    assert torch.stream.queue == []
    assert not before.ready()
    torch.capturing = False
    assert before.value() == 1.0


def test_a_device_that_failed_gives_no_value_and_raises_nothing(torch: FakeTorch) -> None:
    reading = begun(ScalarReader(), torch.scalar(1.0))
    Event.broken = True
    assert reading.ready()
    assert reading.value() is None


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_device_that_would_have_to_be_waited_for_is_not_read(
    torch: FakeTorch, kind: str
) -> None:
    reader = ScalarReader()
    tensor = torch.scalar(1.0, kind)
    tensor.item = tensor._waits  # type: ignore[method-assign]
    assert begun(reader, tensor).value() is None
    assert reader.lost == 1


# --- the first copy of a step


def test_the_first_copy_of_a_step_is_timed_by_the_device(torch: FakeTorch) -> None:
    timer = CopyTimer()
    torch.stream.work(100.0)  # of the step before; not the copy's
    with timer.copying():
        torch.stream.work(2.5)
    with timer.copying():
        torch.stream.work(40.0)
    reading = timer.first_copy()
    assert reading is not None
    assert not reading.ready()
    torch.stream.finish()
    assert reading.value() == 2.5
    assert timer.first_copy() is None, "the next step has copied nothing"


def test_steps_may_overlap_on_the_device(torch: FakeTorch) -> None:
    timer = CopyTimer(slots=2)
    readings = []
    for milliseconds in (1.0, 2.0, 3.0):
        with timer.copying():
            torch.stream.work(milliseconds)
        readings.append(timer.first_copy())
    torch.stream.finish()
    assert [reading and reading.value() for reading in readings] == [1.0, 2.0, None]


def test_an_error_of_the_copy_is_the_users_and_comes_through(torch: FakeTorch) -> None:
    timer = CopyTimer()
    with pytest.raises(RuntimeError, match="out of memory"), timer.copying():
        raise RuntimeError("out of memory")


def test_no_copy_is_timed_before_cuda_is_up_or_while_a_graph_is_captured(
    torch: FakeTorch,
) -> None:
    timer = CopyTimer()
    for state in ({"initialised": False}, {"initialised": True, "capturing": True}):
        torch.__dict__.update(state)
        with timer.copying():
            pass
        assert timer.first_copy() is None
        assert torch.stream.queue == []


def test_a_timer_whose_events_fail_leaves_the_copy_alone(torch: FakeTorch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("CUDA error")

    timer = CopyTimer()
    torch.cuda.current_stream = refuse
    with timer.copying():
        torch.stream.work(1.0)
    assert timer.first_copy() is None
    assert len(torch.stream.queue) == 1


def test_without_torch_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    timer = CopyTimer()
    with timer.copying():
        pass
    assert timer.first_copy() is None
