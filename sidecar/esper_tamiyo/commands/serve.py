"""``tamiyo serve``: answer trainers and receive OTLP metrics."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from esper_otel.leyline.wire import default_socket_path as default_path
from esper_tamiyo.commands.common import CommandError, Commands, add_socket


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser("serve", help="answer trainers and receive OTLP metrics")
    parser.add_argument(
        "--table", default="default", help="default, prototype or a file (default: %(default)s)"
    )
    add_socket(parser)
    parser.add_argument("--otlp-grpc", default="127.0.0.1:4317", metavar="HOST:PORT")
    parser.add_argument("--otlp-http", default="127.0.0.1:4318", metavar="HOST:PORT")
    parser.add_argument("--no-ingest", action="store_true", help="hear asks only, no OTLP")
    parser.set_defaults(command=_serve)


def _serve(options: argparse.Namespace) -> int:
    import logging

    from esper_tamiyo.addresses import Address, AddressError
    from esper_tamiyo.engine import Engine
    from esper_tamiyo.ingest_child import IngestChild, IngestError
    from esper_tamiyo.listening import Listener, SocketError
    from esper_tamiyo.server import Server
    from esper_tamiyo.table_file import TableError, load

    logging.basicConfig(format="tamiyo: %(message)s", level=logging.INFO)
    addresses = []
    for name in ("otlp_grpc", "otlp_http"):
        text = getattr(options, name)
        try:
            addresses.append(Address.parse(text))
        except AddressError as error:
            raise CommandError(f"--{name.replace('_', '-')} {text}: {error}") from None
    try:
        table = load(options.table)
    except TableError as error:
        raise CommandError(f"the table cannot be used\n{error}") from None
    ingest = None if options.no_ingest else IngestChild(*addresses)
    try:
        listener = Listener(options.socket or default_path())
        Server(
            Engine(table),
            listener,
            ingest,
            lambda: print(_ready_line(listener.path, ingest, table.version), flush=True),
        ).run()
    except (SocketError, IngestError) as error:
        raise CommandError(str(error)) from None
    return 0


def _ready_line(path: Path, ingest: Any, version: str) -> str:
    """``tamiyo ready`` and words of the form ``name=value``, quoted as a shell would."""
    ready = ingest.ready if ingest is not None else None
    words = {
        "socket": str(path),
        "otlp_grpc": ready.grpc if ready else "off",
        "otlp_http": ready.http if ready else "off",
        "table": version,
    }
    return " ".join(["tamiyo ready", *(shlex.quote(f"{k}={v}") for k, v in words.items())])
