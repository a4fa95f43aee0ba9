"""What the commands share that read a recording: its argument and its problems."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from esper_tamiyo.commands.common import CommandError

if TYPE_CHECKING:
    from esper_tamiyo.replaying.recordings import Recording


def add_recording(parser: argparse.ArgumentParser) -> None:
    """Give a command the recording, and ``--run``."""
    parser.add_argument(
        "recording",
        type=Path,
        help="a file that a run or a Collector's file exporter wrote, or a folder of them",
    )
    parser.add_argument("--run", default="", help="default: every run of the recording")


def recorded(path: Path) -> Recording:
    """The recording at ``path``; raises :class:`CommandError` when there is none."""
    from esper_tamiyo.replaying.recordings import Recording

    try:
        return Recording(path)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None


def told(recording: Recording, path: Path, run: str, steps: int) -> None:
    """Say what could not be read; raises :class:`CommandError` when nothing could."""
    for problem in recording.problems:
        print(f"tamiyo: warning: {problem}", file=sys.stderr)
    if steps:
        return
    if run and recording.runs:
        raise CommandError(f"--run {run}: not in {path}, which has {', '.join(recording.runs)}")
    points = recording.points
    others = f", only {points.foreign:,} points of other metrics" if points.foreign else ""
    raise CommandError(f"{path}: there is no step of a training run in it{others}")
