"""Live curves: those of one rank, as they grow with the evaluated step records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from esper_otel.leyline.custom import is_custom
from esper_otel.leyline.frames import MAX_CUSTOM, StepFrame
from esper_otel.report.columns import Producer
from esper_otel.report.curves import Curve
from esper_otel.report.layouts import Numbers, Times
from esper_otel.report.trainers import CLOCK, TrainerCurves

MOST_SEEDS = 64
"""Seeds of a rank that have curves."""

MOST_KEYS = 256
"""Metrics of a rank, or of one of its seeds, that have curves."""

_JOINED_EVERY = 64
"""Batches after which the pieces of a curve are joined: a piece takes more than its points."""


class StepBatch(NamedTuple):
    """Steps of one rank, or of one of its seeds, with a column of ``values`` for each key."""

    seed: str | None
    keys: tuple[str, ...]
    steps: Times
    times: Times
    values: Numbers

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return self.steps.nbytes + self.times.nbytes + self.values.nbytes


class LiveTrainer(TrainerCurves):
    """The curves of one rank; judged steps come once each, and in their order."""

    def __init__(self, source: Producer) -> None:
        super().__init__(source)
        self.newest: StepFrame | None = None
        """The newest step, with its values."""
        self.heard_unix_nano = 0
        """When it was judged, by the sidecar's clock."""
        self.custom: dict[str, float] = {}
        """The newest of each value of the script's own: an evaluation is in few steps."""
        self.waiting: list[StepFrame] = []
        self.left_out: set[str] = set()
        """Seeds and metrics beyond the limits, as many of them as are remembered."""
        self._batches = 0

    def take_newest(self, frame: StepFrame) -> None:
        """Take in the step that is the newest now; it becomes curves later."""
        self.newest = frame
        self.waiting.append(frame)
        for key in filter(is_custom, frame.values):
            self.custom.pop(key, None)
            self.custom[key] = frame.values[key]
            if len(self.custom) > MAX_CUSTOM:
                del self.custom[next(iter(self.custom))]

    def gather(self) -> list[StepBatch]:
        """The steps that were waiting, by what they have values of."""
        waiting, self.waiting = self.waiting, []
        alike: dict[tuple[str | None, tuple[str, ...]], list[tuple[int, int, list[float]]]]
        alike = defaultdict(list)
        for frame in waiting:
            values = {**frame.values, "step": float(frame.step)}
            row = (frame.step, frame.time_unix_nano, list(values.values()))
            alike[None, tuple(values)].append(row)
            for seed, own in frame.seeds.items():
                row = (frame.step, frame.time_unix_nano, list(own.values()))
                alike[seed, tuple(own)].append(row)
        return [
            StepBatch(
                seed,
                keys,
                np.array([step for step, _, _ in rows], np.int64),
                np.array([at for _, at, _ in rows], np.int64),
                np.array([values for _, _, values in rows], np.float64).reshape(len(rows), -1),
            )
            for (seed, keys), rows in alike.items()
        ]

    def take_batches(self, batches: Iterable[StepBatch]) -> None:
        """Have the curves go on."""
        present: dict[str, list[Times]] = defaultdict(list)
        broken: list[Times] = []
        for batch in batches:
            if batch.seed is None:
                self._curve(None, CLOCK).extend(batch.steps, batch.times.astype(np.float64))
            elif not self._has_room(batch.seed):
                continue
            for place, key in enumerate(batch.keys[:MOST_KEYS]):
                column = np.ascontiguousarray(batch.values[:, place])
                self._curve(batch.seed, key).extend(batch.steps, column)
                if batch.seed is None:
                    present[key].append(batch.steps)
                    if key == "nonfinite":
                        broken.append(batch.steps[column > 0])
        if broken:
            self._leave_gaps(np.unique(np.concatenate(broken)), present)
        self._batches += 1
        if self._batches % _JOINED_EVERY == 0:
            for curve in self.curves.values():
                curve.points()

    def news(self, batches: Iterable[StepBatch]) -> LiveTrainer:
        """The part of it that ``batches`` are, with the totals of all."""
        part = LiveTrainer(self.source)
        part.take_batches(batches)
        for whose, curve in part.curves.items():
            if whose in self.curves:
                curve.total = self.curves[whose].total
        part.attributes, part.ended = self.attributes, self.ended
        return part

    def _curve(self, seed: str | None, key: str) -> Curve:
        return self.curves.setdefault((seed, key), Curve())

    def _has_room(self, seed: str) -> bool:
        known = {one for one, _ in self.curves if one is not None}
        if seed in known or len(known) < MOST_SEEDS:
            return True
        if len(self.left_out) < MOST_SEEDS:
            self.left_out.add(seed)
        return False
