"""Modules of the commands of ``tamiyo``, by what the commands are about.

Each command has an ``add_…``, which describes it to the parser, and its module imports what it
needs only when it runs: a tool that people type all day must be quick.
What several of them need is here: the socket and its replies, tables, recordings, output.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper_otel.leyline.folders import default_socket_path as default_path
from esper_otel.leyline.terminal import say, say_json

if TYPE_CHECKING:
    from esper_otel.leyline.tool_requests import ToolRequest
    from esper_tamiyo.language.table import Table
    from esper_tamiyo.replaying.recordings import RecordedRuns


class CommandError(Exception):
    """A mistake of the user's, told without a traceback: one line, or several arguments."""

    @property
    def lines(self) -> list[str]:
        """What is told; a line break within one of them is not ours."""
        return [str(line) for line in self.args]


def add_socket(parser: argparse.ArgumentParser) -> None:
    """Give a command the option ``--socket``."""
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help=f"default: {default_path()}"
    )


def reply(request: ToolRequest, path: Path | None) -> object:
    """What the sidecar replies; raises :class:`CommandError` when it does not."""
    from esper_otel.leyline.tool_requests import NoAnswerError, reply_to

    try:
        return reply_to(request, path or default_path())
    except NoAnswerError as error:
        raise CommandError(str(error)) from None


def table_named(name: str) -> Table:
    """A table; raises :class:`CommandError` with everything that is wrong with it."""
    from esper_tamiyo.language.table_file import TableError, load

    try:
        return load(name)
    except TableError as error:
        raise CommandError("the table cannot be used", *str(error).split("\n")) from None


def plain(decision: object) -> dict[str, Any]:
    """A struct that travels as an array, as an object with names, for people and jq."""
    import msgspec

    plain: dict[str, Any] = msgspec.structs.asdict(decision)  # type: ignore[arg-type]
    plain["findings"] = [msgspec.structs.asdict(finding) for finding in plain["findings"]]
    return plain


def print_json(value: dict[str, Any]) -> None:
    """Print an object for jq and the like; what is infinite is null, as JSON has no such
    number."""
    import msgspec

    sound = msgspec.json.decode(msgspec.json.encode(value))
    say_json(json.dumps(sound, indent=2))


def add_recording(parser: argparse.ArgumentParser) -> None:
    """Give a command the recording, and ``--run``."""
    parser.add_argument(
        "recording",
        type=Path,
        help="a recording of a run, a file of a Collector's file exporter, or a folder of them",
    )
    parser.add_argument("--run", default="", help="default: every run of the recording")


def recorded(path: Path) -> RecordedRuns:
    """The recording at ``path``; raises :class:`CommandError` when there is none."""
    from esper_tamiyo.replaying.recordings import RecordedRuns

    try:
        return RecordedRuns(path)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None


def check_recorded(recording: RecordedRuns, path: Path, run: str, steps: int) -> None:
    """Say what could not be read; raises :class:`CommandError` when nothing could."""
    for problem in recording.problems:
        say(f"tamiyo: warning: {problem}", file=sys.stderr)
    if steps:
        return
    if run and recording.runs:
        raise CommandError(f"--run {run}: not in {path}, which has {', '.join(recording.runs)}")
    points = recording.points
    others = f", only {points.foreign:,} points of other metrics" if points.foreign else ""
    raise CommandError(f"{path}: there is no step of a training run in it{others}")
