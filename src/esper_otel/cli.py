"""The command ``esper-otel``; what each command does is in :mod:`esper_otel.commands`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from esper_otel._version import __version__
from esper_otel.commands import export, report, resend, run, runs, show, top

COMMANDS = {
    command.__name__.rpartition(".")[2]: command
    for command in (run, runs, top, report, show, export, resend)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for a mistake in the call)."""
    parser = argparse.ArgumentParser(
        prog="esper-otel", description="Records training runs, and shows what was recorded."
    )
    parser.add_argument("--version", action="version", version=f"esper-otel {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add(commands)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(run.spelled_out(given) if given[:1] == ["run"] else given)
    try:
        status: int = options.command(options)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return status
