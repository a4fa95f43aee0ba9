"""Makes a page of runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from esper_otel.commands import recordings_of
from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import say


def add(commands: Subcommands) -> None:
    """Describe this command to the parser."""
    parser = commands.add_parser(
        "report",
        help="make a report of runs: one HTML file",
        description="Makes one HTML file that shows runs: curves, decisions, seeds, ranks. It "
        "needs nothing else, so it can be mailed. Several runs are laid over one another.",
        examples=[
            ("esper-otel report recordings/", "writes report.html"),
            ("esper-otel report baseline tuned -o both.html", "two runs, by their names"),
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
    parser.add_argument(
        "-o",
        dest="output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="where to write it (default: %(default)s)",
    )
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from esper_otel.leyline.terminal import Progress
    from esper_otel.report import MOST_TOLD, ReportError, size_of, write_report

    runs = recordings_of(options.runs, "report")
    progress = Progress("report", size_of(runs))
    try:
        problems = write_report(runs, options.output, progress.reached)
    except ReportError as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f"{options.output}: {error.strerror or error}"]
    else:
        say(str(options.output))
    progress.end()
    if len(problems) > MOST_TOLD:
        problems = [
            *problems[:MOST_TOLD],
            f"{len(problems) - MOST_TOLD:,} more are in the page",
        ]
    for problem in problems:
        say(f"esper-otel: report: {problem}", file=sys.stderr)
    return 1 if problems else 0
