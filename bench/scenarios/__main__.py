"""Records the scenarios, and scores tables by them.

    python -m bench.scenarios record [--workload W] [--kind K] [--seeds N] [--again]
    python -m bench.scenarios score [TABLE] [--half tuning|held-out] [--misses]

Recording goes on where it was left. ``--kind healthy`` means all healthy kinds, and
``--again`` records anew what was recorded before (on a quieter machine, say).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.scenarios.suite import EXTENTS, HEALTHY, RECORDINGS, RIGHT, Scenario, scenarios


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scenarios")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train what is not recorded yet")
    recording.add_argument("--workload", choices=EXTENTS)
    recording.add_argument("--kind", choices=["healthy", "trouble", *HEALTHY, *RIGHT])
    recording.add_argument("--seeds", type=int, metavar="N", help="only seeds below N")
    recording.add_argument("--again", action="store_true", help="record anew")
    recording.add_argument("--folder", type=Path, default=RECORDINGS)
    scoring = commands.add_parser("score", help="what a table makes of one half")
    scoring.add_argument(
        "table", nargs="?", default="default", help="a file, or a shipped name"
    )
    scoring.add_argument("--half", choices=["tuning", "held-out"], default="tuning")
    scoring.add_argument("--misses", action="store_true", help="also each run that went wrong")
    scoring.add_argument("--workload", choices=EXTENTS)
    options = parser.parse_args(argv)
    return record(options) if options.command == "record" else score(options)


def record(options: argparse.Namespace) -> int:
    # With torch, which scoring does without.
    from bench.scenarios.recorder import record as trained
    from bench.scenarios.recordings import append, forget, known
    from bench.scenarios.suite import path

    folder: Path = options.folder
    wanted = [each for each in scenarios() if _chosen(each, options)]
    if options.again:
        forget(set(wanted), folder)
    there = known(folder)
    wanted = [each for each in wanted if each not in there]
    began = time.perf_counter()
    for nth, scenario in enumerate(wanted, 1):
        ranks = trained(scenario)
        append(path(scenario, folder), ranks)
        took = time.perf_counter() - began
        steps = sum(len(rank.times) for rank in ranks)
        print(f"{nth}/{len(wanted)}  {took:6.0f} s  {scenario.name}  {steps} steps", flush=True)
    return 0


def score(options: argparse.Namespace) -> int:
    from bench.scenarios import scoring
    from esper_tamiyo.language.table_file import load

    table = load(options.table)
    outcomes, took = scoring.timed(table, held_out=options.half == "held-out")
    if options.workload:
        outcomes = [each for each in outcomes if each.scenario.workload == options.workload]
    print(scoring.by_kind(outcomes))
    if options.misses:
        for each in outcomes:
            if each.acted or (each.at is not None and each.answered is None):
                print(each.scenario.name, each.at, each.shown, *each.acted, *each.others)
    told = scoring.score(outcomes)
    print(
        f"\n{options.half} half, {table.version}: answered {told.answered} of {told.troubles} "
        f"({100 * told.recall:.1f} %), median delay {told.delay:g} steps, {told.acted} false "
        f"actions in {told.healthy:,} healthy steps ({told.false_actions:.2f} in "
        f"{scoring.PER_STEPS:,}) in {told.touched} of {told.healthy_runs} healthy runs, "
        f"{told.told} notices; told within {scoring.SOON_TOLD} steps {told.told_soon} of "
        f"{told.showing} that show, harmful ones acted on within {scoring.SOON_ACTED}: "
        f"{told.acted_on_soon} of {told.harmful}; "
        f"{told.frames:,} frames in {took:.0f} s"
    )
    return 0


def _chosen(scenario: Scenario, options: argparse.Namespace) -> bool:
    if options.workload and scenario.workload != options.workload:
        return False
    if options.seeds is not None and scenario.seed >= options.seeds:
        return False
    if options.kind in ("healthy", "trouble"):
        return scenario.troubled is (options.kind == "trouble")
    return options.kind is None or scenario.kind == options.kind


if __name__ == "__main__":
    sys.exit(main())
