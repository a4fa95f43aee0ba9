"""``tamiyo journal``: show journal entries, and follow new ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.leyline.terminal import printable, say, say_json
from esper_tamiyo.commands.common import CommandError, Commands, add_socket

if TYPE_CHECKING:
    from esper_tamiyo.journaling.entries import AnyEntry


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser("journal", help="show decisions and other journal entries")
    parser.add_argument("--run", default="", help="only entries about this run")
    parser.add_argument("--follow", action="store_true", help="follow new entries")
    parser.add_argument("--json", action="store_true", help="raw JSON lines")
    add_folder(parser)
    parser.set_defaults(command=_journal)


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that say which journal."""
    add_socket(parser)
    parser.add_argument(
        "--journal", type=Path, metavar="DIR", help="default: that of the sidecar at --socket"
    )


def entries_of(options: argparse.Namespace, *, follow: bool = False) -> Iterator[AnyEntry]:
    """The entries of the journal; damaged lines are told of and left out."""
    from esper_tamiyo.journaling import journal

    folder: Path = options.journal or journal.default_folder(options.socket)
    read = journal.follow if follow else journal.read
    try:
        for entry in read(folder):
            if isinstance(entry, journal.Damage):
                say(f"tamiyo: {entry}", file=sys.stderr)
            else:
                yield entry
    except FileNotFoundError:
        raise CommandError(f"{folder}: there is no journal; --journal names another") from None
    except OSError as error:
        raise CommandError(f"{folder}: {(error.strerror or str(error)).lower()}") from None


def _journal(options: argparse.Namespace) -> int:
    from esper_tamiyo.journaling.journal import encode_entry
    from esper_tamiyo.journaling.lines import format_entry

    run = printable(
        options.run
    )  # compared as runs are shown, so that what was printed is found
    try:
        for entry in entries_of(options, follow=options.follow):
            if run and printable(getattr(entry, "run", "")) != run:
                continue
            if options.json:
                say_json(encode_entry(entry).decode().rstrip(), flush=options.follow)
            else:
                say(format_entry(entry), flush=options.follow)
    except KeyboardInterrupt:  # how one ends --follow
        return 130
    return 0
