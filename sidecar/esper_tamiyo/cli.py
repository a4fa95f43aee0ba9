"""The command ``tamiyo``: serve, check a table, ask for a decision, ask how it is doing.

The base of a command-line tool that people type all day must be quick: what a command
does not need it does not import, and the receivers live in their own process.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper_otel.leyline.wire import Latest, LatestRequest, Status, StatusRequest
from esper_otel.leyline.wire import default_socket_path as default_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        status: int = options.command(options)
    except _CommandError as error:
        print(f"tamiyo: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 1
    return status


class _CommandError(Exception):
    """A mistake of the user's, told without a traceback."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tamiyo", description="The sidecar that reads a training run and decides."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="answer trainers and receive OTLP metrics")
    serve.add_argument(
        "--table", default="default", help="default, prototype or a file (default: %(default)s)"
    )
    _add_socket(serve)
    serve.add_argument("--otlp-grpc", default="127.0.0.1:4317", metavar="HOST:PORT")
    serve.add_argument("--otlp-http", default="127.0.0.1:4318", metavar="HOST:PORT")
    serve.add_argument("--no-ingest", action="store_true", help="hear asks only, no OTLP")
    serve.set_defaults(command=_serve)

    check = commands.add_parser("check", help="say what a table does, or what is wrong with it")
    check.add_argument("table", help="default, prototype or a file")
    check.set_defaults(command=_check)

    ask = commands.add_parser("ask", help="show the newest decision of a run")
    _add_socket(ask)
    ask.add_argument("--run", default="", help="default: the run heard of last")
    ask.add_argument("--rank", type=int, default=0)
    ask.add_argument("--json", action="store_true")
    ask.set_defaults(command=_ask)

    status = commands.add_parser("status", help="show how the sidecar is doing")
    _add_socket(status)
    status.add_argument("--json", action="store_true")
    status.set_defaults(command=_status)
    return parser


def _add_socket(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help=f"default: {default_path()}"
    )


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
            raise _CommandError(f"--{name.replace('_', '-')} {text}: {error}") from None
    try:
        table = load(options.table)
    except TableError as error:
        raise _CommandError(f"the table cannot be used\n{error}") from None
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
        raise _CommandError(str(error)) from None
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


def _check(options: argparse.Namespace) -> int:
    from esper_tamiyo.table_file import TableError, load

    try:
        table = load(options.table)
    except TableError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.table}: valid, version {table.version}, {len(table.rules)} rules")
    window, warmup = table.baseline.window, table.baseline.warmup
    print(f"baseline: median of {window} observations, after {warmup}")
    print(f"conservative mode: left after {table.clean_steps} clean steps")
    for action in sorted({rule.action for rule in table.rules}):
        print(f"\n{action.value}")
        for rule in table.rules:
            if rule.action is not action:
                continue
            extras = [
                f"for {rule.persistence}" if rule.persistence > 1 else "",
                f"cooldown {rule.cooldown}" if rule.cooldown else "",
                "on proposals only" if rule.downgrade else "",
                "enters conservative mode" if rule.conservative else "",
                *(f"{name} {value:g}" for name, value in rule.parameters.items()),
            ]
            tail = "".join(f", {extra}" for extra in extras if extra)
            print(f"  {rule.id:24} {rule.severity.value:9} {rule.when}{tail}")
    return 0


def _ask(options: argparse.Namespace) -> int:
    reply = _reply(LatestRequest(options.run, options.rank), options.socket)
    decision = reply.decision if isinstance(reply, Latest) else None
    if decision is None:
        whose = f"run {options.run}" if options.run else "any run"
        raise _CommandError(f"no step of {whose}, rank {options.rank}, has been seen")
    if options.json:
        _print_json(_plain(decision))
        return 0
    print(f"{decision.action}  {decision.severity}  {decision.reason}")
    print(f"run {decision.run}, step {decision.step}, table {decision.table_version}")
    if decision.conservative:
        print("conservative mode is on")
    for name, value in decision.parameters.items():
        print(f"{name} {value:g}")
    for finding in decision.findings:
        values = ", ".join(f"{key} {value:g}" for key, value in finding.values.items())
        print(f"  {finding.rule}: {finding.text} ({values})")
    return 0


def _status(options: argparse.Namespace) -> int:
    reply = _reply(StatusRequest(), options.socket)
    report: dict[str, Any] = reply.report if isinstance(reply, Status) else {}
    if options.json:
        _print_json(report)
        return 0
    age = report["last_frame_age_s"]
    seen = "it has seen no step yet" if age is None else f"newest step {age:.1f} s ago"
    print(f"tamiyo {report['pid']}, up {report['uptime_s']:.0f} s; {seen}")
    for name in ("table", "connections", "answers"):
        print(f"{name}: {_pairs(report[name])}")
    engine = report["engine"]
    print(f"frames: {_pairs(engine['frames'])}")
    print(f"ingest: {_pairs(report['ingest']) if report['ingest'] else 'off'}")
    for run in engine["runs"]:
        mode = ", conservative" if run["conservative"] else ""
        print(
            f"  {run['run']}/{run['rank']}: step {run['newest_step']}, "
            f"{run['action']} ({run['reason']}){mode}"
        )
    return 0


def _reply(request: LatestRequest | StatusRequest, path: Path | None) -> object:
    from esper_tamiyo.asking import SilenceError, reply_to

    try:
        return reply_to(request, path or default_path())
    except SilenceError as error:
        raise _CommandError(str(error)) from None


def _pairs(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in report.items()) or "none"


def _plain(decision: object) -> dict[str, Any]:
    """A struct that travels as an array, as an object with names, for people and jq."""
    import msgspec

    plain: dict[str, Any] = msgspec.structs.asdict(decision)  # type: ignore[arg-type]
    plain["findings"] = [msgspec.structs.asdict(finding) for finding in plain["findings"]]
    return plain


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    sys.exit(main())
