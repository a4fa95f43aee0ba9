"""Recorded runs: ``tamiyo replay`` shows a table's decisions, ``compare`` those of two."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import say, say_json
from esper_tamiyo.commands import (
    CommandError,
    add_recording,
    check_recorded,
    plain,
    recorded,
    table_named,
)

if TYPE_CHECKING:
    from esper_tamiyo.replaying.replay import (
        DecisionEffect,
        Difference,
        Judged,
        ReplaySummary,
    )


def add_replay(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "replay",
        help="show a table's decisions about a recorded run",
        examples=[
            ("tamiyo replay recordings/", "by the default table"),
            ("tamiyo replay recordings/ --table mine.yaml --json", "by your own, as JSON"),
        ],
    )
    add_recording(parser)
    parser.add_argument(
        "--table", default="default", help="default, prototype or a file (default: %(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="also show nominal decisions")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(command=_replay)


def _replay(options: argparse.Namespace) -> int:
    from esper_tamiyo.replaying.replay import ReplaySummary, replay

    table = table_named(options.table)
    recording = recorded(options.recording)
    summary = ReplaySummary()
    start = time.perf_counter()
    for judged in replay(recording.steps(options.run), table):
        summary.add(judged)
        if options.all or not judged.is_nominal:
            if options.json:
                say_json(json.dumps(_object(judged)))
            else:
                say(format_decision(judged))
    took_s = time.perf_counter() - start
    check_recorded(recording, options.recording, options.run, summary.steps)
    print_summary = _print_json_summary if options.json else _print_summary
    print_summary(summary, table.version, took_s)
    return 0


def format_decision(judged: Judged) -> str:
    """A decision for people: which, what, and the values behind it."""
    decision = judged.decision
    words = [f"{decision.id}  {decision.action:9} {decision.severity:8} {decision.reason}"]
    if not judged.is_step:
        words.append("silence behind this step")
    if decision.seed_operation is not None:
        words.append(f"{decision.seed_operation} {decision.target_seed}")
    elif decision.target_seed is not None:
        words.append(decision.target_seed)
    words += [f"{name} {value:g}" for name, value in decision.parameters.items()]
    if decision.conservative:
        words.append("conservative mode")
    head = ", ".join(words)
    for finding in decision.findings:
        if finding.rule == decision.reason and finding.seed_id == decision.target_seed:
            values = ", ".join(f"{key} {value:.6g}" for key, value in finding.values.items())
            return f"{head}  ({values})"
    return head


def _object(judged: Judged) -> dict[str, Any]:
    frame = judged.frame
    also = {
        "rank": frame.rank,
        "time_unix_nano": frame.time_unix_nano,
        "silence": not judged.is_step,
    }
    return {**plain(judged.decision), **also}


def _print_summary(summary: ReplaySummary, version: str, took_s: float) -> None:
    ranks = len(summary.ranks)
    say(
        f"{summary.steps:,} steps of {ranks} rank{'s' * (ranks != 1)}, "
        f"{summary.recorded_s:,.1f} s recorded, by table {version}"
    )
    for (action, reason), count in summary.decided.most_common():
        say(f"  {count:10,}  {action:9} {reason}")
    pace = f", {summary.recorded_s / took_s:,.0f} times its own pace" if took_s else ""
    say(f"replayed in {took_s:,.2f} s: {summary.steps / took_s:,.0f} steps/s{pace}")


def _print_json_summary(summary: ReplaySummary, version: str, took_s: float) -> None:
    decided = [
        {"action": action, "reason": reason, "steps": count}
        for (action, reason), count in summary.decided.most_common()
    ]
    content = {
        "table_version": version,
        "steps": summary.steps,
        "ranks": [{"run": run, "rank": rank} for run, rank in sorted(summary.ranks)],
        "recorded_s": summary.recorded_s,
        "replayed_s": took_s,
        "decided": decided,
    }
    say_json(json.dumps({"summary": content}))


SAME, DIFFERENT, TROUBLE = 0, 1, 2
"""Exit statuses, those of diff."""


def add_compare(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "compare",
        help="show where two tables decide differently about a recorded run",
        examples=[
            ("tamiyo compare recordings/ default mine.yaml", "the default table and your own"),
        ],
    )
    add_recording(parser)
    parser.add_argument("a", metavar="A", help="default, prototype or a file")
    parser.add_argument("b", metavar="B", help="the table to compare it with")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    try:
        return _compared(options)
    except CommandError as error:
        first, *others = error.lines
        say(f"tamiyo: {first}", *others, file=sys.stderr)
        return TROUBLE


def _compared(options: argparse.Namespace) -> int:
    from esper_tamiyo.replaying.replay import Comparison

    tables = [table_named(name) for name in (options.a, options.b)]
    recording = recorded(options.recording)
    comparison = Comparison(*tables)
    for difference in comparison.differences(recording.steps(options.run)):
        if options.json:
            say_json(_json(difference))
        else:
            _print(difference, options.a, options.b)
    check_recorded(recording, options.recording, options.run, comparison.steps)
    if not options.json:
        silences = f", and {comparison.silences:,} silences" if comparison.silences else ""
        say(f"{comparison.differing:,} of {comparison.steps:,} steps differ{silences}")
    return DIFFERENT if comparison.differing or comparison.silences else SAME


def _print(difference: Difference, a: str, b: str) -> None:
    first, last = difference.first_step, difference.last_step
    where = f"step {first}" if first == last else f"steps {first} to {last}"
    if difference.silence:
        where = f"silence behind step {first}"
    width = max(len(a), len(b))
    say(f"{difference.run}/{difference.rank}  {where}")
    for name, effect in ((a, difference.a), (b, difference.b)):
        say(f"  {name:{width}}  {format_effect(effect)}")


def format_effect(effect: DecisionEffect | None) -> str:
    """What a decision does, for people."""
    if effect is None:
        return "nothing"
    words = [f"{effect.action} {effect.severity} {effect.reason}"]
    if effect.seed_operation is not None:
        words.append(str(effect.seed_operation))
    if effect.target_seed is not None:
        words.append(f"seed {effect.target_seed}")
    words += [f"{name} {value:g}" for name, value in effect.parameters.items()]
    if effect.conservative:
        words.append("conservative mode")
    return ", ".join(words)


def _json(difference: Difference) -> str:
    import msgspec

    return json.dumps(msgspec.to_builtins(difference))
