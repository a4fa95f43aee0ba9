"""Modules of the commands of ``esper-otel``, by what the commands are about.

Each command has an ``add_…``, which describes it to the parser, and its module imports what it
needs only when it runs: a tool that people type all day must be quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.leyline.terminal import say

if TYPE_CHECKING:
    from collections.abc import Iterable

    from esper_otel.home import RecordedRun


def recordings_of(paths: Iterable[Path], command: str) -> list[Path]:
    """``paths``, and in place of each that is none the recordings of the run of that name.

    The name, or the id, of a run at home. What is neither stays, for whoever opens it.
    """
    found: list[Path] = []
    for path in paths:
        run = run_called(path, command)
        found += [path] if run is None else run.recordings
    return found


def run_called(path: Path, command: str) -> RecordedRun | None:
    """The run at home whose name or id ``path`` is; None for a path, or when there is none.

    Says so where it could mean several.
    """
    if len(path.parts) != 1 or not is_missing(path):
        return None
    from esper_otel.home import found_by
    from esper_otel.settings import EsperSettings

    run, several = found_by(str(path), EsperSettings.read(os.environ).runs_path)
    if run is None and several:
        say(f"esper-otel: {command}: {several} run ids begin with this", file=sys.stderr)
    elif run is not None and several > 1:
        newest = f"{several} runs are called {path}; this is the newest, {run.card.run}"
        say(f"esper-otel: {command}: {newest}", file=sys.stderr)
    return run


def is_missing(path: Path) -> bool:
    """Whether there is no such file or folder, or it cannot be looked at."""
    try:
        path.stat()
    except OSError:
        return True
    return False


def refuse(message: str) -> int:
    """Say what is wrong with a call; returns the exit status for that, 2."""
    say(f"esper-otel: {message}", file=sys.stderr)
    return 2
