"""What a cluster needs, worked out from the last results: ``python -m bench.topology``.

Writes the part of ``docs/runbook.md`` between its two marks from ``bench/results.json``, so
that no number there is older than the bench it comes from. ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import ceil

import msgspec

from bench.__main__ import RESULTS
from bench.collector import LOAD_STEPS
from bench.collector import RANKS as LOAD_RANKS
from bench.figures import Figure
from bench.sizing import METRICS, SEEDS, STEPS_PER_S
from esper_otel.leyline.metrics import SEED_KEYS
from esper_tamiyo.judging.roster import STATE_BYTES, capacity_of
from esper_tamiyo.judging.rulebook import Rulebook
from esper_tamiyo.language.table_file import load
from ops.generate.files import ROOT, bring_up_to_date, with_section

PAGE = ROOT / "docs" / "runbook.md"
BEGIN, END = "<!-- topology: generated -->", "<!-- topology: end -->"

RANKS = (1, 64, 1024)
RANKS_PER_NODE = 8
GATEWAY_CORES, BUSY = 2, 0.7
"""Of each gateway, and the share of them at which the autoscaler adds one."""

POINTS = METRICS + SEEDS * len(SEED_KEYS)
WHAT = f"{METRICS} metrics and {SEEDS} seeds"

UNMEASURED = """\
*The Collector has not been measured on this machine yet: `make bench BENCH=collector`, then
`python -m bench.topology`.*"""


class Costs(msgspec.Struct, frozen=True):
    """Processor seconds for 100,000 points, of each part, and bytes of a step."""

    collector: float
    prometheus: float
    tamiyo: float
    step_bytes: float


def costs(figures: Sequence[Figure]) -> Costs | None:
    """From the rows of the benches; None when some are not there."""
    rows = {(figure.bench, figure.figure): figure.value for figure in figures}
    cores = [
        value
        for (bench, name), value in rows.items()
        if bench == "collector" and name.endswith("points/s: Collector, processor")
    ]
    if not cores:
        return None
    try:
        collector = rows["collector", "the same: Collector, processor per 100,000 points"]
        prometheus = rows["collector", "the same: Prometheus, processor"]
        tamiyo = rows["collector", "the same: Tamiyo, processor"]
        unseen = rows["collector", "the same: steps that Tamiyo was not told of"]
        step = rows["sizing", f"{WHAT}: a step in a request of its own"]
    except KeyError:
        return None
    # As many points went to all of them: seconds are as cores are. Tamiyo's are for those
    # that it was told of.
    seconds = collector / cores[0]
    seen = 1 - unseen / (LOAD_RANKS * LOAD_STEPS)
    return Costs(collector, prometheus * seconds, tamiyo * seconds / seen, step)


def section(figures: Sequence[Figure]) -> str:
    """The generated part, as Markdown."""
    found = costs(figures)
    if found is None:
        return UNMEASURED
    head = [
        f"Each rank {STEPS_PER_S} steps a second of {WHAT}, {POINTS} points; {RANKS_PER_NODE} "
        f"ranks on a node; gateways of {GATEWAY_CORES} cores, busy to {BUSY:.0%}. An agent is "
        "assumed to cost as much as the measured Collector; Tamiyo's cores are for every step, "
        "computed from the steps that it received.",
        "",
        "| ranks | points/s | from trainers | series | Collectors | cores of agents | "
        "cores of gateways | of Prometheus | of Tamiyo | on disk for an hour's outage |",
        "| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*head, *(_row(ranks, found) for ranks in RANKS), "", held(found)])


def held(found: Costs) -> str:
    """How many such ranks one Tamiyo holds, and one gateway."""
    of_rank = STEPS_PER_S * POINTS / 1e5
    cores = GATEWAY_CORES * BUSY
    kept = capacity_of(Rulebook(load("default")), STATE_BYTES).ranks
    gateway, tamiyo = (cores / (of_rank * cost) for cost in (found.collector, found.tamiyo))
    return (
        f"So a gateway holds {gateway:,.0f} such ranks. One Tamiyo, whose two processes are as "
        f"busy on two cores, holds {tamiyo:,.0f} by its cores and {kept:,} by its memory, "
        "which `--state-mb` raises."
    )


def _row(ranks: int, found: Costs) -> str:
    rate = ranks * STEPS_PER_S * POINTS
    sent = ranks * STEPS_PER_S * found.step_bytes
    collector, prometheus, tamiyo = (
        rate / 1e5 * cost for cost in (found.collector, found.prometheus, found.tamiyo)
    )
    is_local = ranks <= RANKS_PER_NODE
    gateways = max(2, ceil(collector / (GATEWAY_CORES * BUSY)))
    shape = "1, `local.yaml`"
    if not is_local:
        agents = ceil(ranks / RANKS_PER_NODE)
        shape = f"{agents} agents, {gateways} gateways"
    cells = (
        f"{ranks:,}",
        f"{rate:,}",
        f"{sent / 1e6:,.2f} MB/s",
        f"{ranks * POINTS:,}",
        shape,
        f"{collector:.2f}",
        "" if is_local else f"{collector:.2f}",
        f"{prometheus:.2f}",
        f"{tamiyo:.2f}",
        f"{sent * 3600 / 1e9:,.2f} GB",
    )
    return f"| {' | '.join(cells)} |"


def renewed(page: str, figures: Sequence[Figure]) -> str:
    """``page`` with what today's results make between its two marks."""
    return with_section(page, BEGIN, END, section(figures))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.topology", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args(argv)
    figures = msgspec.json.decode(RESULTS.read_bytes(), type=list[Figure])
    fresh = renewed(PAGE.read_text(encoding="utf-8"), figures)
    return bring_up_to_date({PAGE: fresh}, "python -m bench.topology", check=options.check)


if __name__ == "__main__":
    sys.exit(main())
