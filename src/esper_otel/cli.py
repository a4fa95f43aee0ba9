"""The ``esper-otel`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from esper_otel._version import __version__
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.terminal import say, say_json
from esper_otel.settings import EsperSettings, Mode, SettingsError

_RUN = """\
Runs a training script as `python` would, and records it: every optimizer step streams
out as OpenTelemetry (OTEL_* variables say where to; default http://localhost:4318), and
a Tamiyo sidecar on this host is asked after each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for a mistake in the call)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="esper-otel", description=__doc__)
    parser.add_argument("--version", action="version", version=f"esper-otel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run a training script, instrumented",
        description=_RUN,
        usage="esper-otel run [option ...] (script | -m module | torchrun ...) [argument ...]",
    )
    run.add_argument("--enforce", action="store_true", help="apply Tamiyo's decisions")
    run.add_argument("--mode", choices=[m.value for m in Mode], help="default: advise")
    run.add_argument("--socket", metavar="PATH", help="where the sidecar listens")
    run.add_argument("--record", metavar="DIR", help="also write all telemetry to files")
    run.add_argument("--report", metavar="FILE", help="write a page of the run at its end")
    run.add_argument("--run-id", metavar="NAME", help="default: one made from the time")
    told = run.add_mutually_exclusive_group()
    told.add_argument("--quiet", action="store_true", help="no summary at the end")
    told.add_argument(
        "--json", action="store_true", help="the summary as one line of JSON, on stderr"
    )
    run.add_argument("-m", nargs=argparse.REMAINDER, dest="module", help="run a module")
    run.add_argument("script", nargs=argparse.REMAINDER, help="what `python` would be given")
    resend = commands.add_parser("resend", help="deliver telemetry that a run left unsent")
    resend.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="or a folder of spool files"
    )
    show = commands.add_parser("show", help="print recorded steps")
    show.add_argument("files", nargs="+", type=Path, metavar="FILE")
    show.add_argument("--json", action="store_true", help="one JSON object per frame")
    show.add_argument(
        "--metrics",
        metavar="KEY,…",
        default="loss,gradient_norm,step_latency_ms,optimizer_lr",
        help="columns, by key of the registry (default: %(default)s)",
    )
    report = commands.add_parser(
        "report",
        help="make a page of runs: one HTML file to look at",
        description="Makes one HTML file that shows runs: curves, decisions, seeds, ranks. It "
        "needs nothing else, so it can be mailed. Several runs are laid over one another.",
    )
    report.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a recording, a spool, a Collector's file or a journal: a file or a folder",
    )
    report.add_argument(
        "-o",
        dest="output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="where to write it (default: %(default)s)",
    )
    return parser


def _report(options: argparse.Namespace) -> int:
    from esper_otel.report import MOST_TOLD, ReportError, size_of, write_report
    from esper_otel.report.progress import Progress

    progress = Progress("report", size_of(options.runs))
    try:
        problems = write_report(options.runs, options.output, progress.reached)
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


def _run(options: argparse.Namespace) -> int:
    script: list[str] = options.script
    if options.module is not None:
        script = ["-m", *options.module] if options.module else []
    if not script:
        return _refuse("run: expected a script, or -m and a module")
    if options.enforce and options.mode not in (None, "enforce"):
        return _refuse(f"run: --enforce and --mode {options.mode} exclude each other")
    only_workers = _launches(script)
    if script[0] == "torchrun" and not Path("torchrun").exists():
        script = ["-m", "torch.distributed.run", *script[1:]]
    fault = _fault_of(script[0])
    if fault:
        return _refuse(f"run: {fault}")
    environment = {**os.environ, **_variables(options)}
    try:
        EsperSettings.read(environment)
    except SettingsError as error:
        return _refuse(f"run: {error}")
    from esper_otel.integrations.startup import execute

    return execute(script, environment, only_workers=only_workers)


def _launches(script: list[str]) -> bool:
    """Whether this starts the processes that train, and is none itself."""
    if script[0] == "-m":
        return script[1] in ("torch.distributed.run", "torch.distributed.launch")
    return Path(script[0]).name == "torchrun"


def _fault_of(script: str) -> str:
    """Why ``script`` cannot be run, empty when it can.

    It is a file called train.py and not a module path: -c and - are Python's own.
    """
    if script.startswith("-"):
        return ""
    path = Path(script)
    if not path.exists():
        return f"{path}: no such file"
    if path.is_dir() and not (path / "__main__.py").exists():
        return f"{path}: a folder without __main__.py"
    return ""


def _variables(options: argparse.Namespace) -> dict[str, str]:
    """The settings that options of the command give, as environment variables."""
    given = {
        "ESPER_MODE": "enforce" if options.enforce else options.mode,
        "ESPER_TAMIYO_SOCKET": options.socket,
        "ESPER_RECORDING_DIR": options.record,
        "ESPER_RUN_ID": options.run_id,
        "ESPER_REPORT": options.report and str(Path(options.report).absolute()),
        "ESPER_SUMMARY": "off" if options.quiet else "json" if options.json else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _resend(options: argparse.Namespace) -> int:
    from esper_otel.stream import resend
    from esper_otel.stream.spool_files import spool_files_in

    files: list[Path] = []
    for path in options.files:
        there = spool_files_in(path) if path.is_dir() else [path]
        files += there
        if not there:
            say(f"{path}: nothing to deliver")
    report = resend(files)
    for file in report.files:
        rejected = f", {file.rejected:,} rejected by the receiver" if file.rejected else ""
        cut = f", {file.cut_bytes:,} bytes of a cut request removed" if file.cut_bytes else ""
        say(f"{file.path}: {file.delivered:,} delivered{rejected}, {file.kept:,} kept{cut}")
        if file.problem:
            say(f"esper-otel: resend: {file.problem}", file=sys.stderr)
    return 0 if report.is_complete else 1


def _show(options: argparse.Namespace) -> int:
    from esper_otel.leyline.metrics import BY_KEY
    from esper_otel.stream import RecordingError, read_frames

    columns = [key for key in options.metrics.split(",") if key]
    for key in columns:
        if key not in BY_KEY:
            return _refuse(f"show: --metrics {key}: expected keys of the metric registry")
    status = 0
    for path in options.files:
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


def _refuse(message: str) -> int:
    say(f"esper-otel: {message}", file=sys.stderr)
    return 2


COMMANDS = {"run": _run, "resend": _resend, "show": _show, "report": _report}
