"""Snapshots of what lies on a GPU: nobody waits for it, and no copy is of a later step.

There is no GPU here: a stand-in for torch queues what streams are given, runs the training's
stream ahead of all others wherever it may, and fails the test on every call that waits.
"""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import pytest

from esper_otel.tolaria.snapshots import Parts, Snapshot, SnapshotError

GPU = "cuda:0"


class Device(str):
    type = property(lambda self: self.split(":")[0])


class Event:
    passed = False

    def synchronize(self):
        raise AssertionError("waited for an event")


class Stream:
    def __init__(self, machine, name="beside"):
        self.machine, self.name, self.queue = machine, name, []

    def record_event(self):
        event = Event()
        self.queue.append(lambda: setattr(event, "passed", True) or True)
        return event

    def wait_event(self, event):
        self.queue.append(lambda: event.passed)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        raise AssertionError("waited for a stream")


class Machine:
    """A GPU's streams, and the stand-in for torch."""

    def __init__(self):
        self.main = self.current = Stream(self, "main")
        self.streams = [self.main]
        self.capturing = False
        self.pinned = []

    def stream(self, device):
        self.streams.append(Stream(self))
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def finish(self):
        """Run all that was queued, the training's stream first wherever it may go on."""
        while any(stream.queue for stream in self.streams):
            for stream in self.streams:
                if stream.queue and stream.queue[0]():
                    stream.queue.pop(0)
                    break
            else:
                raise AssertionError("the streams wait for one another")

    def empty_like(self, tensor, *, device, pin_memory):
        assert device == "cpu"
        self.pinned.append(pin_memory)
        return Tensor(self, None, "cpu")


class Tensor:
    shape, dtype, layout = (1,), "float32", "strided"
    _version = 0

    def __init__(self, machine, value, device=GPU):
        self.machine, self.value, self.device = machine, value, Device(device)
        self.read_by = []

    @property
    def data(self):
        return self

    def data_ptr(self):
        return id(self)

    def copy_(self, source, non_blocking=False):
        assert non_blocking, "the copy would be waited for"

        def copies():
            self.value = source.value
            return True

        self.machine.current.queue.append(copies)

    def record_stream(self, stream):
        self.read_by.append(stream.name)

    def numel(self):
        return 1

    def element_size(self):
        return 4

    def set(self, value):
        """As a kernel of the training does."""
        self.machine.main.queue.append(lambda: setattr(self, "value", value) or True)

    def item(self):
        raise AssertionError("the host waited for the device")


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    cuda = SimpleNamespace(
        Stream=made.stream,
        stream=made.on,
        current_stream=lambda device=None: made.current,
        is_current_stream_capturing=lambda: made.capturing,
    )
    torch = SimpleNamespace(
        Tensor=Tensor,
        strided="strided",
        no_grad=contextlib.nullcontext,
        empty_like=made.empty_like,
        cuda=cuda,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    return made


class Optimizer:
    def __init__(self, weight, moment):
        self.param_groups = [{"params": [weight]}]
        self.state = {weight: {"moment": moment, "step": 1}}


class Training:
    def __init__(self, machine):
        self.weight, self.buffer, self.moment = (Tensor(machine, "old") for _ in range(3))
        self.optimizer = Optimizer(self.weight, self.moment)

    @property
    def parts(self):
        return Parts([self.weight], [self.buffer], [self.optimizer], found_modules=True)

    @property
    def values(self):
        return self.weight.value, self.buffer.value, self.moment.value

    def forward(self):
        self.buffer.set("new")

    def update(self):
        self.weight.set("new")
        self.moment.set("new")


def test_what_is_copied_is_the_step_s_own_whatever_runs_ahead(machine):
    training, made = Training(machine), Snapshot()
    made.copy_from(training.parts, 1)
    training.forward()
    made.queue_wait()
    training.update()
    machine.finish()
    assert training.values == ("new",) * 3
    made.copy_back(training.parts)
    machine.finish()
    assert training.values == ("old",) * 3
    assert training.optimizer.state[training.weight]["moment"] is training.moment


def test_the_update_waits_for_the_copies_and_without_that_would_be_in_them(machine):
    """So the test above has teeth."""
    training, made = Training(machine), Snapshot()
    made.copy_from(training.parts, 1)
    training.update()
    machine.finish()
    made.copy_back(training.parts)
    machine.finish()
    assert training.values == ("new", "old", "new")


def test_it_goes_into_pinned_memory_which_is_used_again(machine):
    training, made = Training(machine), Snapshot()
    for step in (1, 2, 3):
        made.copy_from(training.parts, step)
        made.queue_wait()
        training.update()
    assert machine.pinned == [True] * 3
    machine.finish()
    assert made.size == 12


def test_its_source_s_memory_is_not_given_away_before_it_was_read(machine):
    training, made = Training(machine), Snapshot()
    made.copy_from(training.parts, 1)
    assert training.weight.read_by == training.moment.read_by == ["beside"]
    assert training.buffer.read_by == []


def test_a_copy_that_comes_before_one_is_put_back_is_not_overtaken(machine):
    training, one, other = Training(machine), Snapshot(), Snapshot()
    one.copy_from(training.parts, 1)
    one.queue_wait()
    training.update()
    other.copy_from(training.parts, 2)
    one.copy_back(training.parts)
    other.queue_wait()
    machine.finish()
    assert training.values == ("old",) * 3


def test_nothing_waits_within_a_graph_that_is_captured(machine):
    training, made = Training(machine), Snapshot()
    made.copy_from(training.parts, 1)
    queued = len(machine.main.queue)
    machine.capturing = True
    made.queue_wait()
    assert len(machine.main.queue) == queued
    machine.capturing = False
    made.queue_wait()
    assert len(machine.main.queue) == queued + 1


def test_other_kinds_of_devices_are_refused(machine):
    training = Training(machine)
    training.buffer.device = Device("mps:0")
    with pytest.raises(SnapshotError, match="on mps is not copied"):
        Snapshot().copy_from(training.parts, 1)


def test_no_copy_becomes_part_of_a_graph_that_is_captured(machine):
    machine.capturing = True
    with pytest.raises(SnapshotError, match="captured"):
        Snapshot().copy_from(Training(machine).parts, 1)
    assert machine.main.queue == []
