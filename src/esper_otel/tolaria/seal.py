"""Sealing: a step's values go into its row, in the order of steps, when all have arrived.

On the CPU every value is there at once. A value on a device arrives later; its frame
waits for it, and so do those behind it, because statistics follow the order of steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import isfinite, nan
from typing import Any, Protocol

from esper_otel.leyline.frames import present
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.tolaria.dynamics import WeightedStatistics
from esper_otel.tolaria.memory import Memory

DEEPEST_WAIT = 8
"""Frames that may wait for a device. Beyond it the oldest goes without what is missing."""

_LOSS = STEP_SLOT["loss"]
_GRADIENT_NORM = STEP_SLOT["gradient_norm"]
_LOSS_DELTA = STEP_SLOT["loss_delta"]
_LOSS_EWMA = STEP_SLOT["loss_ewma"]
_LOSS_VOLATILITY = STEP_SLOT["loss_volatility"]
_GRAD_NORM_EWMA = STEP_SLOT["grad_norm_ewma"]
_GRAD_VAR = STEP_SLOT["grad_var"]
_LR = STEP_SLOT["optimizer_lr"]
_MOMENTUM = STEP_SLOT["optimizer_momentum"]
_NONFINITE = STEP_SLOT["nonfinite"]


class Reading(Protocol):
    """A number that a device still has to deliver."""

    def ready(self) -> bool:
        """Whether it has arrived; never waits for it."""

    def value(self) -> float | None:
        """The number; None when it has been lost or is not here yet."""


Value = float | Reading
"""A number, or one that a device still has to deliver."""


class Unless:
    """A value that is to be told, unless ``doubt`` arrives and is not zero."""

    __slots__ = ("_doubt", "_value")

    def __init__(self, value: Value, doubt: Reading) -> None:
        self._value = value
        self._doubt = doubt

    def ready(self) -> bool:
        """Whether both have arrived."""
        value = self._value
        return self._doubt.ready() and (isinstance(value, float) or value.ready())

    def value(self) -> float | None:
        """The number; None when it is not to be told, has been lost or is not here yet."""
        return None if self._doubt.value() else _arrived(self._value)


class Unsealed:
    """A frame and the values that are still to be put into its row.

    ``losses`` are those of the step's micro-batches, ``norm`` the gradient norm, ``others``
    pairs of (slot, value), ``seeds`` the rows of the step's seeds, which miss nothing.
    """

    __slots__ = ("losses", "norm", "others", "row", "seeds", "step", "time")

    def __init__(
        self,
        step: int,
        time: int,
        row: list[float],
        losses: list[Value],
        norm: Value | None,
        others: list[tuple[int, Value]],
        seeds: Sequence[tuple[str, list[float]]] = (),
    ) -> None:
        self.step = step
        self.time = time
        self.row = row
        self.losses = losses
        self.norm = norm
        self.others = others
        self.seeds = seeds

    def ready(self) -> bool:
        """Whether every value has arrived."""
        for loss in self.losses:
            if not isinstance(loss, float) and not loss.ready():
                return False
        for _, value in self.others:
            if not isinstance(value, float) and not value.ready():
                return False
        norm = self.norm
        return norm is None or isinstance(norm, float) or norm.ready()


class Sealer:
    """Puts values and statistics into rows; NaN and infinity are counted, never put.

    ``enriched`` False leaves the statistics out, which are gated.
    """

    __slots__ = ("_enriched", "_last_loss", "_loss", "_norm", "_waiting", "losses_are_shares")

    def __init__(self, *, enriched: bool) -> None:
        self.losses_are_shares = False
        """Whether the losses of a step's micro-batches add up to its loss, as where a
        framework has divided each by their number, and are not to be averaged."""
        self._enriched = enriched
        self._loss = WeightedStatistics()
        self._norm = WeightedStatistics()
        self._last_loss = nan
        self._waiting: deque[Unsealed] = deque()

    def memory(self, step: int, latest: Sequence[float]) -> Memory:
        """What coming rows depend on, after ``step``, whose newest whole row is ``latest``.

        Values that a device has not delivered yet are not in it.
        """
        return Memory(
            step,
            present(STEP_KEYS, latest),
            self._loss.moments,
            self._norm.moments,
            self._last_loss,
        )

    def recall(self, memory: Memory) -> None:
        """Go on from there."""
        self._loss.moments, self._norm.moments = memory.loss, memory.gradient_norm
        self._last_loss = memory.last_loss

    def seal_now(
        self,
        row: list[float],
        losses: list[Value],
        norm: Value | None,
        others: list[tuple[int, Value]],
    ) -> bool:
        """Seal a row whose values are all here, as on a CPU they are; False if one is not."""
        if self._waiting or (norm is not None and type(norm) is not float):
            return False
        for loss in losses:
            if type(loss) is not float:
                return False
        for _, value in others:
            if type(value) is not float:
                return False
        self._put(row, losses, norm, others)
        return True

    def take(self, frame: Unsealed) -> list[Unsealed]:
        """Take a step's frame; returns those that are sealed by now, oldest first."""
        waiting = self._waiting
        waiting.append(frame)
        sealed = []
        while waiting and (waiting[0].ready() or len(waiting) > DEEPEST_WAIT):
            sealed.append(waiting.popleft())
            self._seal(sealed[-1])
        return sealed

    def finish(self) -> list[Unsealed]:
        """No step follows: what waits is sealed with what has arrived."""
        sealed = list(self._waiting)
        self._waiting.clear()
        for frame in sealed:
            self._seal(frame)
        return sealed

    def _seal(self, frame: Unsealed) -> None:
        """With what has arrived; a loss is missing when one of its micro-batches is."""
        losses = [number for loss in frame.losses if (number := _arrived(loss)) is not None]
        self._put(
            frame.row,
            losses if len(losses) == len(frame.losses) else [],
            None if frame.norm is None else _arrived(frame.norm),
            [
                (slot, number)
                for slot, value in frame.others
                if (number := _arrived(value)) is not None
            ],
        )

    def _put(
        self,
        row: list[float],
        losses: list[Any],
        norm: Any,
        others: list[tuple[int, Any]],
    ) -> None:
        """Numbers and their statistics into ``row``. All of them are floats here."""
        enriched = self._enriched
        # "Minus the previous step's": after a step without a loss there is none.
        self._last_loss, last_loss = nan, self._last_loss
        if losses:
            loss = losses[0]
            if len(losses) > 1:
                loss = sum(losses) if self.losses_are_shares else sum(losses) / len(losses)
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
                    row[_LOSS_VOLATILITY] = statistics.deviation
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
        for slot, number in others:
            put(row, slot, number)


