"""What instrumentation does to a real training: nothing to its numbers, little to its time.

Trains ``examples/digits.py`` bare and under ``esper-otel run`` with a sidecar that
answers and receives, and compares losses and weights bit by bit. Then trains the same
network in this process, instrumented and not in turn, block by block.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter

from bench.figures import Figure, alternate, median, percentile, run

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SCRIPT = ROOT / "examples" / "digits.py"
BENCH = "training"
BLOCKS = 20
BLOCK_EPOCHS = 4


@contextmanager
def sidecar(folder: Path) -> Iterator[dict[str, str]]:
    """A living sidecar; yields the environment that leads a trainer to it."""
    socket = folder / "tamiyo.sock"
    tamiyo = [sys.executable, "-m", "esper_tamiyo.cli"]  # also where only the checkout is
    command = [*tamiyo, "serve", "--socket", str(socket)]
    command += ["--otlp-http", "127.0.0.1:0", "--otlp-grpc", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            status = [*tamiyo, "status", "--json", "--socket", str(socket)]
            told = json.loads(subprocess.check_output(status, text=True))
            yield {
                "ESPER_TAMIYO_SOCKET": str(socket),
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{told['ingest']['otlp_http']}",
                "ESPER_SPOOL_DIR": str(folder / "spool"),
            }
        finally:
            process.terminate()


def bit_identical(folder: Path, environment: dict[str, str]) -> list[Figure]:
    import torch

    from esper_otel.stream import read_frames

    saved = {}
    for name, command in {
        "bare": [sys.executable],
        "watched": [
            *(str(BIN / "esper-otel"), "run"),
            *("--record", str(folder / "recording"), "--run-id", "digits"),
        ],
    }.items():
        file = folder / f"{name}.pt"
        subprocess.run(
            [*command, str(SCRIPT), "--no-accident", "--save", str(file)],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | environment,
        )
        saved[name] = torch.load(file)
    bare, watched = saved["bare"], saved["watched"]
    unequal = sum(a != b for a, b in zip(bare["losses"], watched["losses"], strict=True))
    unequal += sum(
        not torch.equal(tensor, watched["weights"][name])
        for name, tensor in bare["weights"].items()
    )
    (recording,) = (folder / "recording").glob("*.metrics.otlp")
    frames = list(read_frames(recording))
    hooks = [frame.values["hook_latency_ms"] for frame in frames[1:]]
    waits = [frame.values["tamiyo_latency_ms"] for frame in frames[1:]]
    steps = len(bare["losses"])
    return [
        Figure.at_most(
            BENCH,
            f"losses and weights that differ from the bare script's, {steps} steps",
            unequal,
            "values",
            bar=0,
        ),
        Figure.at_most(BENCH, "steps not recorded", steps - len(frames), "steps", bar=0),
        Figure.report(BENCH, "hook_latency_ms p50", percentile(hooks, 50), "ms"),
        Figure.at_most(BENCH, "hook_latency_ms p95", percentile(hooks, 95), "ms", bar=10),
        Figure.report(BENCH, "hook_latency_ms p99", percentile(hooks, 99), "ms"),
        Figure.report(BENCH, "tamiyo_latency_ms p50", percentile(waits, 50), "ms"),
        Figure.report(BENCH, "tamiyo_latency_ms p99", percentile(waits, 99), "ms"),
    ]


def added_time(environment: dict[str, str]) -> list[Figure]:
    import torch
    from torch.utils.data import DataLoader

    from esper_otel.integrations.torch import TorchInstrumentor
    from examples import digits

    os.environ.update(environment)
    torch.manual_seed(0)
    train, _ = digits.load(0)
    loader = DataLoader(train, batch_size=64, shuffle=True)
    model = digits.DigitsNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def block() -> float:
        """Milliseconds per step of a few epochs."""
        began = perf_counter()
        for _ in range(BLOCK_EPOCHS):
            for images, labels in loader:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
        return (perf_counter() - began) * 1e3 / (BLOCK_EPOCHS * len(loader))

    def watched(mode: str) -> float:
        instrumentor = TorchInstrumentor()
        instrumentor.instrument(skip_dep_check=True, mode=mode)
        try:
            return block()
        finally:
            instrumentor.uninstrument()

    block()
    rows = []
    for mode, name in (("advise", "asking at every step"), ("off", "not asking")):
        watched(mode)
        with_us, bare = alternate(partial(watched, mode), block, BLOCKS)
        added = sorted((a - b) * 1e3 for a, b in zip(with_us, bare, strict=True))
        quartiles = statistics.quantiles(added, n=4)
        rows += [
            Figure.report(
                BENCH, f"wall time per step, {name}", median(with_us), "ms", median(bare)
            ),
            Figure.report(BENCH, f"added per step, {name}, median", median(added), "µs"),
            Figure.report(BENCH, f"added per step, {name}, first quartile", quartiles[0], "µs"),
            Figure.report(BENCH, f"added per step, {name}, third quartile", quartiles[2], "µs"),
        ]
    return rows


def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as name, sidecar(Path(name)) as environment:
        folder = Path(name)
        return [*bit_identical(folder, environment), *added_time(environment)]


if __name__ == "__main__":
    sys.exit(run(figures))
