"""``tamiyo compare``: where two tables decide differently about a recorded run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import say, say_json
from esper_tamiyo.commands.common import (
    CommandError,
    add_recording,
    check_recorded,
    recorded,
    table_named,
)

if TYPE_CHECKING:
    from esper_tamiyo.replaying.compare import DecisionEffect, Difference

SAME, DIFFERENT, TROUBLE = 0, 1, 2
"""Exit statuses, those of diff."""


def add(commands: Subcommands) -> None:
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
    from esper_tamiyo.replaying.compare import Comparison

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
