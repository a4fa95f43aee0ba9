"""The command ``esper-otel``; :mod:`esper_otel.commands` has the modules of its commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from esper_otel._version import __version__
from esper_otel.commands import run
from esper_otel.commands.recordings import add_export, add_report, add_show
from esper_otel.commands.resend import add_resend
from esper_otel.commands.runs import add_runs
from esper_otel.commands.top import add_top
from esper_otel.leyline.command_line import CommandParser, add_completion
from esper_otel.leyline.terminal import discard_output, take_any_text

COMMANDS = {
    "run": run.add_run,
    "runs": add_runs,
    "top": add_top,
    "report": add_report,
    "show": add_show,
    "export": add_export,
    "resend": add_resend,
}
"""Each adds the command of its name, in the order of the help."""

SCRIPTS = Path(__file__).parent / "commands" / "completions"
"""Where the completion scripts lie, made by ``python -m ops.generate``."""


def command_parser() -> CommandParser:
    """The parser of the whole command line."""
    parser = CommandParser(
        prog="esper-otel",
        description="Records training runs, and shows recorded runs.",
        examples=[
            ("esper-otel run train.py --epochs 10", "train as ever, and record every step"),
            ("esper-otel top", "watch runs while they train"),
            ("esper-otel report recordings/", "one HTML page of recorded runs"),
            ("esper-otel run --help", "the options of one command, with examples"),
        ],
    )
    parser.add_version(lambda: __version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS.values():
        add(commands)
    add_completion(commands, "esper-otel", SCRIPTS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for a mistake in the call)."""
    take_any_text()
    words = list(sys.argv[1:] if arguments is None else arguments)
    pythons: list[str] = []
    parser = command_parser()
    if words[:1] == ["run"]:
        # What Python is given is not argparse's to look at: it would lose a --.
        ours, pythons = run.divided(parser.commands["run"], run.spelled_out(words)[1:])
        words = ["run", *ours]
    options = parser.parse_args(words, argparse.Namespace(python=pythons))
    try:
        status: int = options.command(options)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        discard_output()
        return 0
    except KeyboardInterrupt:
        return 130
    return status
