"""Numbers that a device still has to deliver, read without ever waiting for it.

``tensor.item()`` makes the host wait until the device has done all it was given, which
takes away its run-ahead at every step. Here a scalar is copied behind that work into
pinned memory, an event marks the copy's end, and the number is read when the event is
found to have passed, usually one step later.

Called from one thread, the training thread. Nothing here raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any

SLOTS = 64
"""Readings per device that may be on their way: a run-ahead of many steps."""


class DeviceReading:
    """One number from a device; see :class:`ScalarReader`."""

    __slots__ = ("_slot", "_value")

    def __init__(self, slot: _Slot | None = None) -> None:
        self._slot = slot
        self._value: float | None = None
        if slot is not None:
            slot.reading = self

    def ready(self) -> bool:
        """Whether nothing more is to be waited for: it has arrived, or was lost."""
        slot = self._slot
        if slot is None:
            return True
        try:
            if _capturing() or not slot.arrived.query():
                return False
            self._value = slot.fetch()
        except Exception:
            # The device reports its own earlier failure at any call, this one too; the
            # user's next call is told again.
            self._value = None
        self._slot = slot.reading = None
        return True

    def value(self) -> float | None:
        """The number, NaN if that is what the device had; None when lost or not here yet."""
        return self._value if self.ready() else None


class _Slot:
    """An event, and what can be fetched once it has passed."""

    __slots__ = ("arrived", "fetch", "reading", "start", "target")

    def __init__(
        self, arrived: Any, fetch: Callable[[], float], *, target: Any = None, start: Any = None
    ) -> None:
        self.arrived = arrived
        self.fetch = fetch
        self.target = target
        self.start = start
        self.reading: DeviceReading | None = None


class _Pool:
    """Slots used in turn; one whose reading was never asked for is used again all the same."""

    __slots__ = ("_next", "_slots")

    def __init__(self, slots: list[_Slot]) -> None:
        self._slots = slots
        self._next = 0

    def acquire(self) -> _Slot | None:
        """The slot that has been in use for longest, None while its copy is not done."""
        slot = self._slots[self._next]
        if slot.reading is not None and not slot.reading.ready():
            return None
        self._next = (self._next + 1) % len(self._slots)
        return slot


class ScalarReader:
    """Reads numbers and tensors of one element, CUDA tensors without synchronising.

    The first reading from a device allocates ``slots`` pinned numbers and events for it.
    Losses are counted in ``lost``; then training ran ahead of the device by more
    readings than there are slots, or the value could not be read at all.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        self.lost = 0
        self._size = slots
        self._pools: dict[int, _Pool] = {}
        self._plain: type | None = None

    def read_async(self, value: object) -> float | DeviceReading:
        """``value`` if it is a number or lies on the CPU, else a reading of it under way.

        What is no single real number, lies on a kind of device that cannot be read
        without waiting, or is sharded over ranks, is lost: a reading whose value is None.
        """
        if type(value) is float:
            return value
        try:
            # Nearly always on a CPU: half a microsecond instead of two and a half.
            if type(value) is self._plain and value.is_cpu:  # type: ignore[attr-defined]
                number = value.item()  # type: ignore[attr-defined]
                if type(number) is float:
                    return number
            if isinstance(value, Real):
                return float(value)
            slot = self._start_copy(value)
        except Exception:
            slot = None
        if isinstance(slot, float):
            return slot
        if slot is None:
            self.lost += 1
        return DeviceReading(slot)

    def _start_copy(self, value: Any) -> float | _Slot | None:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(value, torch.Tensor):
            return None
        self._plain = torch.Tensor
        # A sharded tensor's value takes a collective, which other ranks do not join.
        if hasattr(value, "full_tensor") or value.numel() != 1 or value.is_complex():
            return None
        kind = value.device.type
        if kind == "cpu":
            return float(value.detach().item())
        if kind != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        device = value.device.index
        pool = self._pools.get(device)
        if pool is None:
            pool = self._pools[device] = self._make_pool(torch)
        slot = pool.acquire()
        if slot is not None:
            # To float64 on the device: a copy that changes the type would be waited for
            # if the CPU had to do it.
            with torch.no_grad():
                slot.target.copy_(value.detach().reshape(()), non_blocking=True)
            slot.arrived.record(torch.cuda.current_stream(device))
        return slot

    def _make_pool(self, torch: Any) -> _Pool:
        memory = torch.empty(self._size, dtype=torch.float64, pin_memory=True)
        return _Pool(
            [
                _Slot(torch.cuda.Event(), target.item, target=target)
                for target in memory.unbind()
            ]
        )


class CopyTimer:
    """Times the first host-to-device copy of each step, in milliseconds of the device.

    Put :meth:`copying` around every copy that may be the first; :meth:`first_copy`, once per
    step, gives the reading of the step's first one and turns to the next step. Without
    CUDA both do nothing.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        self._size = slots
        self._pools: dict[int, _Pool] = {}
        self._reading: DeviceReading | None = None

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Around a copy to the current CUDA device."""
        slot = None
        try:
            if self._reading is None:
                slot = self._mark_start()
        except Exception:
            slot = None
        try:
            yield
        finally:
            if slot is not None:
                self._mark_end(slot)

    def first_copy(self) -> DeviceReading | None:
        """The reading of this step's first copy, None when it had none."""
        reading, self._reading = self._reading, None
        return reading

    def _mark_start(self) -> _Slot | None:
        torch = sys.modules.get("torch")
        # Not the first thing to touch CUDA: the copy itself may be, then it goes untimed.
        if torch is None or not torch.cuda.is_initialized() or _capturing():
            return None
        index = torch.cuda.current_device()
        pool = self._pools.get(index)
        if pool is None:
            pool = self._pools[index] = self._make_pool(torch)
        slot = pool.acquire()
        if slot is not None:
            slot.start.record(torch.cuda.current_stream(index))
        return slot

    def _mark_end(self, slot: _Slot) -> None:
        try:
            slot.arrived.record(sys.modules["torch"].cuda.current_stream())
            self._reading = DeviceReading(slot)
        except Exception:
            self._reading = DeviceReading()

    def _make_pool(self, torch: Any) -> _Pool:
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(self._size)
        ]
        return _Pool(
            [_Slot(end, partial(start.elapsed_time, end), start=start) for start, end in events]
        )


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, when even asking an event is forbidden."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_current_stream_capturing())
