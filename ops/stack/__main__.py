"""``python -m ops.stack``: the stack on this machine, without containers."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from esper_otel.leyline.folders import default_socket_path
from ops.stack import configuration, services, traces_page
from ops.stack.ports import free, is_free
from ops.stack.processes import Process, StartError
from ops.stack.programs import COLLECTOR, DEPLOYED, PROGRAMS, MissingError, find, obtain
from ops.stack.services import Ports
from ops.stack.whole import Stack


class MistakeError(Exception):
    """Something the user can put right, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except (MistakeError, MissingError, StartError) as error:
        print(f"stack: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ops.stack", description=__doc__)
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="get the missing binaries")
    build.add_argument("program", nargs="*", choices=[*PROGRAMS, []], help="default: all")
    build.add_argument(
        "--if-possible",
        action="store_true",
        help="report unavailable programs, and exit with 0",
    )
    build.set_defaults(command=_build)
    deployed = commands.add_parser(
        "as-deployed",
        help="run a command against the deployed versions, building them if missing",
    )
    deployed.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND …")
    deployed.set_defaults(command=_as_deployed)
    check = commands.add_parser("check", help="validate Collector configurations")
    check.add_argument("config", nargs="+", type=Path, help="later files override earlier ones")
    check.set_defaults(command=_check)
    up = commands.add_parser("up", help="run the stack until Ctrl-C")
    up.add_argument("--port", action="append", default=[], metavar="NAME=NUMBER")
    up.add_argument("--state", type=Path, default=_state(), help="default: %(default)s")
    up.add_argument("--socket", type=Path, default=default_socket_path(), help="Tamiyo's")
    up.add_argument("--collector-config", type=Path, default=services.CONFIG)
    up.set_defaults(command=_up)
    return parser


def _build(options: argparse.Namespace) -> int:
    missing = 0
    for name in options.program or PROGRAMS:
        try:
            print(f"{name}: {obtain(PROGRAMS[name])}", flush=True)
        except MissingError as error:
            missing += 1
            print(f"stack: {error}", file=sys.stderr, flush=True)
    return 0 if options.if_possible else min(missing, 1)


def _as_deployed(options: argparse.Namespace) -> int:
    if not options.argv:
        raise MistakeError("as-deployed: expected a command")
    found = {variable: str(obtain(program)) for variable, program in DEPLOYED.items()}
    return subprocess.call(options.argv, env=os.environ | found)


def _check(options: argparse.Namespace) -> int:
    complaint = configuration.complaint(find(COLLECTOR), options.config, dict(os.environ))
    if complaint is not None:
        raise MistakeError(complaint)
    print("valid")
    return 0


def _up(options: argparse.Namespace) -> int:
    ports = _ports(options.port)
    state: Path = options.state
    config: Path = options.collector_config
    stack = Stack(ports, state, options.socket, config)
    for name, port in msgspec.structs.asdict(ports).items():
        if not is_free(port):
            (other,) = free(1)
            raise MistakeError(
                f"port {port} ({name}) is taken: end its listener, or choose another, "
                f"such as make stack PORTS={name}={other}"
            )
    complaint = configuration.complaint(
        find(COLLECTOR),
        [config],
        services.clean_environment(services.collector_environment(ports, state)),
    )
    if complaint is not None:
        raise MistakeError(complaint)
    asked_to_end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked_to_end.set())
    stack.start()
    try:
        print(_summary(stack), flush=True)
        _watch(list(stack.parts.values()), asked_to_end)
    finally:
        stack.stop()
    print("all parts have ended")
    return 0


def _watch(running: list[Process], asked_to_end: threading.Event) -> None:
    """Wait for the end, and say once of each part that it ended before."""
    while not asked_to_end.wait(0.5):
        for part in running[:]:
            if part.exit_status is not None:
                running.remove(part)
                print(
                    f"stack: {part.service.name} ended with {part.exit_status}: "
                    f"{part.last_words()}",
                    file=sys.stderr,
                    flush=True,
                )


def _ports(given: Sequence[str]) -> Ports:
    chosen: dict[str, int] = {}
    for text in (word for words in given for word in words.split()):
        name, _, number = text.partition("=")
        if name not in Ports.__struct_fields__:
            names = ", ".join(Ports.__struct_fields__)
            raise MistakeError(f"--port {text}: expected one of {names}")
        if not number.isdecimal() or not 0 < int(number) < 65536:
            raise MistakeError(f"--port {text}: expected {name}= and a number up to 65535")
        chosen[name] = int(number)
    return Ports(**chosen)


def _summary(stack: Stack) -> str:
    """Where to send to and what to look at; what has no page is no address to open."""
    ports, pages = stack.ports, stack.pages()
    lines = [
        ("send OTLP to", f"{stack.url} (gRPC: {ports.otlp_grpc})"),
        *pages.items(),
        ("Tamiyo", str(stack.socket)),
        ("Collector", f"http://127.0.0.1:{ports.collector_health} (its health)"),
        ("state, logs", str(stack.state)),
    ]
    apis = {"Prometheus": ports.prometheus, "Jaeger": ports.jaeger}
    lines += [
        (name, f"no page in this build; its API is on port {port}")
        for name, port in apis.items()
        if name not in pages
    ]
    if "traces" not in stack.parts and "Jaeger" not in pages:
        wanted = " and ".join(traces_page.missing())
        lines.append(("traces", f"no page: {wanted} not installed (esper-otel[dev])"))
    width = max(len(name) for name, _ in lines)
    shown = "\n".join(f"  {name:{width}}  {value}" for name, value in lines)
    return f"The stack is up; Ctrl-C ends it.\n\n{shown}\n"


def _state() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "esper" / "stack"


if __name__ == "__main__":
    sys.exit(main())
