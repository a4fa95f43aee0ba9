"""Recordings: prints steps, makes a page of them, writes them in formats of other tools."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from esper_otel.commands import recordings_of, refuse
from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.terminal import say, say_json

if TYPE_CHECKING:
    from esper_otel.export import Steps


def add_show(commands: Subcommands) -> None:
    """Describe this command to the parser."""
    parser = commands.add_parser(
        "show",
        help="print recorded steps",
        examples=[
            ("esper-otel show baseline", "the steps of a run, by its name"),
            (
                "esper-otel show run.metrics.otlp --metrics loss,step_latency_ms",
                "some of its metrics",
            ),
        ],
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="a recording, or the name or id of a run that `esper-otel runs` lists",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per step record")
    parser.add_argument(
        "--metrics",
        metavar="KEY,…",
        default="loss,gradient_norm,step_latency_ms,optimizer_lr",
        help="columns, by key of the registry or as custom.NAME (default: %(default)s)",
    )
    parser.set_defaults(command=_show)


def _show(options: argparse.Namespace) -> int:
    from esper_otel.leyline.custom import is_custom
    from esper_otel.leyline.metrics import BY_KEY
    from esper_otel.stream import RecordingError, read_frames

    columns = [key for key in options.metrics.split(",") if key]
    for key in columns:
        if key not in BY_KEY and not is_custom(key):
            return refuse(
                f"show: --metrics {key}: expected keys of the metric registry, or custom.NAME"
            )
    status = 0
    for path in recordings_of(options.files, "show"):
        try:
            for frame in read_frames(path):
                if options.json:
                    say_json(json.dumps(msgspec.structs.asdict(frame)))
                else:
                    say(_line(frame, columns))
        except (RecordingError, OSError) as error:
            known = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
            say(f"esper-otel: show: {known}", file=sys.stderr)
            status = 1
    return status


def _line(frame: StepFrame, columns: Sequence[str]) -> str:
    shown = {"": frame.values} | {f"{seed_id} ": s for seed_id, s in frame.seeds.items()}
    words = [
        f"{whose}{key}={values[key]:.6g}"
        for whose, values in shown.items()
        for key in columns
        if key in values
    ]
    return " ".join([f"step={frame.step}", *words])


def add_report(commands: Subcommands) -> None:
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
    _add_runs(parser)
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


FORMATS = ("perfetto", "csv", "parquet", "tensorboard", "otlp-json")
"""As :class:`esper_otel.export.Format` has them, which takes long to import."""


def add_export(commands: Subcommands) -> None:
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
    _add_runs(parser)
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


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """Give a command the runs that it reads."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a recording, a spool, a Collector's file or a journal: a file or a folder; or "
        "the name or id of a run that `esper-otel runs` lists",
    )
