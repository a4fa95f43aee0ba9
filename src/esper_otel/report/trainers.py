"""Trainers: the recording of one process, assembled from blocks by the times of its steps."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from esper_otel.leyline.custom import is_custom
from esper_otel.report.columns import Attributes, Producer
from esper_otel.report.curves import Curve
from esper_otel.report.layouts import Block, Numbers, Times

AT_ONCE = 16_384
"""Rows that are gathered before they are put together."""

JOINED_EVERY = 64
"""Times that a little was added to curves after which their pieces are worth joining."""

CLOCK = "time_unix_nano"
"""The curve that says when each step ended, in Unix nanoseconds."""

_PATIENCE = 3
"""How often values wait for a step of their time, which a Collector may write later."""

_MOST_REMEMBERED = 64
"""Kinds of rows of which it is remembered when the last ones were."""

_Kind = tuple[str | None, tuple[str, ...]]
"""Whose rows they are, and which metrics are in them."""

_MAX_STEP = float(1 << 53)


class TrainerCurves:
    """The curves of one process, by (seed, key); seed None for the steps' own."""

    def __init__(self, source: Producer, held: int | None = None) -> None:
        """So many points of each curve are ``held``, and more of them thinned."""
        self.source = source
        self._held = held
        self.attributes: Attributes = {}
        self.ended = ""
        """How it ended, "" when it has not said so: then it was killed, or goes on."""
        self.curves: dict[tuple[str | None, str], Curve] = {}
        self.lost = 0
        """Values of times at which nothing says which step it was."""
        self.rows = 0
        """Rows of all blocks so far."""
        self.evaluations: set[str] = set()
        """Keys of the values that are evaluations."""
        self._waiting: list[tuple[int, Block]] = []
        self._rows = 0
        self._before: dict[_Kind, Times] = {}
        self._times: Times = np.empty(0, np.int64)
        self._steps: Times = np.empty(0, np.int64)

    def take_in(self, block: Block) -> None:
        """Take in values; they are in the curves after :meth:`assemble_rest` at the latest."""
        self._waiting.append((0, block))
        if block.are_evaluations:
            self.evaluations.update(block.keys)
        self._rows += len(block.times)
        self.rows += len(block.times)
        if self._rows >= AT_ONCE:
            self._assemble()

    def join_pieces(self) -> None:
        """Have each curve be in one piece: a small one takes more than its points."""
        for curve in self.curves.values():
            curve.points()

    def assemble_known(self) -> None:
        """Put together what has come of steps that are known; more may follow."""
        if self._waiting:
            self._assemble()

    def assemble_rest(self) -> None:
        """Put together what is still waiting; what has no step is lost, and counted."""
        self._assemble()
        self._assemble(is_last=True)
        self.lost += sum(block.values.size for _, block in self._waiting)
        self._waiting.clear()

    def absorb(self, later: TrainerCurves) -> None:
        """Take in the curves of a process that went on where this one ended."""
        for whose, curve in later.curves.items():
            self.curves.setdefault(whose, Curve(self._held)).absorb(curve)
        self.attributes = {**self.attributes, **later.attributes}
        self.evaluations |= later.evaluations
        self.ended = later.ended

    def span(self) -> tuple[float, float]:
        """When its first and its last step ended, in Unix nanoseconds; zeros without any."""
        curve = self.curves.get((None, CLOCK))
        return (curve.total.least, curve.total.greatest) if curve else (0.0, 0.0)

    def steps(self) -> tuple[int, int, int]:
        """How many steps there are, the first and the last; zeros without any."""
        curve = self.curves.get((None, "step"))
        total = curve.total if curve is not None else None
        return (total.count, total.first_step, total.last_step) if total else (0, 0, 0)

    def _assemble(self, *, is_last: bool = False) -> None:
        waiting, self._waiting, self._rows = self._waiting, [], 0
        self._learn_steps([block for _, block in waiting])
        alike: dict[_Kind, list[tuple[Times, Times, Numbers]]] = defaultdict(list)
        for age, block in waiting:
            if block.are_evaluations:
                known, steps = self._steps_before(block.times, is_last=is_last)
            else:
                known, steps = self._steps_of(block.times)
            if known.all():
                alike[block.seed, block.keys].append((block.times, steps, block.values))
                continue
            if known.any():
                some = (block.times[known], steps[known], block.values[known])
                alike[block.seed, block.keys].append(some)
            times, values = block.times[~known], block.values[~known]
            rest = block._replace(times=times, values=values)
            if age < _PATIENCE:
                self._waiting.append((age + 1, rest))
            else:
                self.lost += rest.values.size
        self._extend(alike)

    def _learn_steps(self, blocks: list[Block]) -> None:
        """Which step ended when, from the blocks that say so; those of before stay a while."""
        found = [
            (block.times, block.values[:, block.keys.index("step")])
            for block in blocks
            if block.seed is None and "step" in block.keys
        ]
        if not found:
            return
        times = np.concatenate([times for times, _ in found])
        values = np.concatenate([values for _, values in found])
        usable = (values >= 0) & (values < _MAX_STEP) & (values == np.floor(values))
        times, steps = times[usable], values[usable].astype(np.int64)
        if len(times):
            clock = self.curves.setdefault((None, CLOCK), Curve(self._held))
            clock.extend(steps, times.astype(np.float64))
        times, firsts = np.unique(times, return_index=True)
        steps = steps[firsts]
        is_behind = not len(times) or not len(self._times) or times[0] > self._times[-1]
        times = np.concatenate([self._times[-AT_ONCE:], times])
        steps = np.concatenate([self._steps[-AT_ONCE:], steps])
        if not is_behind:  # else there is nothing to sort: steps are followed
            times, firsts = np.unique(times, return_index=True)
            steps = steps[firsts]
        self._times, self._steps = times, steps

    def _steps_of(self, times: Times) -> tuple[np.ndarray, Times]:
        """Of each time whether a step ended then, and which."""
        if not len(self._times):
            return np.zeros(len(times), np.bool_), times
        places = np.minimum(np.searchsorted(self._times, times), len(self._times) - 1)
        return self._times[places] == times, self._steps[places]

    def _steps_before(self, times: Times, *, is_last: bool) -> tuple[np.ndarray, Times]:
        """Of each time whether it is known which step ended last before it, and which.

        Until all was read, that is not known behind the newest step.
        """
        if not len(self._times):
            return np.zeros(len(times), np.bool_), times
        places = np.searchsorted(self._times, times) - 1
        steps = np.where(places < 0, self._steps[0] - 1, self._steps[np.maximum(places, 0)])
        known = np.ones(len(times), np.bool_) if is_last else times <= self._times[-1]
        return known, np.maximum(steps, 0)

    def _extend(self, alike: dict[_Kind, list[tuple[Times, Times, Numbers]]]) -> None:
        present: dict[str, list[Times]] = defaultdict(list)
        broken: list[Times] = []
        for (seed, keys), some in alike.items():
            fresh = self._fresh((seed, keys), np.concatenate([times for times, _, _ in some]))
            if not len(fresh):
                continue
            steps = np.concatenate([steps for _, steps, _ in some])[fresh]
            values = np.concatenate([values for _, _, values in some])[fresh]
            for place, key in enumerate(keys):
                column = np.ascontiguousarray(values[:, place])
                self.curves.setdefault((seed, key), Curve(self._held)).extend(steps, column)
                if seed is None:
                    present[key].append(steps)
                    if key == "nonfinite":
                        broken.append(steps[column > 0])
        if broken:
            self._leave_gaps(np.unique(np.concatenate(broken)), present)

    def _fresh(self, kind: _Kind, times: Times) -> Times:
        """Places of the rows that are here for the first time.

        Delivery is at least once: what was sent again soon after is not counted again.
        """
        _, firsts = np.unique(times, return_index=True)
        firsts.sort()
        before = self._before.get(kind)
        if before is not None:
            if times.min() <= before.max():  # else nothing can be here already
                firsts = firsts[~np.isin(times[firsts], before)]
            times = np.concatenate([before[-AT_ONCE:], times[firsts]])
        if before is not None or len(self._before) < _MOST_REMEMBERED:
            self._before[kind] = times
        return firsts

    def _leave_gaps(self, broken: Times, present: dict[str, list[Times]]) -> None:
        """Where a step had values that were not finite, what it lacks is a gap."""
        if not len(broken):
            return
        for (seed, key), curve in self.curves.items():
            if seed is None and key != CLOCK and curve.total.count and not is_custom(key):
                there = np.concatenate(present[key]) if key in present else broken[:0]
                absent = broken[~np.isin(broken, there)]
                if len(absent):
                    curve.extend(absent, np.full(len(absent), np.nan))
