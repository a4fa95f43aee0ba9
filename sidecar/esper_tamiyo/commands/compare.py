"""``tamiyo compare``: where two tables decide differently about a recorded run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from esper_tamiyo.commands.common import CommandError, Commands, table_named
from esper_tamiyo.commands.recorded import add_recording, recorded, told

if TYPE_CHECKING:
    from esper_tamiyo.replaying.compare import Outcome, Stretch

SAME, DIFFERENT, TROUBLE = 0, 1, 2
"""Exit statuses, those of diff."""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "compare", help="show where two tables decide differently about a recorded run"
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
        print(f"tamiyo: {error}", file=sys.stderr)
        return TROUBLE


def _compared(options: argparse.Namespace) -> int:
    from esper_tamiyo.replaying.compare import Comparison

    tables = [table_named(name) for name in (options.a, options.b)]
    recording = recorded(options.recording)
    comparison = Comparison(*tables)
    for stretch in comparison.stretches(recording.steps(options.run)):
        if options.json:
            print(_json(stretch))
        else:
            _print(stretch, options.a, options.b)
    told(recording, options.recording, options.run, comparison.steps)
    if not options.json:
        silences = f", and {comparison.silences:,} silences" if comparison.silences else ""
        print(f"{comparison.differing:,} of {comparison.steps:,} steps differ{silences}")
    return DIFFERENT if comparison.differing or comparison.silences else SAME


def _print(stretch: Stretch, a: str, b: str) -> None:
    first, last = stretch.first_step, stretch.last_step
    where = f"step {first}" if first == last else f"steps {first} to {last}"
    if stretch.silence:
        where = f"silence behind step {first}"
    width = max(len(a), len(b))
    print(f"{stretch.run}/{stretch.rank}  {where}")
    for name, outcome in ((a, stretch.a), (b, stretch.b)):
        print(f"  {name:{width}}  {said(outcome)}")


def said(outcome: Outcome | None) -> str:
    """An outcome for people."""
    if outcome is None:
        return "nothing"
    words = [f"{outcome.action} {outcome.severity} {outcome.reason}"]
    if outcome.seed_operation is not None:
        words.append(str(outcome.seed_operation))
    if outcome.target_seed is not None:
        words.append(f"seed {outcome.target_seed}")
    words += [f"{name} {value:g}" for name, value in outcome.parameters.items()]
    if outcome.conservative:
        words.append("conservative mode")
    return ", ".join(words)


def _json(stretch: Stretch) -> str:
    import msgspec

    return json.dumps(msgspec.to_builtins(stretch))
