"""Four ranks of one run: what of them is in the stream, and whether they did alike.

``examples/ddp.py`` on four gloo processes under torchrun, not edited, in ``enforce``, with a
table that lowers the learning rate again and again. In the middle the sidecar is killed with
SIGKILL, and another started. What is counted is what came to a receiver; the steps that were
taken follow from the data, the sampler and the epochs.

    python -m bench.ranks_agree [--json PATH]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from bench.figures import Figure, run
from bench.roundtrip import started
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.receiving.otlp_frames import frames_of
from testkit.receiver import METRICS, HttpReceiver, Request

BENCH = "ranks_agree"
BIN = Path(sys.executable).parent
Process = subprocess.Popen[str]
RANKS, EPOCHS, BATCH = 4, 60, 64
PATIENCE_S = 120.0

TABLE = """\
version: often-1
rules:
  - id: now_and_then
    metric: step
    above: 20
    cooldown: 5
    severity: WARNING
    action: OPTIMIZER
    parameters: {lr_scale: 0.98}
    text: The learning rate is lowered.
"""


class Told(NamedTuple):
    """What came of the run."""

    runs: set[str]
    came: Counter[tuple[int, int]]
    """How often each step of each rank came."""

    rates: dict[int, dict[int, float]]
    """Rank → step → learning rate in force."""


def figures() -> list[Figure]:
    told = trained()
    steps = EPOCHS * _batches()
    wanted = {(rank, step) for rank in range(RANKS) for step in range(1, steps + 1)}
    first = told.rates.get(0, {})
    applied = sum(first[step] < first[step - 1] for step in first if step - 1 in first)
    apart = sum(len({told.rates[rank].get(step) for rank in told.rates}) > 1 for step in first)
    rows = [
        ("names that the ranks have for their run, beyond one", len(told.runs) - 1, "names"),
        ("steps taken and not in the stream", len(wanted - told.came.keys()), "steps"),
        ("steps in the stream that were not taken", len(told.came.keys() - wanted), "steps"),
        (
            "steps that came more than once",
            sum(count > 1 for count in told.came.values()),
            "steps",
        ),
        ("steps at which the ranks' learning rates differ", apart, "steps"),
    ]
    return [
        Figure.report(BENCH, f"{RANKS} ranks, steps of each", steps, "steps"),
        Figure.report(BENCH, "decisions applied", applied, "decisions"),
        *(Figure.at_most(BENCH, name, value, unit, bar=0) for name, value, unit in rows),
    ]


def trained() -> Told:
    """The run, with a sidecar that dies after a third of it and is there again after two."""
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as name, HttpReceiver() as receiver:
        folder = Path(name)
        table, socket = folder / "often.yaml", folder / "tamiyo.sock"
        said = folder / "said"
        table.write_text(TABLE)
        thirds = [EPOCHS * _batches() // 3 * part for part in (1, 2)]
        with sidecar(socket, table) as (first, _):
            training = _start(folder, said, receiver.url, socket)
            try:
                _until(lambda: _newest(receiver) >= thirds[0], training, said)
                first.kill()
                first.wait()
                _until(lambda: _newest(receiver) >= thirds[1], training, said)
                with sidecar(socket, table):
                    if training.wait(PATIENCE_S) != 0:
                        raise RuntimeError(said.read_text())
            finally:
                training.terminate()  # torchrun ends its workers with it
                training.wait()
        return _told(receiver)


def sidecar(socket: Path, table: Path) -> AbstractContextManager[tuple[Process, str]]:
    """One that is only asked."""
    command = [str(BIN / "tamiyo"), "serve", "--no-ingest"]
    return started([*command, "--socket", str(socket), "--table", str(table)])


def _start(folder: Path, told: Path, url: str, socket: Path) -> Process:
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "esper_otel", "run", "-m", "examples.ddp", "--epochs", str(EPOCHS)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    ours = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OMP_NUM_THREADS": "1",
        "ESPER_MODE": "enforce",
        "ESPER_TAMIYO_SOCKET": str(socket),
        "ESPER_TAMIYO_DEADLINE_MS": "100",
        "ESPER_RELEASE_STEPS": "100000",
        "ESPER_SPOOL_DIR": str(folder / "spool"),
        "ESPER_SUMMARY": "off",
    }
    with told.open("w") as file:
        return subprocess.Popen(command, env=clean | ours, stdout=file, stderr=file, text=True)


def _batches() -> int:
    """Steps of a rank in an epoch: the sampler gives each rank as many rows, rounded up."""
    from examples.digits import load

    train, _ = load(0)
    rows = -(-len(train) // RANKS)
    return -(-rows // BATCH)


def _until(there: Callable[[], bool], training: Process, said: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        if training.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the ranks did not get there: {said.read_text()}")
        time.sleep(0.05)


def _newest(receiver: HttpReceiver) -> int:
    requests = receiver.inbox.requests[-8:]
    return max((frame.step for frame in chain.from_iterable(map(_frames, requests))), default=0)


def _told(receiver: HttpReceiver) -> Told:
    told = Told(set(), Counter(), {})
    for frame in chain.from_iterable(map(_frames, receiver.inbox.requests)):
        told.runs.add(frame.run)
        told.came[frame.rank, frame.step] += 1
        told.rates.setdefault(frame.rank, {})[frame.step] = frame.values["optimizer_lr"]
    return told


def _frames(request: Request) -> list[StepFrame]:
    if request.path != METRICS:
        return []
    came = frames_of(ExportMetricsServiceRequest.FromString(request.body)).frames
    # The end of a run is no step.
    return [each for each in came if isinstance(each, StepFrame) and each.ended is None]


if __name__ == "__main__":
    sys.exit(run(figures))
