"""Runs the benches and keeps their last results: ``python -m bench [NAME ...]``.

Each runs in a process of its own. Their rows go to ``bench/results.json``, and from all
rows there ``bench/RESULTS.md`` is made. Exits 0 whether or not bars hold; those that do
not are printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from bench.figures import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE / "RESULTS.md"
BENCHES = (
    "telemetry_cost",
    "encoding",
    "roundtrip",
    "training",
    "outage",
    "killed_trainers",
    "sidecar_faults",
    "killed_sidecar",
    "floods",
    "answers_under_load",
    "reading",
    "ingest",
    "reloading",
    "restarts",
    "isolation",
    "growth",
    "asking",
    "rescued",
    "poisoned",
    "enforced",
    "snapshots",
    "judging",
    "scaling",
    "journal",
    "replay",
    "report",
    "top",
    "judgement",
    "left_out",
    "awkward",
    "environments",
    "peers",
    "ranks_agree",
    "imports",
    "collector",
    "sizing",
    "soak",
)


def measured(bench: str) -> list[Figure] | None:
    """Run one bench; None when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        print(f"\n{bench}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{bench}", "--json", str(rows)],
            cwd=HERE.parent,
            env=os.environ | {"ESPER_SUMMARY": "off"},  # a bench tells its figures
        )
        if done.returncode or not rows.exists():
            print(f"{bench}: failed with {done.returncode}", file=sys.stderr)
            return None
        return msgspec.json.decode(rows.read_bytes(), type=list[Figure])


def machine() -> str:
    """What the figures were measured on."""
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    cores = len(os.sched_getaffinity(0))
    return (
        f"{model}, {cores} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}, shared with others"
    )


def page(figures: list[Figure]) -> str:
    """The results for people."""
    lines = [
        "<!-- Made by python -m bench; edits here are lost. -->",
        "",
        "# Results",
        "",
        f"Last run {time.strftime('%Y-%m-%d')} on: {machine()}.",
        "",
        "Every baseline is measured in the same run as the value beside it, in blocks that "
        "alternate. The ratio is value over baseline; a bar bounds the ratio, or the value "
        "where there is no baseline.",
    ]
    for bench in BENCHES:
        rows = [figure for figure in figures if figure.bench == bench]
        if not rows:
            continue
        lines += [
            "",
            f"## {bench}",
            "",
            "| figure | value | baseline | ratio | bar | |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
        ]
        for row in rows:
            cells = (
                row.figure,
                f"{row.value:,.4g} {row.unit}",
                "" if row.baseline is None else f"{row.baseline:,.4g} {row.unit}",
                "" if row.ratio is None else f"{row.ratio:.3g}",
                "" if row.bar is None else f"≤ {row.bar:.3g}",
                {True: "holds", False: "**does not hold**", None: ""}[row.holds],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bench", nargs="*", choices=[*BENCHES, []], metavar="NAME")
    chosen = parser.parse_args().bench or BENCHES
    kept: list[Figure] = []
    if RESULTS.exists():
        kept = msgspec.json.decode(RESULTS.read_bytes(), type=list[Figure])
    fresh: list[Figure] = []
    for bench in chosen:
        figures = measured(bench)
        if figures is not None:
            kept = [figure for figure in kept if figure.bench != bench] + figures
            fresh += figures
    kept.sort(key=lambda figure: BENCHES.index(figure.bench))
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
    PAGE.write_text(page(kept))
    print(f"\nwritten: {RESULTS.name} and {PAGE.name}")
    for figure in fresh:
        if figure.holds is False:
            shown = figure.value if figure.ratio is None else figure.ratio
            print(f"does not hold: {figure.bench}: {figure.figure}: {shown:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
