"""``tamiyo explain``: a decision or notice in words: reason, outcome, remedy."""

from __future__ import annotations

import argparse

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import say
from esper_tamiyo.commands.common import CommandError, print_json
from esper_tamiyo.commands.journal import add_folder, entries_of


def add(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "explain",
        help="explain a decision or a notice",
        examples=[
            ("tamiyo explain latest", "the newest"),
            ("tamiyo explain mine 441", "of a run and a step"),
            ("tamiyo explain mine/0/441 --json", "by its id, as JSON"),
        ],
    )
    parser.add_argument(
        "decision", metavar="DECISION", help="its id, RUN/RANK/STEP, or latest; or a RUN, with"
    )
    parser.add_argument("step", nargs="?", type=int, metavar="STEP", help="a step of RUN")
    parser.add_argument("--rank", type=int, default=0, help="rank of STEP")
    parser.add_argument("--run", default="", help="run of the latest decision")
    add_folder(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=_explain)


def _explain(options: argparse.Namespace) -> int:
    from esper_tamiyo.journaling.explain import format_story, plain
    from esper_tamiyo.journaling.stories import UnknownDecisionError, find_decision

    wanted = options.decision
    if options.step is not None:
        wanted = f"{wanted}/{options.rank}/{options.step}"
    try:
        story = find_decision(entries_of(options), wanted, options.run)
    except UnknownDecisionError as error:
        raise CommandError(str(error)) from None
    if options.json:
        print_json(plain(story))
    else:
        say(*format_story(story))
    return 0
