"""What ``tamiyo serve`` keeps and tells of its decisions: its options, and what they make."""

from __future__ import annotations

import argparse
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from esper_tamiyo.commands.common import CommandError

if TYPE_CHECKING:
    from esper_tamiyo.journaling.chronicle import Chronicle


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``tamiyo serve`` the options about journal, health and traces."""
    from esper_tamiyo.journaling.journal import MAX_FILE_MB, MAX_FILES

    group = parser.add_argument_group("what is kept and told of it")
    group.add_argument(
        "--journal",
        type=Path,
        metavar="DIR",
        help="where decisions are written down (default: beside a --socket that was "
        "chosen, else in $XDG_STATE_HOME/esper/journal)",
    )
    group.add_argument("--no-journal", action="store_true", help="write nothing down")
    group.add_argument(
        "--journal-file-mb",
        type=_positive,
        default=MAX_FILE_MB,
        metavar="MB",
        help="size at which a new file is begun (default: %(default)g)",
    )
    group.add_argument(
        "--journal-files",
        type=_count,
        default=MAX_FILES,
        metavar="N",
        help="files kept, the oldest go (default: %(default)s)",
    )
    group.add_argument(
        "--health", metavar="HOST:PORT", help="answer GET /livez and /readyz there"
    )
    group.add_argument(
        "--trace-every",
        type=_count,
        default=0,
        metavar="N",
        help="also make a span of the decision about every N-th step that is CONTINUE",
    )


def _positive(text: str) -> float:
    with suppress(ValueError):
        if 0 < (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")


def _count(text: str) -> int:
    with suppress(ValueError):
        if (number := int(text)) > 0:
            return number
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")


def chronicle(options: argparse.Namespace, health: socket.socket | None) -> Chronicle:
    """Keeps the record; without anything to keep or to tell there is no scribe."""
    from esper_tamiyo.journaling.chronicle import Chronicle
    from esper_tamiyo.journaling.journal import default_folder
    from esper_tamiyo.journaling.own_telemetry import endpoint_of
    from esper_tamiyo.journaling.scribe_child import Orders, ScribeChild

    folder = None if options.no_journal else options.journal or default_folder(options.socket)
    orders = Orders(
        journal=None if folder is None else folder.absolute(),
        journal_bytes=int(options.journal_file_mb * 1e6),
        journal_files=options.journal_files,
        health=None if health is None else health.fileno(),
    )
    tells = folder or health or endpoint_of("TRACES") or endpoint_of("METRICS")
    return Chronicle(ScribeChild(orders) if tells else None, options.trace_every)


def health_socket(options: argparse.Namespace) -> socket.socket | None:
    """Where questions after our health are answered, None when nobody is to ask.

    Bound here, so that a mistake ends the start and a scribe that dies keeps the port.
    Raises :class:`CommandError`.
    """
    from esper_tamiyo.receiving.addresses import Address, AddressError

    if options.health is None:
        return None
    try:
        address = Address.parse(options.health)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return socket.create_server((address.host, address.port), family=family)
    except AddressError as error:
        raise CommandError(f"--health {options.health}: {error}") from None
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()  # the error's own text has more
        raise CommandError(f"--health {options.health}: cannot listen: {why}") from None
