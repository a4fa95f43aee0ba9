"""Trainings of several ranks: real processes that average their gradients over gloo."""

# ruff: noqa: D102 (what a method is for is said where it is overridden: Course)

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from bench.scenarios.training import Course, Training
from bench.scenarios.troubles import Pace
from bench.scenarios.workloads import Batch, Workload

RANKS = 3
STRAGGLER = 1


class Ranks(Course):
    """A healthy training of three ranks."""

    ranks = RANKS

    def prepare(self, work: Workload, steps: int) -> None:
        # Its averaging happens inside backward, which is where the fast wait for the slow.
        # Buffers are constants here, and sending them would be a wait in forward as well.
        work.model = torch.nn.parallel.DistributedDataParallel(
            work.model, broadcast_buffers=False
        )


class Straggler(Ranks):
    """One rank's forward takes two whole steps more than it did; all others wait for it."""

    def __init__(self) -> None:
        self._pace = Pace()

    def fetch(self, training: Training) -> None:
        self._pace.follow(training)

    def forward(self, training: Training, batch: Batch) -> Tensor:
        if training.wrong and distributed.get_rank() == STRAGGLER:
            time.sleep(2 * self._pace.step_s)
        return super().forward(training, batch)


def in_ranks(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` returns in each of ``count`` processes that can hear one another.

    ``work`` is called with the rank and must be picklable, as must what it returns.
    Raises ``RuntimeError`` when one of them fails.
    """
    # Forked from a server that has imported torch and not used it: its autograd does not
    # outlive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sklearn.datasets", "bench.scenarios.ranks"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: Any = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, count, port, work, results))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < count and (
        any(each.is_alive() for each in processes) or not results.empty()
    ):
        if results.empty():
            time.sleep(0.05)
        else:
            rank, result = results.get()
            found[rank] = result
    for process in processes:
        process.join()
    if len(found) < count:
        raise RuntimeError(f"ranks that came back: {sorted(found)} of {count}")
    return [found[rank] for rank in range(count)]


def _rank(rank: int, count: int, port: int, work: Callable[[int], Any], results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=count)
    result = work(rank)
    distributed.barrier()
    distributed.destroy_process_group()
    results.put((rank, result))
