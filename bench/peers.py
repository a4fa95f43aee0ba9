"""What a step costs with us, and with others that record training, each as it usually is.

Per tool and network one process, which trains in short blocks, with the tool and without in
turn. A plain loop:

* esper-otel, from outside, every step's metrics to a receiver; then asking a sidecar as well,
  which no other tool has,
* TraceML (``traceml-ai``), with its context around each step and an aggregator,
* torchtel, from outside, spans and metrics by the OTel SDK to a receiver,
* wandb, offline, logging loss, gradient norm and learning rate of each step.

Under Lightning's Trainer: esper-otel, and DeviceStatsMonitor with a CSV logger, of every step
and of every 50th, which is its default. The others are the extra ``peers``; what is not
installed is left out. Nothing here leaves this machine.

A pair's difference is that of the median steps of two neighbouring blocks. What a tool does
now and then, in threads of its own, is in the CPU time of the process; TraceML's and wandb's
go on while the bare blocks run, and both have another process, which can only flatter them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.figures import Figure, median, run
from bench.peer_tools import Measured
from bench.training import sidecar
from testkit.receiver import ReceiverProcess

BENCH = "peers"
ROOT = Path(__file__).parent.parent
OURS = "esper-otel"
ASKING = f"{OURS}, asking at every step"
LIGHTNING = f"{OURS} under Lightning"
MONITOR = "DeviceStatsMonitor"


class Tool(NamedTuple):
    """A row of the table: the name in ``bench.peer_tools``, and what it needs."""

    name: str
    title: str
    module: str = "esper_otel"
    every_step: bool = True
    compared: bool = True


TOOLS = (
    Tool("esper", OURS),
    Tool("esper_asking", ASKING, compared=False),
    Tool("traceml", "TraceML", "traceml_ai"),
    Tool("torchtel", "torchtel", "torchtel"),
    Tool("wandb", "wandb, offline", "wandb"),
    Tool("esper_lightning", LIGHTNING, "lightning", compared=False),
    Tool("device_stats", MONITOR, "lightning"),
    Tool(
        "device_stats_default",
        f"{MONITOR}, every 50th step",
        "lightning",
        every_step=False,
    ),
)
NETWORKS = {"digits": "digits CNN", "characters": "transformer"}
LOCAL = {
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_DISABLE_GIT": "true",
    "ESPER_SUMMARY": "off",
}
"""The environment of every tool. Offline means offline: no reports of errors either."""


def figures() -> list[Figure]:
    missing = {tool.module for tool in TOOLS if find_spec(tool.module) is None}
    for module in sorted(missing):
        print(f"{module} is not installed (extra: peers) and left out", flush=True)
    rows = []
    receiver = ReceiverProcess()
    try:
        with tempfile.TemporaryDirectory() as name, sidecar(Path(name)) as tamiyo:
            for network, title in NETWORKS.items():
                added: dict[str, float] = {}
                for tool in TOOLS:
                    if tool.module in missing:
                        continue
                    environment = tamiyo if tool.name == "esper_asking" else {}
                    told = f"{title}, {tool.title}"
                    measured = pairs(tool, network, receiver.url, environment)
                    added[tool.title], figures_of = summary(told, measured)
                    rows += figures_of
                rows += comparison(title, added)
    finally:
        receiver.kill()
    return rows


def summary(title: str, pairs: list[tuple[Measured, Measured]]) -> tuple[float, list[Figure]]:
    """The median of what was added per step in µs, and the rows that tell of it."""
    walls = [(tool.wall - bare.wall) * 1e3 for tool, bare in pairs]
    cpus = [(tool.cpu - bare.cpu) * 1e3 for tool, bare in pairs]
    steps = [median([block.wall for block in blocks]) for blocks in zip(*pairs, strict=True)]
    low, _, high = statistics.quantiles(walls, n=4)
    return median(walls), [
        Figure.report(BENCH, f"{title}: a step", steps[0], "ms", steps[1]),
        Figure.report(BENCH, f"{title}: added per step, median", median(walls), "µs"),
        Figure.report(BENCH, f"{title}: added, first quartile", low, "µs"),
        Figure.report(BENCH, f"{title}: added, third quartile", high, "µs"),
        Figure.report(BENCH, f"{title}: added CPU of the process", median(cpus), "µs"),
    ]


def comparison(title: str, added: dict[str, float]) -> list[Figure]:
    """Ours against the least of the others that record every step, loop by loop.

    Asking a sidecar, which is what ``esper-otel run`` does unless told otherwise, is beside
    the bar and not within it: no other tool has an answer to wait for.
    """
    others = [
        tool.title
        for tool in TOOLS
        if tool.title in added and tool.compared and tool.every_step and tool.title != OURS
    ]
    least = min(others, key=added.__getitem__, default=None)
    rows = []
    if least:
        over = f"over {least}, the least of the others that record every step"
        recording, asking = added[OURS], added[ASKING]
        rows += [
            Figure.at_most(
                BENCH, f"{title}: {OURS} {over}", recording - added[least], "µs", bar=0
            ),
            Figure.report(BENCH, f"{title}: {ASKING}, {over}", asking - added[least], "µs"),
        ]
    if MONITOR in added:
        rows.append(
            Figure.at_most(
                BENCH,
                f"{title}: {LIGHTNING} over {MONITOR}",
                added[LIGHTNING] - added[MONITOR],
                "µs",
                bar=0,
            )
        )
    return rows


def pairs(
    tool: Tool, network: str, url: str, environment: dict[str, str]
) -> list[tuple[Measured, Measured]]:
    """What neighbouring blocks measured, with the tool and without."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "bench.peer_tools", tool.name, network, f"{folder}/result"],
            cwd=folder,
            env=os.environ
            | {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "ESPER_SPOOL_DIR": folder}
            | LOCAL
            | {f"WANDB_{kind}_DIR": folder for kind in ("CACHE", "CONFIG", "DATA")}
            | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
            | environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{tool.title}: failed with {done.returncode}\n{done.stderr}")
        result = (Path(folder) / "result").read_bytes()
    return msgspec.json.decode(result, type=list[tuple[Measured, Measured]])


if __name__ == "__main__":
    sys.exit(run(figures))
