"""What decisions do to an update: its learning rate scaled, its gradients clipped or withheld.

All of it is done just before an optimizer's step does its work and taken back just after, so
that a schedule, a checkpoint or a logger only ever sees the script's own values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from esper_otel.tolaria.step_guards import GUARDS


class Optimizer(Protocol):
    """As much of ``torch.optim.Optimizer`` as an update touches."""

    param_groups: list[dict[str, Any]]


class UpdateOrder(NamedTuple):
    """What is to be done to one update.

    ``lr_scale`` multiplies the learning rates for this update alone. Where ``max_norm`` is
    set, gradients whose norm is greater are scaled down to it. ``skip`` leaves it out.
    """

    lr_scale: float = 1.0
    max_norm: float | None = None
    skip: bool = False


AS_IT_IS = UpdateOrder()


class _Changes:
    """What was changed for one step of one optimizer, to be put back."""

    __slots__ = ("factor", "gradients", "numbers", "tensors")

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.numbers: list[tuple[dict[str, Any], Any, Any]] = []
        """Groups whose rate was exchanged: group, the script's object, ours."""
        self.tensors: list[tuple[Any, Any]] = []
        """Rates changed in place: the script's tensor, and a copy of its value."""
        self.gradients: list[tuple[Any, Any]] = []
        """Parameters and the gradients that were taken from them."""


class Updates:
    """Scales, clips or withholds the updates of a loop's optimizers, and puts all back.

    A rate that is a number is exchanged for another number. One that is a tensor is changed
    in place, on its device and without being read, because a compiled step reads that very
    tensor. What is no rate at all (None, as relative Adafactor has) is left alone.
    """

    def __init__(self) -> None:
        self._changed: dict[int, _Changes] = {}
        """By the ``id`` of the optimizers that are within a step."""
        self._taken: set[int] = set()
        """``id`` of groups and rates that are changed now: optimizers that wrap another one
        share its groups, and one tensor may be the rate of several groups."""

    def begin(
        self,
        optimizer: Optimizer,
        factor: float,
        order: UpdateOrder = AS_IT_IS,
        norm: float | None = None,
    ) -> bool:
        """``optimizer`` is about to step: use its rates times ``factor``, and do ``order``.

        ``norm`` is that of its gradients, as far as it is known. Returns whether a rate was
        scaled. :meth:`end` puts everything back; so does a step that raises, once
        :meth:`guard` has been called.
        """
        if id(optimizer) in self._changed:  # it was left by an exception, unguarded
            self.end(optimizer)
        factor *= order.lr_scale
        if factor == 1.0 and not order.skip and order.max_norm is None:
            return False
        changes = self._changed[id(optimizer)] = _Changes(factor)
        if order.skip:
            self._withhold(optimizer, changes)
            return False
        if order.max_norm is not None and norm is not None and norm > order.max_norm:
            _clip(optimizer, order.max_norm / norm)
        if factor == 1.0:
            return False
        return self._scale(optimizer, changes)

    def end(self, optimizer: Optimizer) -> None:
        """``optimizer`` has stepped, or has failed to: put back what was the script's."""
        changes = self._changed.pop(id(optimizer), None)
        if changes is None:
            return
        self._put_rates_back(changes)
        for parameter, gradient in changes.gradients:
            parameter.grad = gradient

    def with_own_rates(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        """``closure``, in which the rates of ``optimizer`` are the script's own.

        For one that the optimizer calls within its step. As it is when no rate is scaled.
        """
        changes = self._changed.get(id(optimizer))
        if changes is None or not (changes.numbers or changes.tensors):
            return closure

        @functools.wraps(closure)
        def with_own(*args: Any, **kwargs: Any) -> Any:
            self._put_rates_back(changes)
            try:
                return closure(*args, **kwargs)
            finally:
                if self._changed.get(id(optimizer)) is changes:
                    self._scale(optimizer, changes)

        return with_own

    def _put_rates_back(self, changes: _Changes) -> None:
        for group, own, ours in changes.numbers:
            self._taken.discard(id(group))
            if group.get("lr") is ours:  # or the script has set another one meanwhile
                group["lr"] = own
        for rate, value in changes.tensors:
            self._taken.discard(id(rate))
            rate.copy_(value)
        changes.numbers.clear()
        changes.tensors.clear()

    def guard(self, optimizer: Any) -> None:
        """From its next step on, put everything back also when ``optimizer`` raises."""
        GUARDS.watch(optimizer, self)

    def close(self) -> None:
        """No step follows."""
        GUARDS.leave(self)

    def _scale(self, optimizer: Optimizer, changes: _Changes) -> bool:
        scaled, factor = False, changes.factor
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if rate is None or isinstance(rate, bool) or id(group) in self._taken:
                continue
            if isinstance(rate, int | float):
                ours: Any = rate * factor
            elif not hasattr(rate, "mul_"):
                continue
            elif getattr(rate, "requires_grad", False):
                ours = rate * factor  # part of the script's own graph
            else:
                if id(rate) not in self._taken:
                    changes.tensors.append((rate, rate.clone()))
                    self._taken.add(id(rate))
                    rate.mul_(factor)
                scaled = True
                continue
            changes.numbers.append((group, rate, ours))
            self._taken.add(id(group))
            group["lr"] = ours
            scaled = True
        return scaled

    @staticmethod
    def _withhold(optimizer: Optimizer, changes: _Changes) -> None:
        """No parameter has a gradient for this one step: every optimizer leaves those out."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    changes.gradients.append((parameter, parameter.grad))
                    parameter.grad = None


def _clip(optimizer: Optimizer, share: float) -> None:
    """In place, as ``torch.nn.utils.clip_grad_norm_`` does."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.detach().mul_(share)
