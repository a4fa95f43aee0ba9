"""``tamiyo check``: say what a table does, or what is wrong with it."""

from __future__ import annotations

import argparse
import sys

from esper_tamiyo.commands.common import Commands


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "check", help="say what a table does, or what is wrong with it"
    )
    parser.add_argument("table", help="default, prototype or a file")
    parser.set_defaults(command=_check)


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
