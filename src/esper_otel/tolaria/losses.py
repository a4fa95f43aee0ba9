"""The losses that ``backward`` was called on in one step, and the one loss that they make.

Of one call it is that call's. Of several it is decided by what is known of them; the first of
these that holds:

=================================================== ==========================================
the calls of a step                                 its loss
=================================================== ==========================================
are of shares, as a setting or a framework says     the sum
are each of a loss that was divided by their        the sum; where a last step has fewer calls
number                                              than that, the mean of what was divided
are of parts that make one whole (0.25 and 0.75)    the sum
are of several losses of one batch: a graph is      the sum over each batch, the mean over
kept for the next call, the last operations of the  batches
losses differ, or another optimizer's parameters
get no gradients (a critic's two losses)
are anything else: micro-batches                    the mean
=================================================== ==========================================

Not all that was evaluated counts. With weights changed between two calls (SAM), the first
counts: it is that of the weights the step began with. With gradients thrown away between them
(an attack on the inputs, an attempt that failed) what was before does not count.
"""

from __future__ import annotations

from collections import Counter, deque
from enum import StrEnum
from typing import NamedTuple

from esper_otel.leyline.frames import Reading, Value, arrived

MOST_UNDER_WAY = 64
"""Losses of one step that a device may still have to deliver. Beyond it their sum is lost."""


class ConditionalReading:
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
        return None if self._doubt.value() else arrived(self._value)


class Sum:
    """Losses added up that a device still has to deliver; lost when one of them is."""

    __slots__ = ("_total", "_under_way")

    def __init__(self, first: Value) -> None:
        self._total: float | None = 0.0
        self._under_way: deque[Reading] = deque()
        self.add(first)

    def add(self, loss: Value) -> None:
        """One more."""
        if isinstance(loss, float):
            self._take(loss)
            return
        self._under_way.append(loss)
        if len(self._under_way) > MOST_UNDER_WAY:
            self.ready()
            if len(self._under_way) > MOST_UNDER_WAY:
                self._take(None)

    def ready(self) -> bool:
        """Whether all of them have arrived, or the sum is lost."""
        while self._under_way and self._under_way[0].ready():
            self._take(self._under_way.popleft().value())
        return not self._under_way

    def value(self) -> float | None:
        """The sum; None when it is lost or not all here yet."""
        return self._total if self.ready() else None

    def _take(self, number: float | None) -> None:
        if self._total is None or number is None:
            self._total = None
            self._under_way.clear()
        else:
            self._total += number


def plus(total: Value | None, loss: Value) -> Value:
    """``total`` and one more loss of the same step; None is the total of no loss."""
    if total is None:
        return loss
    if isinstance(total, float) and isinstance(loss, float):
        return total + loss
    if not isinstance(total, Sum):
        total = Sum(total)
    total.add(loss)
    return total


class Follows(StrEnum):
    """What an evaluation is to that before it in the same step."""

    ANOTHER = "another"
    AFRESH = "afresh"
    """With other weights, and no gradients of before."""
    INSTEAD = "instead"
    """The gradients of before were thrown away."""


class Evaluation(NamedTuple):
    """What is known of a call of ``backward``, besides its loss.

    ``divisor`` is that of the last operation of the loss, 0 where that is no division by a
    number of the host. ``batch`` names the iterator that a batch came from since the call
    before, 0 where none did. ``operations`` are the names of the last ones, ``keeps_graph``
    says that another call may go through it, ``spares_others`` that another optimizer of the
    loop has got no gradient by it.
    """

    divisor: float = 0.0
    batch: int = 0
    operations: tuple[str, ...] = ()
    keeps_graph: bool = False
    spares_others: bool = False
    follows: Follows = Follows.ANOTHER


class Assumed(StrEnum):
    """What the loss of a step with several calls was taken for."""

    SHARES = "shares"
    SEPARATE = "separate losses"
    MEAN = "micro-batches"


_NO_LOSS: tuple[None, float] = None, 0


