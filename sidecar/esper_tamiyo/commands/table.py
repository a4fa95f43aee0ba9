"""``tamiyo table``: print a table that comes with the package, or the JSON Schema of tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import say, say_json
from esper_tamiyo.commands.common import CommandError


def add(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "table",
        help="print a table that comes with the package",
        examples=[
            ("tamiyo table > mine.yaml", "a copy of the default table to change"),
            ("tamiyo table --schema > table.schema.json", "for editors that complete YAML"),
        ],
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "name", nargs="?", default="default", help="default or prototype (default: %(default)s)"
    )
    what.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of tables, for editors"
    )
    parser.set_defaults(command=_table)


def _table(options: argparse.Namespace) -> int:
    from esper_tamiyo.language.table_file import SCHEMA

    if options.schema:
        say_json(SCHEMA.read_text(encoding="utf-8").removesuffix("\n"))
    else:
        say(*_shipped(options.name).read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    return 0


def _shipped(name: str) -> Path:
    """The file of a table; raises :class:`CommandError` when there is no such table."""
    from esper_tamiyo.language.table_file import path_of, shipped_tables

    names = shipped_tables()
    if name not in names:
        raise CommandError(f"{name}: no such table; expected one of {', '.join(names)}")
    return path_of(name)
