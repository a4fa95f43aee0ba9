"""``tamiyo serve``: answer trainers and receive OTLP metrics."""

from __future__ import annotations

import argparse
import shlex
import socket
from pathlib import Path
from typing import Any

from esper_otel.leyline.wire import default_socket_path as default_path
from esper_tamiyo.commands import keeping
from esper_tamiyo.commands.common import CommandError, Commands, add_socket, table_named
from esper_tamiyo.receiving.addresses import Address


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
    _add_strangers(parser)
    keeping.add_options(parser)
    parser.set_defaults(command=_serve)


def _add_strangers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "who may send OTLP",
        "An address that other machines reach needs TLS, a token or --insecure.",
    )
    group.add_argument("--tls-cert", default="", metavar="FILE", help="PEM certificate chain")
    group.add_argument("--tls-key", default="", metavar="FILE", help="its PEM private key")
    group.add_argument(
        "--tls-client-ca",
        default="",
        metavar="FILE",
        help="senders need a certificate of it",
    )
    group.add_argument(
        "--token-file", default="", metavar="FILE", help="senders need this bearer token"
    )
    group.add_argument("--insecure", action="store_true", help="anybody may send")


def _serve(options: argparse.Namespace) -> int:
    import logging

    from esper_tamiyo.judging.engine import Engine
    from esper_tamiyo.language.table_file import shipped_tables
    from esper_tamiyo.receiving.addresses import AddressError
    from esper_tamiyo.receiving.credentials import Credentials, CredentialsError
    from esper_tamiyo.receiving.ingest_child import IngestChild, IngestError
    from esper_tamiyo.serving.listening import Listener, SocketError
    from esper_tamiyo.serving.reloading import Reloading
    from esper_tamiyo.serving.server import Server

    logging.basicConfig(format="tamiyo: %(message)s", level=logging.INFO)
    credentials = Credentials(
        options.tls_cert, options.tls_key, options.tls_client_ca, options.token_file
    )
    try:
        credentials.check()
    except CredentialsError as error:
        raise CommandError(str(error)) from None
    addresses = []
    for name in ("otlp_grpc", "otlp_http"):
        shown = f"--{name.replace('_', '-')} {getattr(options, name)}"
        try:
            address = Address.parse(getattr(options, name))
            warning = credentials.exposure(address, options.insecure)
        except (AddressError, CredentialsError) as error:
            raise CommandError(f"{shown}: {error}") from None
        if warning and not options.no_ingest:
            logging.getLogger("tamiyo").warning("%s: %s", shown, warning)
        addresses.append(address)
    table = table_named(options.table)
    ingest = None if options.no_ingest else IngestChild(addresses[0], addresses[1], credentials)
    health = keeping.health_socket(options)
    chronicle = keeping.chronicle(options, health)
    try:
        listener = Listener(options.socket or default_path())
        engine = Engine(table, witness=chronicle.notebook)
        Server(
            engine,
            listener,
            ingest,
            chronicle,
            Reloading(engine, options.table, watched=options.table not in shipped_tables()),
            lambda: print(
                _ready_line(listener.path, ingest, table.version, health), flush=True
            ),
        ).run()
    except (SocketError, IngestError) as error:
        raise CommandError(str(error)) from None
    return 0


def _ready_line(path: Path, ingest: Any, version: str, health: socket.socket | None) -> str:
    """``tamiyo ready`` and words of the form ``name=value``, quoted as a shell would."""
    ready = ingest.ready if ingest is not None else None
    words = {
        "socket": str(path),
        "otlp_grpc": ready.grpc if ready else "off",
        "otlp_http": ready.http if ready else "off",
        "table": version,
    }
    if health is not None:
        host, port = health.getsockname()[:2]
        words["health"] = str(Address(host, port))
    return " ".join(["tamiyo ready", *(shlex.quote(f"{k}={v}") for k, v in words.items())])
