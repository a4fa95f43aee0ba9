"""``tamiyo silence``: have a rule neither act nor be reported for one run, while it runs.

Exits with 1 when there is no such run or rule, which is said with what there is.
"""

from __future__ import annotations

import argparse

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import say
from esper_otel.leyline.wire import SilenceReply, SilenceRequest
from esper_tamiyo.commands.common import CommandError, add_socket, reply


def add(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "silence",
        help="suppress a rule for one run while it trains",
        examples=[
            ("tamiyo silence mine loss_spike", "until the run ends"),
            ("tamiyo silence mine loss_spike --steps 500", "for a while"),
            ("tamiyo silence mine loss_spike --undo", "no longer"),
        ],
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("rule", metavar="RULE", help="id of the rule")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--steps", type=_count, metavar="N", help="for the next N steps")
    how_long.add_argument(
        "--until-end", action="store_true", help="until the run ends (the default)"
    )
    how_long.add_argument("--undo", action="store_true", help="end the silence")
    add_socket(parser)
    parser.set_defaults(command=_silence)


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number > 0:
        return number
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")


def _silence(options: argparse.Namespace) -> int:
    request = SilenceRequest(options.run, options.rule, options.steps, options.undo)
    answer = reply(request, options.socket)
    if not isinstance(answer, SilenceReply):  # a sidecar of before there were silences
        raise CommandError(getattr(answer, "message", "the sidecar did not understand it"))
    if answer.error:
        raise CommandError(answer.error)
    say(f"run {options.run}: {options.rule} {answer.told}")
    return 0