def put(row: list[float], slot: int, number: float) -> bool:
    """Put ``number`` into ``row``, or count it there when it is not finite."""
    if isfinite(number):
        row[slot] = number
        return True
    row[_NONFINITE] += 1.0
    return False


def put_optimizer(row: list[float], groups: list[dict[str, Any]]) -> None:
    """Mean learning rate and momentum of parameter groups, as far as the host has them."""
    if len(groups) == 1:
        group = groups[0]
        rate, momentum = group.get("lr"), group.get("momentum")
        if type(rate) is float and type(momentum) is float and isfinite(rate + momentum):
            row[_LR], row[_MOMENTUM] = rate, momentum
            return
    rates = momenta = 0.0
    known = with_momentum = 0
    for group in groups:
        rate = host_number(group.get("lr"))
        if rate is not None:
            rates += rate
            known += 1
        momentum = group.get("momentum")
        if momentum is None and "betas" in group:
            momentum = group["betas"][0]
        momentum = host_number(momentum)
        if momentum is not None:
            momenta += momentum
            with_momentum += 1
    if known and known == len(groups):
        put(row, _LR, rates / known)
    if with_momentum:
        put(row, _MOMENTUM, momenta / with_momentum)


def host_number(value: object) -> float | None:
    """``value`` as a float when that needs no device: numbers, and tensors on the CPU."""
    if type(value) is float:
        return value
    if isinstance(value, int | float):
        return float(value)
    if getattr(getattr(value, "device", None), "type", None) == "cpu":
        return float(value)  # type: ignore[arg-type]
    return None


def _arrived(value: Value) -> float | None:
    return value if isinstance(value, float) else value.value()
