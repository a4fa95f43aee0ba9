"""ProcessGroup: the ranks of a run, on connections of our own, and waits that end.

A process group of gloo's besides the user's: nothing here takes part in a collective of
theirs, nor in the numbering of their groups (``dist.new_group`` counts every call, also one
that failed, and the user's next group would wait for ranks that count otherwise). What is
sent begins at once and is waited for later, by gloo's own threads, which need no Python.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esper_otel.finalization import FinalizingError, leak, no_shutdown_inside
from esper_otel.ranks.world import attempt

POLL_S = 0.02
"""How often it is looked whether what is under way is done, once its rank has left."""

_made = 0
"""Groups of this process so far; the ranks of a run make them in the same order."""


class ProcessGroupError(RuntimeError):
    """The other ranks did not respond in time, or never will; the message says why."""


class PendingReduce:
    """Bytes under way; :meth:`wait` gives the greatest of all ranks, byte by byte."""

    __slots__ = ("_data", "_owner", "_work")

    def __init__(self, group: ProcessGroup, data: Tensor, work: Any) -> None:
        self._owner = group
        self._data = data
        self._work = work

    def wait(self) -> bytes:
        """Those bytes; raises :class:`ProcessGroupError`, and within the group's time-out."""
        self._owner.wait(self._work)
        return self._data.numpy().tobytes()


class ProcessGroup:
    """All ranks of the run; see :func:`join`. After one failure nothing works any more."""

    def __init__(self, group: Any, rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self._under_way: list[Any] = []
        self._timeout = timedelta(seconds=timeout_s)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that asks and decides."""
        return self.rank == 0

    def send(self, data: bytes) -> PendingReduce:
        """Begin to find the greatest byte of all ranks at each place of ``data``."""
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return PendingReduce(self, tensor, self._reduce(tensor, dist.ReduceOp.MAX))

    def extremes(self, *numbers: int) -> list[tuple[int, int]]:
        """The least and the greatest of all ranks, for each of ``numbers`` (63 bits).

        Waits for the others; raises :class:`ProcessGroupError`.
        """
        tensor = torch.tensor([*numbers, *(-each for each in numbers)], dtype=torch.int64)
        self.wait(self._reduce(tensor, dist.ReduceOp.MAX))
        greatest = tensor.tolist()
        count = len(numbers)
        return [(-greatest[count + nth], greatest[nth]) for nth in range(count)]

    def average(
        self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The mean over the ranks of each gradient; one that a rank has not counts as zero.

        None where no rank has one. All on the CPU; ``like`` has the same shapes. Every rank
        calls it with as many, in the same order.
        """
        if not like:
            return []
        flat = torch.cat(
            [
                *(
                    (torch.zeros_like(shape) if each is None else each).reshape(-1).double()
                    for each, shape in zip(gradients, like, strict=True)
                ),
                torch.tensor([0.0 if each is None else 1.0 for each in gradients]).double(),
            ]
        )
        self.wait(self._reduce(flat, dist.ReduceOp.SUM))
        *means, present = torch.split(flat, [*(each.numel() for each in like), len(like)])
        return [
            (mean / self.size).to(shape.dtype).reshape(shape.shape) if seen else None
            for mean, shape, seen in zip(means, like, present.tolist(), strict=True)
        ]

    def wait(self, work: Any) -> None:
        """Until ``work`` is done; raises :class:`ProcessGroupError`."""
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise ProcessGroupError(_first_line(error)) from None

    def leave(self) -> None:
        """Take part no more; the others find out as soon as what is under way is done."""
        group, self._group = self._group, None
        under_way, self._under_way = _unfinished(self._under_way), []
        if under_way:
            # Whoever drops the group waits for them, so not here; nothing else holds either.
            held = [*under_way, group]
            thread = threading.Thread(
                target=_drop, args=(held,), name="esper-part", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                # Python 3.12 and later start no threads while the interpreter ends.
                leak(held)

    def _reduce(self, tensor: Tensor, operation: Any) -> Any:
        if self._group is None:
            raise ProcessGroupError("this rank has left")
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        try:
            work = self._group.allreduce([tensor], options)
        except RuntimeError as error:
            raise ProcessGroupError(_first_line(error)) from None
        self._under_way = [*_unfinished(self._under_way), work]
        return work


def _unfinished(works: list[Any]) -> list[Any]:
    return [work for work in works if not work.is_completed()]


def _drop(held: list[Any]) -> None:
    """Let go of what is in ``held``, works and their group, once all of them are done.

    Asked again and again and not waited for: a wait, as the drop itself, is within gloo.
    If the process ends before, so do its connections.
    """
    while True:
        try:
            with no_shutdown_inside():
                if all(work.is_completed() for work in held[:-1]):
                    held.clear()
                    return
        except FinalizingError:
            leak(held)
            return
        time.sleep(POLL_S)


def join(timeout_s: float, name: str = "") -> ProcessGroup:
    """Meet the other ranks; each of them must call this, as many times as any other.

    ``name`` is for those who may call it in another order among themselves. Raises
    :class:`ProcessGroupError` when not all have come after ``timeout_s``.
    """
    global _made
    if not name:
        _made += 1
        name = str(_made)
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        group = dist.ProcessGroupGloo(
            store_of(name), rank, size, timeout=timedelta(seconds=timeout_s)
        )
    except RuntimeError as error:
        raise ProcessGroupError(
            f"not all {size} ranks have come within {timeout_s:g} s: {_first_line(error)}"
        ) from None
    return ProcessGroup(group, rank, size, timeout_s)


def store_of(name: str) -> Any:
    """What all ranks can write to and read from, under ``name``."""
    store = dist.distributed_c10d._get_default_store()
    return dist.distributed_c10d.PrefixStore(f"esper-otel/{attempt()}/{name}", store)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
