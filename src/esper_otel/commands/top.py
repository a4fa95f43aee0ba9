"""Shows runs on the terminal while they train."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from esper_otel.commands import is_missing, run_called
from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.folders import default_socket_path
from esper_otel.leyline.terminal import say

if TYPE_CHECKING:
    from esper_otel.top.choice import Choice
    from esper_otel.top.sources import RecordedSource, SidecarSource

_TOP = """\
Shows runs while they train: curves, step time by phase, decisions, seeds and ranks. It
reads the sidecar on this host, or follows a growing recording. Keys are listed at the
bottom. In a pipe it prints one picture and ends."""

_PRINTED_ROWS = 30


def add_top(commands: Subcommands) -> None:
    """Describe this command to the parser."""
    parser = commands.add_parser(
        "top",
        help="show runs on the terminal while they train",
        description=_TOP,
        examples=[
            ("esper-otel top", "the most recent run of the sidecar"),
            ("esper-otel top recordings/", "a recording, as it grows"),
            ("esper-otel top --once", "one picture, as plain text"),
        ],
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a recording (files or folders), the name or id of a run that `esper-otel runs` "
        "lists, or the name of a run that Tamiyo knows (default: the most recently active one)",
    )
    parser.add_argument("--run", default="", metavar="NAME", help="the run of a recording")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help=f"default: {default_socket_path()}"
    )
    parser.add_argument("--once", action="store_true", help="print one picture and end")
    parser.set_defaults(command=_top)


def _top(options: argparse.Namespace) -> int:
    asks_tamiyo = options.socket is not None
    paths = [Path(run) if asks_tamiyo else _folder_of(Path(run)) for run in options.runs]
    missing = [path for path in paths if is_missing(path)]
    name = options.run
    if len(paths) == 1 and missing and "/" not in options.runs[0] and not name:
        name, paths = options.runs[0], []
    elif missing:
        return _fail(f"{missing[0]}: no such file or folder")
    once = options.once or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb"
    if not once and (problem := _missing_library()):
        return _fail(problem)
    from esper_otel.top.choice import Choice

    choice = Choice(name, options.rank)
    source = _recorded(paths) if paths else _of_sidecar(options.socket, choice)
    if isinstance(source, str):
        return _fail(source)
    if once:
        return _print(source, choice)
    from esper_otel.top.screen import watch

    status = watch(source, choice)
    _tell_problems(source)
    return status


def _folder_of(path: Path) -> Path:
    """The folder of the run at home that is called so, else ``path`` itself."""
    run = run_called(path, "top")
    return path if run is None else run.folder  # in which files may come


def _fail(problem: str) -> int:
    say(f"esper-otel: top: {problem}", file=sys.stderr)
    return 1


def _missing_library() -> str:
    """What to install, "" when it is there."""
    from importlib.util import find_spec

    if find_spec("rich") is not None:
        return ""
    return "needs rich to draw: pip install 'esper-otel[top]' (--once prints without it)"


def _recorded(paths: list[Path]) -> RecordedSource:
    """What lies at the paths, read for the first time."""
    import time

    from esper_otel.leyline.terminal import Progress
    from esper_otel.report import size_of
    from esper_otel.top.sources import RecordedSource

    source = RecordedSource(paths)
    progress = Progress("top", size_of(paths))
    source.read(time.monotonic(), progress.reached)
    progress.end()
    return source


def _of_sidecar(socket: Path | None, choice: Choice) -> SidecarSource | str:
    """The runs of a sidecar that answers, or what to do when none does."""
    import time

    from esper_otel.top.sources import SidecarSource

    named = os.environ.get("ESPER_TAMIYO_SOCKET")
    source = SidecarSource(socket or (Path(named) if named else default_socket_path()))
    source.refresh(choice.run, choice.rank, time.monotonic())
    if source.problem:
        other = "or name a recording, or a run that `esper-otel runs` lists"
        return f"{source.path}: {source.problem}; {other}"
    return source


def _print(source: RecordedSource | SidecarSource, choice: Choice) -> int:
    """One picture, as plain text."""
    from esper_otel.top.charts import ASCII, without_braille
    from esper_otel.top.picture import SMALLEST, snapshot

    size = get_terminal_size((80, _PRINTED_ROWS))
    rows = snapshot(
        source.runs(), choice, max(size.columns, SMALLEST), max(size.lines, _PRINTED_ROWS)
    )
    for row in rows:
        line = "".join(piece.text for piece in row).rstrip()
        say(line.translate(ASCII) if without_braille(sys.stdout.encoding) else line)
    has_problems = _tell_problems(source)
    if not rows:
        known = ", ".join(run.name for run in source.runs())
        return _fail(
            f"{source.name}: run {choice.run} is not there, but {known}"
            if choice.run and known
            else f"{source.name}: no step of a training run in it"
        )
    return 1 if has_problems else 0


def _tell_problems(source: RecordedSource | SidecarSource) -> bool:
    """Say what could not be read; whether there was anything."""
    from esper_otel.report import MOST_TOLD

    problems = getattr(source, "problems", [])
    for problem in problems[:MOST_TOLD]:
        say(f"esper-otel: top: {problem}", file=sys.stderr)
    if len(problems) > MOST_TOLD:
        say(f"esper-otel: top: and {len(problems) - MOST_TOLD:,} more", file=sys.stderr)
    return bool(problems)
