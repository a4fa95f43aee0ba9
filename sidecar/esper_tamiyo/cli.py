"""The command ``tamiyo``; :mod:`esper_tamiyo.commands` has the modules of its commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from esper_otel.leyline.command_line import CommandParser, add_completion
from esper_otel.leyline.terminal import discard_output, say, take_any_text
from esper_tamiyo import release
from esper_tamiyo.commands import CommandError
from esper_tamiyo.commands.journal import add_explain, add_journal
from esper_tamiyo.commands.replay import add_compare, add_replay
from esper_tamiyo.commands.serve import add_serve
from esper_tamiyo.commands.sidecar import add_ask, add_silence, add_status
from esper_tamiyo.commands.tables import add_check, add_table, add_test

COMMANDS = (
    *(add_serve, add_check, add_ask, add_status, add_replay, add_compare, add_test),
    *(add_explain, add_journal, add_table, add_silence),
)
"""Each adds a command, in the order of the help."""

SCRIPTS = Path(__file__).parent / "commands" / "completions"
"""Where the completion scripts lie, made by ``python -m ops.generate``."""


def command_parser() -> CommandParser:
    """The parser of the whole command line."""
    parser = CommandParser(
        prog="tamiyo",
        description="The sidecar that evaluates training runs and makes decisions.",
        examples=[
            ("tamiyo serve", "answer trainers on this machine, and receive OTLP"),
            ("tamiyo status", "whether the sidecar works, and how the runs are"),
            ("tamiyo explain latest", "why the newest decision was made"),
            ("tamiyo serve --help", "the options of one command, with examples"),
        ],
    )
    parser.add_version(release)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    add_completion(commands, "tamiyo", SCRIPTS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    take_any_text()
    options = command_parser().parse_args(argv)
    try:
        status: int = options.command(options)
    except CommandError as error:
        first, *others = error.lines
        say(f"tamiyo: {first}", *others, file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has seen enough
        discard_output()
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
