"""Sealing: a step's values go into its row, in the order of steps, when all have arrived.

On the CPU every value is there at once. A value on a device arrives later; its frame
waits for it, and so do those behind it, because statistics follow the order of steps. What the
rows of coming steps depend on goes into a checkpoint (:class:`RecorderState`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from math import isfinite, nan, sqrt
from typing import Any

import msgspec

from esper_otel.leyline.frames import NO_CUSTOM, Value, arrived, present, step_row
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT, WEIGHT

DEEPEST_WAIT = 8
"""Frames that may wait for a device. Beyond it the oldest goes without what is missing."""

_LOSS = STEP_SLOT["loss"]
_GRADIENT_NORM = STEP_SLOT["gradient_norm"]
_LOSS_DELTA = STEP_SLOT["loss_delta"]
_LOSS_EWMA = STEP_SLOT["loss_ewma"]
_LOSS_VOLATILITY = STEP_SLOT["loss_volatility"]
_GRAD_NORM_EWMA = STEP_SLOT["grad_norm_ewma"]
_GRAD_VAR = STEP_SLOT["grad_var"]
_NONFINITE = STEP_SLOT["nonfinite"]
_CUSTOM_NONFINITE = STEP_SLOT["custom_nonfinite"]


class WeightedStatistics:
    """Exponentially weighted mean and variance of a series, in its own unit and its square.

    The newest observation counts ``weight``, all earlier ones together ``1 - weight``;
    the first one alone is the mean, with variance 0. Before it all are NaN (absent).
    The update is D. H. D. West's (CACM 22, 1979) with constant weight, in the form of
    T. Finch, "Incremental calculation of weighted mean and variance" (2009), section 9.
    It subtracts no large sums of squares, so the variance is never negative.

    The caller passes finite values only: what to do about a NaN (count it, leave it out)
    is not for a statistic to decide, and one would stay in the mean for ever. Squares
    are taken, so values beyond 1e150 overflow the variance.
    """

    __slots__ = ("_rest", "_weight", "mean", "variance")

    def __init__(self, weight: float = WEIGHT) -> None:
        if not 0.0 < weight <= 1.0:
            raise ValueError(f"weight={weight!r}: expected a number above 0, up to 1")
        self._weight = weight
        self._rest = 1.0 - weight
        self.mean = nan
        self.variance = nan

    def update(self, x: float) -> None:
        """Take one finite observation."""
        mean = self.mean
        if mean != mean:  # NaN: nothing seen yet; cheaper than a flag or math.isnan
            self.mean = x
            self.variance = 0.0
            return
        diff = x - mean
        increment = self._weight * diff
        self.mean = mean + increment
        self.variance = self._rest * (self.variance + diff * increment)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance; set, it goes on from there."""
        return self.mean, self.variance

    @moments.setter
    def moments(self, moments: tuple[float, float]) -> None:
        self.mean, self.variance = moments

    @property
    def deviation(self) -> float:
        """Weighted standard deviation."""
        return sqrt(self.variance)


class PendingFrame:
    """A frame and the values that are still to be put into its row.

    ``loss`` is the sum over the step's micro-batches and ``parts`` what makes a mean of it,
    ``norm`` the gradient norm, ``others`` are values by slot, ``seeds`` the rows of the
    step's seeds, which miss nothing, ``custom`` custom values by name. ``numbers`` are those
    of the latter that are finite, once it is sealed.
    """

    __slots__ = (
        "custom",
        "loss",
        "norm",
        "numbers",
        "others",
        "parts",
        "row",
        "seeds",
        "step",
        "time",
    )

    def __init__(
        self,
        step: int,
        time: int,
        row: list[float],
        loss: Value | None,
        parts: float,
        norm: Value | None,
        others: Mapping[int, Value],
        seeds: Sequence[tuple[str, list[float]]] = (),
        custom: Mapping[str, Value] = NO_CUSTOM,
    ) -> None:
        self.custom = custom
        self.numbers: Mapping[str, float] = NO_CUSTOM
        self.step = step
        self.time = time
        self.row = row
        self.loss = loss
        self.parts = parts
        self.norm = norm
        self.others = others
        self.seeds = seeds

    def is_complete(self) -> bool:
        """Whether every value has arrived."""
        values = (self.loss, self.norm, *self.others.values(), *self.custom.values())
        for value in values:
            if value is not None and not isinstance(value, float) and not value.ready():
                return False
        return True

    @property
    def told(self) -> tuple[Any, ...]:
        """What a :class:`~esper_otel.tolaria.ports.FrameSink` is given of it."""
        frame = (self.time, self.row, self.seeds)
        return (*frame, self.numbers) if self.numbers else frame

    @property
    def asked(self) -> tuple[int, int, list[float], Sequence[tuple[str, list[float]]]]:
        """Step, time, row and seeds: what is asked about, with the numbers beside them."""
        return self.step, self.time, self.row, self.seeds


