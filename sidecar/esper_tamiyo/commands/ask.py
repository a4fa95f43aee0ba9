"""``tamiyo ask``: show the newest decision of a run."""

from __future__ import annotations

import argparse

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import say
from esper_otel.leyline.wire import Latest, LatestRequest
from esper_tamiyo.commands.common import (
    CommandError,
    add_socket,
    plain,
    print_json,
    reply,
)


def add(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "ask",
        help="show the newest decision of a run",
        examples=[
            ("tamiyo ask", "of the most recent run"),
            ("tamiyo ask --run mine --rank 3 --json", "of one rank, as JSON"),
        ],
    )
    add_socket(parser)
    parser.add_argument("--run", default="", help="default: the most recently active run")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=_ask)


def _ask(options: argparse.Namespace) -> int:
    answer = reply(LatestRequest(options.run, options.rank), options.socket)
    decision = answer.decision if isinstance(answer, Latest) else None
    if decision is None:
        whose = f"run {options.run}" if options.run else "any run"
        raise CommandError(f"no step of {whose}, rank {options.rank}, has been seen")
    if options.json:
        print_json(plain(decision))
        return 0
    say(f"{decision.action}  {decision.severity}  {decision.reason}")
    say(f"run {decision.run}, step {decision.step}, table {decision.table_version}")
    if decision.conservative:
        say("conservative mode is on")
    for name, value in decision.parameters.items():
        say(f"{name} {value:g}")
    for finding in decision.findings:
        values = ", ".join(f"{key} {value:g}" for key, value in finding.values.items())
        say(f"  {finding.rule}: {finding.text} ({values})")
    return 0
