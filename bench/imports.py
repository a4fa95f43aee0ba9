"""How long importing takes, where torch has no part in it.

Fresh processes in turn: ``import esper_otel``, the ``tamiyo`` command until it knows what it
is asked for, and beside each an interpreter that does nothing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from time import perf_counter

from bench.figures import Figure, alternate, median, run

BENCH = "imports"
RUNS = 15
HEAVY = ("torch", "numpy", "grpc")
NOTHING = [sys.executable, "-c", "pass"]
MEASURED = {
    "import esper_otel": ([sys.executable, "-c", "import esper_otel"], 150),
    "the tamiyo command": ([str(Path(sys.executable).with_name("tamiyo")), "--help"], 300),
}
"""What is measured: a command, and the most that it may take, in ms."""


def figures() -> list[Figure]:
    rows = []
    for name, (command, bar_ms) in MEASURED.items():
        took(command), took(NOTHING)  # reads the files
        ours, nothing = alternate(lambda: took(command), lambda: took(NOTHING), RUNS)  # noqa: B023
        added = [a - b for a, b in zip(ours, nothing, strict=True)]
        rows += [
            Figure.at_most(BENCH, f"{name}, a fresh process", median(ours), "ms", bar=bar_ms),
            Figure.report(BENCH, "the same, over one that does nothing", median(added), "ms"),
        ]
    rows.append(
        Figure.at_most(BENCH, f"of {', '.join(HEAVY)} imported", heavy_modules(), "", bar=0)
    )
    return rows


def took(command: list[str]) -> float:
    """Milliseconds until ``command`` has run."""
    began = perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (perf_counter() - began) * 1e3


def heavy_modules() -> int:
    """How many of ``HEAVY`` come along with either."""
    code = (
        f"import sys, esper_otel, esper_tamiyo.cli; print(len(set(sys.modules) & {{*{HEAVY}}}))"
    )
    return int(subprocess.check_output([sys.executable, "-c", code], text=True))


if __name__ == "__main__":
    sys.exit(run(figures))