class RecorderState(msgspec.Struct, forbid_unknown_fields=True):
    """Of a recorder: the last ``step``, the ``latest`` whole row by key, and statistics.

    ``loss`` and ``gradient_norm`` are weighted mean and variance, NaN before the first
    value; ``last_loss`` is that of the step before, NaN when it had none.
    """

    step: int
    latest: dict[str, float]
    loss: tuple[float, float]
    gradient_norm: tuple[float, float]
    last_loss: float

    def row(self) -> list[float]:
        """The latest row, in registry order; keys that are no metrics any more are left out."""
        row = step_row()
        for key, value in self.latest.items():
            if key in STEP_SLOT:
                row[STEP_SLOT[key]] = value
        return row

    def plain(self) -> dict[str, Any]:
        """As numbers, text, lists and dictionaries."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


def parse_state(state: Mapping[str, Any]) -> RecorderState:
    """The state that ``plain`` was called of; ``ValueError`` for anything else."""
    try:
        return msgspec.convert(dict(state), RecorderState)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


class Sealer:
    """Puts values and statistics into rows; NaN and infinity are counted, never put.

    ``enriched`` False leaves the statistics out, which are gated.
    """

    __slots__ = ("_enriched", "_last_loss", "_loss", "_norm", "waiting")

    def __init__(self, *, enriched: bool) -> None:
        self._enriched = enriched
        self._loss = WeightedStatistics()
        self._norm = WeightedStatistics()
        self._last_loss = nan
        self.waiting: deque[PendingFrame] = deque()
        """Frames that wait for a device."""

    def state_after(self, step: int, latest: Sequence[float]) -> RecorderState:
        """What coming rows depend on, after ``step``, whose newest whole row is ``latest``.

        Values that a device has not delivered yet are not in it.
        """
        return RecorderState(
            step,
            present(STEP_KEYS, latest),
            self._loss.moments,
            self._norm.moments,
            self._last_loss,
        )

    def load_state(self, state: RecorderState) -> None:
        """Statistics go on from ``state``."""
        self._loss.moments, self._norm.moments = state.loss, state.gradient_norm
        self._last_loss = state.last_loss

    def preview(self, row: list[float], loss: float | None, norm: float | None) -> None:
        """Put into ``row`` what sealing would, and remember nothing of it."""
        before = self._loss.moments, self._norm.moments, self._last_loss
        try:
            self.put_numbers(row, loss, 1, norm, {})
        finally:
            self._loss.moments, self._norm.moments, self._last_loss = before

    def seal_now(
        self,
        row: list[float],
        loss: Value | None,
        parts: float,
        norm: Value | None,
        others: Mapping[int, Value],
    ) -> bool:
        """Seal a row whose values are all here, as on a CPU they are; False if one is not."""
        if self.waiting or (norm is not None and type(norm) is not float):
            return False
        if loss is not None and type(loss) is not float:
            return False
        for value in others.values():
            if type(value) is not float:
                return False
        self.put_numbers(row, loss, parts, norm, others)
        return True

    def seal_in_order(self, frame: PendingFrame) -> list[PendingFrame]:
        """Take a step's frame; returns those that are sealed by now, oldest first."""
        waiting = self.waiting
        waiting.append(frame)
        sealed = []
        while waiting and (waiting[0].is_complete() or len(waiting) > DEEPEST_WAIT):
            sealed.append(waiting.popleft())
            self._seal(sealed[-1])
        return sealed

    def flush(self) -> list[PendingFrame]:
        """No step follows: what waits is sealed with what has arrived."""
        sealed = list(self.waiting)
        self.waiting.clear()
        for frame in sealed:
            self._seal(frame)
        return sealed

    def _seal(self, frame: PendingFrame) -> None:
        """With what has arrived; a loss is missing when one of its micro-batches is."""
        if frame.custom:
            frame.numbers = _finite(frame.custom, frame.row)
        self.put_numbers(
            frame.row,
            None if frame.loss is None else arrived(frame.loss),
            frame.parts,
            None if frame.norm is None else arrived(frame.norm),
            {
                slot: number
                for slot, value in frame.others.items()
                if (number := arrived(value)) is not None
            },
        )

    def put_numbers(
        self,
        row: list[float],
        loss: Any,
        parts: float,
        norm: Any,
        others: Mapping[int, Any],
    ) -> None:
        """Numbers and their statistics into ``row``. All of them are floats here."""
        enriched = self._enriched
        # "Minus the previous step's": after a step without a loss there is none.
        self._last_loss, last_loss = nan, self._last_loss
        if loss is not None:
            if parts != 1:
                loss /= parts
            if loss - loss != 0.0:  # NaN or infinite; a third of a call to math.isfinite
                row[_NONFINITE] += 1.0
            else:
                row[_LOSS] = self._last_loss = loss
                if enriched:
                    if last_loss == last_loss:
                        row[_LOSS_DELTA] = loss - last_loss
                    statistics = self._loss
                    statistics.update(loss)
                    row[_LOSS_EWMA] = statistics.mean
                    row[_LOSS_VOLATILITY] = sqrt(statistics.variance)
        if norm is not None:
            if norm - norm != 0.0:
                row[_NONFINITE] += 1.0
            else:
                row[_GRADIENT_NORM] = norm
                if enriched:
                    statistics = self._norm
                    statistics.update(norm)
                    row[_GRAD_NORM_EWMA] = statistics.mean
                    row[_GRAD_VAR] = statistics.variance
        for slot, number in others.items():
            if number - number == 0.0:
                row[slot] = number
            else:
                row[_NONFINITE] += 1.0


def _finite(custom: Mapping[str, Value], row: list[float]) -> dict[str, float]:
    """The custom values that have arrived and are finite; the others are counted in ``row``."""
    row[_CUSTOM_NONFINITE] = 0.0
    found = {}
    for name, value in custom.items():
        number = arrived(value)
        if number is None:
            continue
        if isfinite(number):
            found[name] = number
        else:
            row[_CUSTOM_NONFINITE] += 1.0
    return found


def put(row: list[float], slot: int, number: float) -> bool:
    """Put ``number`` into ``row``, or count it there when it is not finite."""
    if isfinite(number):
        row[slot] = number
        return True
    row[_NONFINITE] += 1.0
    return False
