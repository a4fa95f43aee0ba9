"""Evaluations: distinguishes the calls of ``backward`` in one step by the autograd graph.

The rules are :mod:`esper_otel.tolaria.losses`'s; here is found what they ask for. It is
looked for at the first steps of a training, and where the number of calls changes, until a
few steps in a row had the same to say. Then a step pays for an addition. Of weights and
gradients one parameter is looked at, the first of an optimizer that got a gradient: whether
it was changed in place says its version, which torch counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from esper_otel.integrations.primary import (
    ParameterPlace,
    gradient_at,
    parameter_at,
    place_in,
)
from esper_otel.loop import tell_once
from esper_otel.tolaria.losses import Assumed, Evaluation, Follows, StepLosses

LOOKED_AT = 4
"""First steps of a training of which all calls are looked at."""

ALIKE = 8
"""Steps with several calls that have to say the same until nobody looks any more."""

MOST_OPTIMIZERS = 8
"""Beyond that many (one per parameter) nobody is spared by a loss."""

DEPTH = 6
"""Operations of a loss that are compared, from the last one backwards."""

ELEMENTS = 8
"""Of a weight on the CPU, which some change without its version: as many are compared."""

ASSUMED = {
    Assumed.SHARES: "the sum, as each is divided by their number",
    Assumed.SEPARATE: "the sum, as they are several losses of one batch; run.report(loss=...) "
    "records another",
    Assumed.MEAN: "the mean, as of micro-batches; ESPER_LOSSES_PRESCALED=true records the sum",
}
"""What is said once of steps with several calls of ``backward``."""

_COPIES = ("ToCopyBackward0", "CloneBackward0", "ViewBackward0", "SqueezeBackward0")
_QUOTIENTS = {"DivBackward0": 1.0, "MulBackward0": -1.0}


class Evaluations:
    """The calls of the step under way."""

    def __init__(self) -> None:
        self.looks = True
        """Whether the calls of the step under way are looked at from the first on."""
        self.calls = 0
        """Calls in the step under way."""
        self.batch = 0
        """The iterator that a batch came from since the call before, 0 where none did."""
        self.expected = 0
        """Calls in a step, where it is known what they are; 0: in any but the first."""
        self._steps_left = LOOKED_AT
        self._alike = 0
        self._said: list[tuple[Any, ...]] = []
        self._is_ordinary = True
        """Whether nothing was evaluated afresh, or instead of another, in this step."""
        self._assumed: set[Assumed] = set()
        self._found: Evaluation | None = None
        self.looked = False
        """Whether the call under way is looked at."""
        self._gradients: list[tuple[ParameterPlace, Any]] = []
        self._sample: ParameterPlace | None = None
        self._after: tuple[Any, ...] = ()
        self._receivers: list[ParameterPlace] = []
        """What got a gradient by the newest call that was looked at."""

    def training_changed(self) -> None:
        """The loop works on another training."""
        self._steps_left = LOOKED_AT
        self.looks, self.expected = True, 0
        self._alike, self._sample = 0, None
        self._receivers = []

    def begins(
        self, loss: Any, *, keeps_graph: bool, optimizers: Callable[[], Iterable[Any]]
    ) -> None:
        """``backward`` is about to be called on ``loss``, a tensor of one element.

        ``optimizers`` gives those of the loop, as far as they are known.
        """
        calls, self.calls = self.calls, self.calls + 1
        batch, self.batch = self.batch, 0
        divisor, operations = _last_operations(loss)
        follows = self._relation() if calls else Follows.ANOTHER
        if follows is not Follows.ANOTHER:
            self._is_ordinary = False
        self.looked = True
        self._found = Evaluation(
            divisor, batch, operations, keeps_graph=keeps_graph, follows=follows
        )
        samples = [place_in(each) for each in optimizers()]
        self._gradients = [(each, gradient_at(each)) for each in samples if each is not None]

    def evaluated(self) -> Evaluation | None:
        """It was; what is known of it, None where nobody has looked."""
        found, self._found = self._found, None
        self.looked = False
        if found is None:
            return None
        got, spared = [], 0
        for place, before in self._gradients:
            if parameter_at(place) is None:
                continue
            now = gradient_at(place)
            if now is not None and now != before:
                got.append(place)
            else:
                spared += 1
        sample = parameter_at(self._sample)
        if got and (sample is None or all(parameter_at(each) is not sample for each in got)):
            self._sample = got[0]
        self._after = self._state()
        self._receivers = got
        if got and spared > 0 and len(self._gradients) <= MOST_OPTIMIZERS:
            found = found._replace(spares_others=True)
        return found

    def optimizer_stepped(self) -> None:
        """Weights have changed, by an optimizer of torch."""
        self._sample, self._after = None, ()

    def ends_as_ever(self) -> bool:
        """A step of the run is over; whether nothing is to be learnt of its losses."""
        if self.calls != self.expected or self.looks:
            return False
        self.calls = 0
        return True

    def step_ended(self, losses: StepLosses) -> None:
        """A step of the run is over that did not end as ever, with these ``losses``."""
        calls, self.calls = self.calls, 0
        self._sample, self._after = None, ()
        self._tell_assumed(losses)
        self._steps_left = max(self._steps_left - 1, 0)
        said = [(bool(each.batch), *each[2:], each.divisor) for each in losses.evaluations]
        same = calls > 1 and self._is_ordinary and said == self._said
        self._is_ordinary = True
        self._alike = self._alike + 1 if same else 0
        self._said = said
        self.expected = calls if calls < 2 or self._alike >= ALIKE else 0
        self.looks = self._steps_left > 0 or (calls > 1 and not self.expected)

    def _tell_assumed(self, losses: StepLosses) -> None:
        """Say once what the loss of a step with several calls was taken for."""
        assumed = losses.assumed
        if assumed is not None and assumed not in self._assumed:
            self._assumed.add(assumed)
            tell_once(
                "esper-otel: backward is called several times a step; the loss recorded is "
                + ASSUMED[assumed]
            )

    def _relation(self) -> Follows:
        if not self.looks and self.calls == self.expected + 1 and self._left_nothing():
            return Follows.INSTEAD
        before, now = self._after, self._state()
        if not before or not now or before == now:
            return Follows.ANOTHER
        (gradient, version, values), (gradient_now, version_now, values_now) = before, now
        if version != version_now or values != values_now:
            return Follows.AFRESH
        thrown_away = gradient is not None and gradient != gradient_now
        return Follows.INSTEAD if thrown_away else Follows.ANOTHER

    def _left_nothing(self) -> bool:
        """Whether no gradient is left of the calls so far, at which nobody has looked.

        They were as many as usual, so this one is more: those before it measured something,
        as the curvature at every tenth update (Sophia), and ``zero_grad`` followed. One that
        writes zeros in place is not recognised: a gradient may be zero by itself.
        """
        places = [each for each in self._receivers if parameter_at(each) is not None]
        return bool(places) and all(gradient_at(each) is None for each in places)

    def _state(self) -> tuple[Any, ...]:
        parameter = parameter_at(self._sample)
        if parameter is None:
            return ()
        values = None
        # One made of other tensors gives no list, or only by a collective.
        if parameter.device.type == "cpu" and not hasattr(parameter, "__tensor_flatten__"):
            values = parameter.detach().reshape(-1)[:ELEMENTS].tolist()
        return gradient_at(self._sample), parameter._version, values


def _last_operations(loss: Any) -> tuple[float, tuple[str, ...]]:
    """By what ``loss`` was divided at last, 0 where it was not, and its last operations."""
    node = loss.grad_fn
    operations: list[str] = []
    while node is not None and len(operations) < DEPTH:
        operations.append(node.name())
        node = _next(node)
    node = loss.grad_fn
    while node is not None and node.name() in _COPIES:
        node = _next(node)
    return (0.0 if node is None else _divisor(node)), tuple(operations)


def _next(node: Any) -> Any:
    return next((each for each, _ in node.next_functions if each is not None), None)


def _divisor(node: Any) -> float:
    sign = _QUOTIENTS.get(node.name())
    inner = _next(node)
    if sign is None or inner is None or inner.name().startswith("SumBackward"):
        return 0.0  # a sum over samples, whose number it is divided by
    if sum(each is not None for each, _ in node.next_functions) != 1:
        return 0.0  # a quotient of two results
    other = getattr(node, "_saved_other", None)
    if other is None:
        other = getattr(node, "_saved_self", None)
    if other is None or other.device.type != "cpu" or other.numel() != 1:
        return 0.0
    number = float(other)
    if number <= 0.0:
        return 0.0
    divisor = number if sign > 0 else 1.0 / number
    nearest = round(divisor)
    return float(nearest) if nearest and abs(divisor - nearest) < 1e-6 * nearest else divisor
