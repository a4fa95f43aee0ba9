"""``tamiyo serve``: answer trainers and receive OTLP metrics."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.folders import default_socket_path as default_path
from esper_otel.leyline.terminal import Lines, log_to_stderr, say
from esper_tamiyo.commands import CommandError, add_socket, table_named
from esper_tamiyo.receiving.addresses import Address

if TYPE_CHECKING:
    from esper_tamiyo.journaling.reporter import Reporter
    from esper_tamiyo.keeping.restoring import Restored
    from esper_tamiyo.language.table import Table
    from esper_tamiyo.receiving.credentials import Credentials
    from esper_tamiyo.showing.ui_child import UiChild


def add_serve(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "serve",
        help="answer trainers and receive OTLP metrics",
        examples=[
            ("tamiyo serve", "on this machine, by the default table"),
            ("tamiyo serve --table mine.yaml", "by a table of your own"),
            ("tamiyo serve --ui 127.0.0.1:8321", "with a page of the runs"),
        ],
    )
    parser.add_argument(
        "--table", default="default", help="default, prototype or a file (default: %(default)s)"
    )
    add_socket(parser)
    parser.add_argument(
        "--ingest-mb",
        type=_positive,
        default=192.0,
        metavar="MB",
        help="memory for receiving OTLP (default: %(default)g)",
    )
    parser.add_argument("--otlp-grpc", default="127.0.0.1:4317", metavar="HOST:PORT")
    parser.add_argument("--otlp-http", default="127.0.0.1:4318", metavar="HOST:PORT")
    parser.add_argument("--no-ingest", action="store_true", help="disable OTLP ingestion")
    parser.add_argument(
        "--state-mb",
        type=_positive,
        default=192.0,
        metavar="MB",
        help="memory for the data of all runs (default: %(default)g)",
    )
    _add_senders(parser)
    _add_page(parser)
    _add_record(parser)
    parser.set_defaults(command=_serve)


def _add_senders(parser: argparse.ArgumentParser) -> None:
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


def _add_page(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a page to look at",
        "The options above also control access to the page.",
    )
    group.add_argument(
        "--ui",
        metavar="HOST:PORT",
        help="serve a page of the runs there, live, and /metrics for Prometheus",
    )


def _add_record(parser: argparse.ArgumentParser) -> None:
    """The options about journal, health and traces."""
    from esper_tamiyo.journaling.journal import MAX_FILE_MB, MAX_FILES

    group = parser.add_argument_group("journal and self-telemetry")
    group.add_argument(
        "--journal",
        type=Path,
        metavar="DIR",
        help="where the journal is written (default: beside a chosen socket, else in "
        "$XDG_STATE_HOME/esper/journal)",
    )
    group.add_argument("--no-journal", action="store_true", help="write nothing down")
    group.add_argument(
        "--journal-file-mb",
        type=_positive,
        default=MAX_FILE_MB,
        metavar="MB",
        help="size at which a new file begins (default: %(default)g)",
    )
    group.add_argument(
        "--journal-files",
        type=_count,
        default=MAX_FILES,
        metavar="N",
        help="number of files; the oldest are deleted (default: %(default)s)",
    )
    group.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="where state is saved for a restart (default: beside the journal)",
    )
    group.add_argument("--no-state", action="store_true", help="save no state")
    group.add_argument(
        "--health", metavar="HOST:PORT", help="answer GET /livez and /readyz there"
    )
    group.add_argument(
        "--trace-every",
        type=_count,
        default=0,
        metavar="N",
        help="also trace every Nth CONTINUE decision",
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


def _serve(options: argparse.Namespace) -> int:
    import logging

    from esper_tamiyo.keeping.state_keeper import StateKeeper
    from esper_tamiyo.language.table_file import shipped_tables
    from esper_tamiyo.receiving.addresses import AddressError
    from esper_tamiyo.receiving.credentials import Credentials, CredentialsError
    from esper_tamiyo.receiving.ingest_child import IngestChild, IngestError
    from esper_tamiyo.serving.listening import DecisionSocket, SocketError
    from esper_tamiyo.serving.recent_steps import RecentSteps
    from esper_tamiyo.serving.reloading import Reloading
    from esper_tamiyo.serving.server import Server

    log_to_stderr(logging.INFO)
    credentials = Credentials(
        options.tls_cert, options.tls_key, options.tls_client_ca, options.token_file
    )
    try:
        credentials.validate()
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
    state = _state_folder(options)
    page, pulse = _page(options, credentials, state)
    table, table_error = _table(options.table, state)
    ingest = None if options.no_ingest else IngestChild(addresses[0], addresses[1], credentials)
    if ingest is not None:
        ingest.memory_mb = options.ingest_mb
    health = _health_socket(options)
    reporter = _reporter(options, health, pulse)
    try:
        listener = DecisionSocket(options.socket or default_path())
        recent = RecentSteps(reporter.decision_log)
        keeper = StateKeeper(state, options.table, recent)
        engine = keeper.open(table, int(options.state_mb * (1 << 20)))
        if state is not None and (keeper.restored.found or table_error):
            _tell_restored(reporter, keeper.restored, state, table_error)
        watched = options.table not in shipped_tables()
        Server(
            engine,
            listener,
            ingest,
            reporter,
            Reloading(engine, options.table, watched=watched, last_error=table_error),
            keeper,
            recent,
            lambda: say(
                _ready_line(listener.path, ingest, table.version, health, page), flush=True
            ),
            page,
        ).run()
    except (SocketError, IngestError) as error:
        raise CommandError(str(error)) from None
    return 0


def _table(name: str, state: Path | None) -> tuple[Table, str]:
    """The table to decide by, and why its file cannot be used if it is the last good one.

    Raises :class:`CommandError` where there is no such table.
    """
    import logging

    from esper_tamiyo.keeping.restoring import last_table

    try:
        return table_named(name), ""
    except CommandError as error:
        last = None if state is None else last_table(state, name)
        if last is None:
            raise
        told = "\n".join(error.lines)
        logging.getLogger("tamiyo").warning(
            "%s\nthe last good one, %s, stays until the file is fixed",
            Lines(told),
            last.version,
        )
        return last, told.partition("\n")[2]


def _tell_restored(
    reporter: Reporter, restored: Restored, folder: Path, table_error: str
) -> None:
    """Have the journal say what is known from before the start."""
    import time

    import msgspec

    from esper_tamiyo.journaling.entries import StateRestored

    told = msgspec.structs.asdict(restored)
    reporter.decision_log.on_restored(
        StateRestored(
            time_unix_nano=time.time_ns(), folder=str(folder), table_error=table_error, **told
        )
    )


def _state_folder(options: argparse.Namespace) -> Path | None:
    """Where state is kept; None for nowhere."""
    from esper_tamiyo.journaling.journal import default_folder

    if options.no_state:
        return None
    if options.state is not None:
        folder: Path = options.state.absolute()
        return folder
    journal: Path = options.journal or default_folder(options.socket)
    return journal.with_suffix(".state").absolute()


def _ready_line(
    path: Path,
    ingest: Any,
    version: str,
    health: socket.socket | None,
    page: UiChild | None,
) -> str:
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
    if page is not None:
        words["ui"] = page.address
    return " ".join(["tamiyo ready", *(shlex.quote(f"{k}={v}") for k, v in words.items())])


def _reporter(
    options: argparse.Namespace, health: socket.socket | None, pulse: socket.socket | None
) -> Reporter:
    """Keeps the record; without anything to keep or to tell there is no writer."""
    from esper_tamiyo.journaling.journal import default_folder
    from esper_tamiyo.journaling.journal_writer_child import JournalWriterChild, Orders
    from esper_tamiyo.journaling.own_telemetry import endpoint_of
    from esper_tamiyo.journaling.reporter import Reporter

    folder = None if options.no_journal else options.journal or default_folder(options.socket)
    orders = Orders(
        journal=None if folder is None else folder.absolute(),
        journal_bytes=int(options.journal_file_mb * 1e6),
        journal_files=options.journal_files,
        health=None if health is None else health.fileno(),
        pulse=None if pulse is None else pulse.fileno(),
    )
    tells = folder or health or pulse or endpoint_of("TRACES") or endpoint_of("METRICS")
    writer = JournalWriterChild(orders) if tells else None
    return Reporter(writer, options.trace_every, options.table)


def _page(
    options: argparse.Namespace, credentials: Credentials, state: Path | None
) -> tuple[UiChild | None, socket.socket | None]:
    """The page's process, and the end of a pipe for what the journal writer hands on to it.

    Raises :class:`CommandError`.
    """
    import logging

    from esper_tamiyo.journaling.journal import default_folder
    from esper_tamiyo.receiving.credentials import CredentialsError
    from esper_tamiyo.showing.ui_child import PULSE_BYTES, UiChild, UiOrders

    if options.ui is None:
        return None, None
    if options.no_journal or state is None:
        raise CommandError(
            f"--ui {options.ui}: needs the journal and the state; expected neither "
            "--no-journal nor --no-state"
        )
    address = _address("--ui", options.ui)
    try:
        warning = credentials.exposure(
            address, options.insecure, "sees the page sees all runs", "see all runs"
        )
    except CredentialsError as error:
        raise CommandError(f"--ui {options.ui}: {error}") from None
    if warning:
        logging.getLogger("tamiyo").warning("--ui %s: %s", options.ui, warning)
    listening = _listening("--ui", options.ui)
    address = Address(*listening.getsockname()[:2])
    told, heard = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PULSE_BYTES)
    orders = UiOrders(
        listening=listening.fileno(),
        pulse=heard.detach(),  # each process that is started gets it
        state=state,
        journal=(options.journal or default_folder(options.socket)).absolute(),
        credentials=credentials,
    )
    scheme = "https" if credentials.tls_cert else "http"
    return UiChild(listening, orders, f"{scheme}://{address}/"), told


def _health_socket(options: argparse.Namespace) -> socket.socket | None:
    """Where questions after our health are answered, None when nobody is to ask.

    Bound here, so that a mistake ends the start and a journal writer that dies keeps the port.
    Raises :class:`CommandError`.
    """
    return None if options.health is None else _listening("--health", options.health)


def _listening(option: str, told: str) -> socket.socket:
    """A socket that listens there; raises :class:`CommandError`."""
    address = _address(option, told)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()  # the error's own text has more
        raise CommandError(f"{option} {told}: cannot listen: {why}") from None


def _address(option: str, told: str) -> Address:
    """The address in an option; raises :class:`CommandError`."""
    from esper_tamiyo.receiving.addresses import AddressError

    try:
        return Address.parse(told)
    except AddressError as error:
        raise CommandError(f"{option} {told}: {error}") from None