class StepLosses:
    """The losses of the step under way; :meth:`start_next` turns to the next."""

    def __init__(self) -> None:
        self.all_prescaled = False
        """Whether all losses are shares of a step's, from here on."""
        self.divisor = 0.0
        """By what losses were divided in a step that had as many calls; 0: none were."""
        self._parts_per_call = 1.0
        """Of the newest step of which all calls are known."""
        self._evaluations: list[Evaluation] = []
        self.start_next()

    def start_next(self) -> None:
        """The step is over, or was left out: nothing of it is kept."""
        self._before_closure = 0
        self._total: Value | None = None
        self._count = 0
        if self._evaluations:
            self._evaluations = []
        self._of_another: tuple[Value | None, float] = _NO_LOSS
        self._reported: Value | None = None
        self._reports: float = 0
        self._prescaled = self.all_prescaled

    def take_over(self, other: StepLosses) -> None:
        """What ``other`` has of the step under way is of this training, and not of that."""
        own = {
            "all_prescaled": self.all_prescaled,
            "divisor": self.divisor,
            "_parts_per_call": self._parts_per_call,
        }
        self.__dict__.update(other.__dict__ | own)
        self._prescaled = self._prescaled or self.all_prescaled
        other.start_next()

    def add(self, loss: Value, evaluation: Evaluation | None, *, optimizing: bool) -> None:
        """``backward`` was called on ``loss``; ``optimizing``: within an optimizer's closure.

        Of the losses that a closure computes the first counts: it is that of the parameters
        the step began with, and what ``step()`` returns.
        """
        if optimizing and self._count > self._before_closure:
            return
        if evaluation is not None:
            if evaluation.follows is Follows.AFRESH and self._count:
                return
            if evaluation.follows is Follows.INSTEAD:
                self._total, self._count = None, 0
                self._evaluations.clear()
            self._evaluations.append(evaluation)
        self._total = loss if self._total is None else plus(self._total, loss)
        self._count += 1

    def throw_away(self) -> None:
        """What was evaluated so far in this step was no loss of it."""
        self._total, self._count = None, 0
        self._evaluations.clear()

    def closure_begins(self) -> None:
        """What is evaluated from here on, a closure does within the optimizer's step."""
        self._before_closure = self._count

    def another_stepped(self) -> None:
        """An optimizer has stepped whose steps are not the run's: so far it was its loss.

        It is the step's as well only if no other follows, as where one loss trains both.
        """
        if self._count:
            self._of_another = self._total, self._parts
            self.throw_away()

    def report(self, loss: Value) -> None:
        """The loop tells a loss itself, which takes the place of all others."""
        self._reported = plus(self._reported, loss)
        self._reports += 1

    def prescaled(self, shares: bool = True, *, always: bool = False) -> None:
        """Losses of this step are shares of it; ``always``: those of coming steps as well."""
        self._prescaled = shares
        if always:
            self.all_prescaled = shares

    def doubt(self, skipped: Reading) -> None:
        """The loss is not to be told if ``skipped`` arrives and is not zero."""
        loss, parts = self.value
        if loss is not None:
            self._reported, self._reports = ConditionalReading(loss, skipped), parts

    @property
    def value(self) -> tuple[Value | None, float]:
        """The losses of the step added up, and by what their sum is to be divided."""
        if self._reports:
            return self._reported, self._reports
        if self._count == 1 and not self.divisor:  # most steps
            return self._total, 1
        if not self._count:
            loss, parts = self._of_another
            return loss, 1 if self._prescaled else parts
        return self._total, self._parts

    @property
    def assumed(self) -> Assumed | None:
        """What several calls were taken for; None where there was one, or it is certain.

        So it is where that was said, and where each had a batch of its own.
        """
        if self._count < 2 or not self._evaluations or self._reports or self._prescaled:
            return None
        divisor = self._common_divisor()
        if divisor or self._are_parts():
            return Assumed.SHARES
        if self._are_separate():
            return Assumed.SEPARATE
        certain = all(each.batch for each in self._evaluations)
        return None if certain else Assumed.MEAN

    @property
    def evaluations(self) -> list[Evaluation]:
        """What is known of the calls of this step, as far as anybody has looked at them."""
        return self._evaluations

    @property
    def _parts(self) -> float:
        count = self._count
        if self._prescaled:
            return 1
        if count < 2 and not self.divisor:
            return count
        if not self._evaluations:
            return count * self._parts_per_call
        parts = self._parts_of_known(count)
        if len(self._evaluations) == count > 1:
            self._parts_per_call = parts / count
        return parts

    def _parts_of_known(self, count: int) -> float:
        divisor = self._common_divisor()
        if divisor:
            return count / divisor
        if count < 2 or self._are_parts():
            return 1
        if self._are_separate():
            batches = Counter(each.batch for each in self._evaluations if each.batch)
            return max(batches.values(), default=1)
        return count

    def _common_divisor(self) -> float:
        """What all losses were divided by, if that is a number of micro-batches; else 0."""
        divisors = {each.divisor for each in self._evaluations}
        divisor = divisors.pop() if len(divisors) == 1 else 0.0
        if divisor == self._count > 1:
            self.divisor = divisor
        return divisor if divisor == self.divisor else 0.0

    def _are_parts(self) -> bool:
        """Whether losses were weighted by numbers whose sum is 1."""
        weights = [1 / each.divisor for each in self._evaluations if each.divisor > 0]
        return len(weights) == self._count > 1 and abs(sum(weights) - 1) < 1e-6

    def _are_separate(self) -> bool:
        first = self._evaluations[0] if self._evaluations else None
        for each in self._evaluations:
            if each.keeps_graph:
                return True
            own_batch = each is first or (each.batch and each.batch == first.batch)  # type: ignore[union-attr]
            if own_batch:
                continue
            if each.spares_others or each.operations != first.operations:  # type: ignore[union-attr]
                return True
        return False
