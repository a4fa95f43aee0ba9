"""``tamiyo explain``: tell in words why something was decided, and what came of it."""

from __future__ import annotations

import argparse

from esper_tamiyo.commands.common import CommandError, Commands, print_json
from esper_tamiyo.commands.journal import add_folder, entries_of


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser("explain", help="tell why something was decided")
    parser.add_argument("decision", metavar="DECISION", help="its id, RUN/RANK/STEP, or latest")
    parser.add_argument("--run", default="", help="of which run the latest is meant")
    add_folder(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=_explain)


def _explain(options: argparse.Namespace) -> int:
    from esper_tamiyo.journaling.explain import (
        UnknownDecisionError,
        find_decision,
        format_story,
        plain,
    )

    try:
        story = find_decision(entries_of(options), options.decision, options.run)
    except UnknownDecisionError as error:
        raise CommandError(str(error)) from None
    if options.json:
        print_json(plain(story))
    else:
        print("\n".join(format_story(story)))
    return 0
