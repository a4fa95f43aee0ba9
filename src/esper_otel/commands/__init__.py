"""One module per command of ``esper-otel``.

Each has ``add``, which describes the command to the parser, and imports what it needs
only when it runs: a tool that people type all day must be quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.leyline.terminal import say

if TYPE_CHECKING:
    from collections.abc import Iterable


def recordings_of(paths: Iterable[Path], command: str) -> list[Path]:
    """``paths``, and in place of each that is none the recordings of the run of that name.

    The name, or the id, of a run at home. What is neither stays, for whoever opens it.
    """
    found: list[Path] = []
    for path in paths:
        if path.exists() or len(path.parts) != 1:
            found.append(path)
            continue
        from esper_otel.home import found_by
        from esper_otel.settings import EsperSettings

        home = EsperSettings.read(os.environ).runs_path
        run, several = found_by(str(path), home)
        if run is None:
            if several:
                say(
                    f"esper-otel: {command}: {several} run ids begin with this", file=sys.stderr
                )
            found.append(path)
            continue
        if several > 1:
            newest = f"{several} runs are called {path}; this is the newest, {run.card.run}"
            say(f"esper-otel: {command}: {newest}", file=sys.stderr)
        found += run.recordings
    return found


def refuse(message: str) -> int:
    """Say what is wrong with a call; returns the exit status for that, 2."""
    say(f"esper-otel: {message}", file=sys.stderr)
    return 2
