"""However a script is started, each process that trains is recorded.

That a way to start instruments a process, test_ways_to_start.py finds out without torch, which
takes a process five seconds. Here some of them train.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from esper_otel.stream import read_frames
from testkit import without_compiler
from testkit.fork_server import fork_server
from testkit.patience import PATIENCE_S

pytest.importorskip("torch")

BIN = Path(sys.executable).parent
SCRIPT = f"""{without_compiler.SOURCE}
import os, sys, torch
import torch.distributed as dist
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    dist.barrier()  # a rank that is done before the other has connected would fail it
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(7):
    optimizer.zero_grad()
    model(torch.ones(4, 2)).square().mean().backward()
    optimizer.step()
    ENDS
if dist.is_initialized():
    dist.destroy_process_group()
print(sys.argv[1:])
"""


STAND_IN = """
import sys
from unittest.mock import MagicMock
torch = sys.modules["torch"] = MagicMock()
sys.modules["torch.distributed"] = torch.distributed
"""
"""Of torch, for what a script says without us, which is what Python says of its lines."""


@pytest.fixture
def start(tmp_path):
    def run(command, *, ends="pass", is_forked=False, **more):
        (tmp_path / "train.py").write_text(SCRIPT.replace("ENDS", ends))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
        quiet = {f"OTEL_{signal}_EXPORTER": "none" for signal in ("METRICS", "TRACES", "LOGS")}
        own = {
            "ESPER_RECORDING_DIR": str(tmp_path / "recordings"),
            "ESPER_SUMMARY": "off",
            "ESPER_MODE": "off",
            "ESPER_SPAM": "1",
            "OMP_NUM_THREADS": "1",
        }
        where = {"cwd": tmp_path, "env": clean | quiet | own | more, "timeout": PATIENCE_S}
        if is_forked:
            return fork_server().run(command, **where)
        return subprocess.run(command, capture_output=True, text=True, **where)

    run.frames = lambda: {
        path.name: [(frame.run, frame.step) for frame in read_frames(path)]
        for path in sorted((tmp_path / "recordings").glob("*.metrics.otlp"))
    }
    return run


TOLD = "esper-otel: ESPER_SPAM is set, but esper-otel has no such setting\n"


SINGLE = {
    "esper-otel run": [str(BIN / "esper-otel"), "run", "train.py", "--lr", "1"],
    "esper-otel run -m": [str(BIN / "esper-otel"), "run", "-m", "train", "--lr", "1"],
    "python -m esper_otel": [sys.executable, "-m", "esper_otel", "train.py", "--lr", "1"],
    "opentelemetry-instrument": [
        str(BIN / "opentelemetry-instrument"),
        sys.executable,
        "train.py",
        "--lr",
        "1",
    ],
}


@pytest.mark.parametrize("way", SINGLE)
def test_one_process(start, way):
    # Ours is started from nothing where a script raises or is interrupted, below.
    done = start(SINGLE[way], is_forked=way != "opentelemetry-instrument")
    assert (done.returncode, done.stdout) == (0, "['--lr', '1']\n"), done.stderr
    assert done.stderr == TOLD
    (frames,) = start.frames().values()
    assert [step for _, step in frames] == list(range(1, 8))


SPAWNING = f"""{without_compiler.SOURCE}
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing
import esper_otel

def work(rank, store):
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper_otel.start(optimizer)
    for step in range(7):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).square().mean().backward()
        optimizer.step()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, [sys.argv[1]], nprocs=2)
"""


def test_processes_that_the_script_spawns_itself_are_recorded_where_they_say_so(
    start, tmp_path
):
    (tmp_path / "spawning.py").write_text(SPAWNING)
    command = [sys.executable, str(tmp_path / "spawning.py"), str(tmp_path / "store")]
    done = start(command, is_forked=True)  # what it spawns is not
    assert done.returncode == 0, done.stderr
    ranks = start.frames()
    assert len(ranks) == 2
    assert len({run for frames in ranks.values() for run, _ in frames}) == 1
    assert all([step for _, step in frames] == list(range(1, 8)) for frames in ranks.values())


def test_every_rank(start, tmp_path):
    # Its store finds a port by itself, which nobody can take in between.
    options = "--nproc-per-node 2 --standalone --local-addr 127.0.0.1"
    command = f"{BIN}/esper-otel run {BIN}/torchrun {options} train.py --lr 1"
    # The launcher starts from nothing, and its ranks as every other test has it.
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nexec {shlex.join(fork_server().prefix)} {sys.executable} "$@"'
    )
    python.chmod(0o755)
    done = start(command.split(), PYTHON_EXEC=str(python))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("['--lr', '1']") == 2
    assert done.stderr.count(TOLD) == 1
    ranks = start.frames()
    assert len(ranks) == 2
    assert len({run for frames in ranks.values() for run, _ in frames}) == 1
    assert {name.rpartition("-")[2] for name in ranks} == {
        "rank0.metrics.otlp",
        "rank1.metrics.otlp",
    }
    assert all([step for _, step in frames] == list(range(1, 8)) for frames in ranks.values())


ENDINGS = {
    "raises": ("if step == 3: raise KeyError('x')", 1),
    "interrupted": ("if step == 3: import signal; signal.raise_signal(signal.SIGINT)", -2),
    "os._exit": ("if step == 3: os._exit(status=9)", 9),
    "a child's os._exit": ("if step == 3 and os.fork() == 0: os._exit(9)", 0),
}


@pytest.mark.parametrize(("ends", "status"), ENDINGS.values(), ids=ENDINGS)
def test_however_it_ends_its_steps_are_kept_and_its_status_is_its_own(
    start, tmp_path, ends, status
):
    says = status in (1, -2)
    ours = start([str(BIN / "esper-otel"), "run", "train.py"], ends=ends, is_forked=not says)
    assert ours.returncode == status
    if says:  # what the script says of it is its own as well
        (tmp_path / "torch.py").write_text(STAND_IN)
        bare = start([sys.executable, "train.py"], ends=ends)
        assert (ours.stdout, ours.stderr) == (bare.stdout, TOLD + bare.stderr)
    (frames,) = start.frames().values()
    assert [step for _, step in frames] == list(range(1, 8 if status == 0 else 5))
