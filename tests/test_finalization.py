"""A process whose threads are within torch when it ends, and still ends well."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest

from esper_otel.finalization import FinalizingError, ShutdownGuard
from testkit.fork_server import fork_server
from testkit.patience import PATIENCE_S


def ends_with(script: str) -> subprocess.CompletedProcess[str]:
    """How a process that trains ends; it has torch already."""
    pytest.importorskip("torch")
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return fork_server().run(command, finalizes=True)


def test_the_end_waits_for_who_is_inside() -> None:
    shield, out = ShutdownGuard(), threading.Event()
    inside = threading.Event()

    def work() -> None:
        with shield.held():
            inside.set()
            out.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(30)
    assert not shield.close(0.0)
    out.set()
    assert shield.close(30.0)
    thread.join()
    with pytest.raises(FinalizingError), shield.held():
        pass


def test_who_fails_inside_is_out() -> None:
    shield = ShutdownGuard()
    with pytest.raises(KeyError, match="why"), shield.held():
        raise KeyError("why")
    assert shield.close(0.0)


IN_A_CHILD = """
    import os, threading
    from esper_otel.finalization import no_shutdown_inside
    inside, out = threading.Event(), threading.Event()
    def work():
        with no_shutdown_inside():
            inside.set()
            out.wait()
    threading.Thread(target=work, daemon=True).start()
    inside.wait()
    child = os.fork()
    if child == 0:
        from esper_otel import finalization
        os._exit(0 if finalization._shield.close(0.0) else 1)
    out.set()
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    script = textwrap.dedent(IN_A_CHILD)
    assert subprocess.run([sys.executable, "-c", script], timeout=PATIENCE_S).returncode == 0


A_BUSY_FETCH = """
    import threading, time, torch
    from esper_otel.kasmina.blueprints import blueprint, lookup
    from esper_otel.kasmina.kernels import Activation, KernelFetcher
    from torch import nn
    began = threading.Event()
    @blueprint("heavy", ranks=[2])
    def heavy(shape):
        x = torch.randn(40, 40)
        began.set()
        # Calls that let go of the interpreter and want it back, until it is about to end
        # and a while longer, but not for longer than it waits.
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            torch.linalg.svd(x)
        return nn.Linear(shape[-1], shape[-1])
    fetcher = KernelFetcher(60_000.0)
    fetcher.request(lookup("heavy"), Activation(torch.Size((2, 4))), 0)
    began.wait()
"""


@pytest.mark.torch
def test_a_process_ends_well_while_a_seed_is_built() -> None:
    done = ends_with(A_BUSY_FETCH)
    assert (done.returncode, done.stderr) == (0, "")


LEFT_EARLY = """
    import atexit, sys, time, threading
    from unittest import mock
    BEFORE
    from datetime import timedelta
    import torch, torch.distributed as dist
    from esper_otel.ranks.process_group import ProcessGroup
    store, groups = dist.HashStore(), [None, None]
    def make(rank):
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2, timeout=timedelta(seconds=30))
    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for each in threads: each.start()
    for each in threads: each.join()
    mine, others = ProcessGroup(groups[0], 0, 2, 30.0), groups[1]
    groups.clear()
    class Other:
        # Takes its part only while the interpreter ends, and then leaves time to notice it.
        def __init__(self):
            self.group, self.sleep = others, time.sleep
            self.tensor = torch.zeros(3, dtype=torch.uint8)
            self.options = dist.AllreduceOptions()
            self.options.reduceOp = dist.ReduceOp.MAX
        def __del__(self):
            self.group.allreduce([self.tensor], self.options).wait()
            self.sleep(0.3)
            print("left it", flush=True)
    other = Other()
    mine.send(b"abc")
    del others
    LEAVES
"""


LEAVING = {
    "while it trains": ("", "mine.leave()"),
    # What was registered before us comes after us, while the thread still looks.
    "long before it ends": ("atexit.register(time.sleep, 0.3)", "mine.leave()"),
    "when no thread can be started": (
        "",
        "atexit.register(mine.leave); atexit.register(mock.patch.object("
        "threading.Thread, 'start', side_effect=RuntimeError).start)",
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize(("before", "leaves"), LEAVING.values(), ids=LEAVING)
def test_a_rank_that_leaves_before_the_others_have_come_ends_well(before, leaves) -> None:
    done = ends_with(LEFT_EARLY.replace("BEFORE", before).replace("LEAVES", leaves))
    assert (done.returncode, done.stdout, done.stderr) == (0, "left it\n", "")
