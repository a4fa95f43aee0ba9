"""Writes runs in the formats of other tools."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.commands import recordings_of
from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import say

if TYPE_CHECKING:
    from esper_otel.export import Steps

FORMATS = ("perfetto", "csv", "parquet", "tensorboard", "otlp-json")
"""As :class:`esper_otel.export.Format` has them, which takes long to import."""


def add(commands: Subcommands) -> None:
    """Describe this command to the parser."""
    parser = commands.add_parser(
        "export",
        help="write runs in the formats of other tools",
        description="Writes runs in the format of another tool: every step, decision and seed. "
        "perfetto: a trace for ui.perfetto.dev. csv, parquet: tables. tensorboard: a folder of "
        "event files. otlp-json: one OTLP request a line, as a Collector's file exporter.",
        examples=[
            ("esper-otel export recordings/ --to csv", "a table for each kind of row"),
            (
                "esper-otel export recordings/ --to perfetto --steps 100:200",
                "a trace of some steps",
            ),
        ],
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a recording, a spool, a Collector's file or a journal: a file or a folder; or "
        "the name or id of a run that `esper-otel runs` lists",
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument(
        "-o",
        dest="output",
        type=Path,
        metavar="PATH",
        help="where to write it; of tensorboard a folder (default: here, by the run's name)",
    )
    parser.add_argument(
        "--steps", type=_steps, metavar="FIRST:LAST", help="only these steps, both included"
    )
    parser.set_defaults(command=_export)


def _steps(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{0,15}):(\d{0,15})", text)
    if found is None or text == ":":
        raise argparse.ArgumentTypeError(
            f"{text}: expected FIRST:LAST, such as 100:200 or 100:"
        )
    first, last = int(found[1] or 0), int(found[2] or 1 << 53)
    if first > last:
        raise argparse.ArgumentTypeError(f"{text}: expected the first step before the last")
    return first, last


def _export(options: argparse.Namespace) -> int:
    from esper_otel.export import ExportError, Format, default_path, export
    from esper_otel.leyline.terminal import Progress
    from esper_otel.report.sources import size_of

    to = Format(options.to)
    output = options.output or default_path(options.runs[0], to)
    runs = recordings_of(options.runs, "export")
    progress = Progress("export", 2 * size_of(runs))
    files: list[Path] = []
    try:
        done = export(runs, to, output, _wanted(options.steps), progress.reached)
    except ExportError as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f"{error.filename or output}: {error.strerror or error}"]
    else:
        files, problems = done.files, done.problems
    progress.end()
    for file in files:
        say(str(file))
    for problem in problems:
        say(f"esper-otel: export: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _wanted(steps: tuple[int, int] | None) -> Steps | None:
    from esper_otel.export import Steps

    return None if steps is None else Steps(*steps)
