"""The command ``tamiyo``; :mod:`esper_tamiyo.commands` has a module for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from esper_otel.leyline.terminal import discard_output, say, take_any_text
from esper_tamiyo.commands import (
    ask,
    check,
    compare,
    explain,
    journal,
    replay,
    serve,
    silence,
    status,
    table,
    test,
)
from esper_tamiyo.commands.common import CommandError

COMMANDS = (
    *(serve, check, ask, status, replay, compare, test, explain, journal),
    *(table, silence),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    take_any_text()
    parser = argparse.ArgumentParser(
        prog="tamiyo",
        description="The sidecar that evaluates training runs and makes decisions.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    options = parser.parse_args(argv)
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
