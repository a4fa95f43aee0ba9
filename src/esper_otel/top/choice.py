"""The choice of run, rank and curve on the screen, and the keys that change it."""

from __future__ import annotations

from collections.abc import Sequence

from esper_otel.top.watched import WatchedRank, WatchedRun

WINDOWS = (0, 1000, 100)
"""Newest steps that charts show; 0 for all."""

_CURVE = "loss"


class Choice:
    """What is shown. Until somebody chooses a run it is the one that was heard of last."""

    def __init__(self, run: str = "", rank: int = 0) -> None:
        self.run = run
        self.rank = rank
        self.curve = _CURVE
        self.window = 0
        self.is_log = False
        self.is_held = False
        """Nothing moves until the next key."""
        self.shows_all = False

    def resolve(
        self, runs: Sequence[WatchedRun]
    ) -> tuple[WatchedRun | None, WatchedRank | None]:
        """The run and the rank that are meant, of those that there are; None without any."""
        if not runs:
            return None, None
        run = next((run for run in runs if run.name == self.run), None)
        if run is None:
            if self.run:  # it was asked for, and may come yet
                return None, None
            run = runs[-1]
        return run, run.ranks.get(self.rank) or run.lead

    def press(self, key: str, runs: Sequence[WatchedRun]) -> bool:
        """Do what a key is for; whether it is for anything."""
        run, rank = self.resolve(runs)
        if key == " ":
            self.is_held = not self.is_held
        elif key == "a":
            self.shows_all = not self.shows_all
        elif key == "enter":
            self.shows_all = False
        elif key == "l":
            self.is_log = not self.is_log
        elif key == "w":
            self.window = (self.window + 1) % len(WINDOWS)
        elif run is None or rank is None:
            return False
        elif key in ("left", "right", "n", "p"):
            self._move(run, runs, -1 if key in ("left", "p") else 1)
        elif key in ("up", "down"):
            if self.shows_all:
                self._move(run, runs, 1 if key == "up" else -1)
            else:
                ranks = sorted(run.ranks)
                place = ranks.index(rank.rank) + (-1 if key == "up" else 1)
                self.rank = ranks[place % len(ranks)]
        elif key in ("c", "C"):
            keys = rank.keys()
            if keys:
                place = keys.index(self.curve) if self.curve in keys else -1
                self.curve = keys[(place + (1 if key == "c" else -1)) % len(keys)]
        else:
            return False
        return True

    def _move(self, run: WatchedRun, runs: Sequence[WatchedRun], by: int) -> None:
        self.run = runs[(runs.index(run) + by) % len(runs)].name
