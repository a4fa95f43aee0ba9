"""Which of several optimizers sets the steps of a run, and what optimizers hold."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from esper_otel.tolaria.identities import IdentityMap

PATIENCE = 8
"""Steps of another optimizer, beyond twice the most that a cycle ever had, after which the
primary is taken to have ended."""


class Primary:
    """Chooses the optimizer whose every step is one step of the run.

    It is the first that steps, so that a loop with several (a generator and its critic)
    counts one step per cycle. Another takes its place when it is gone, when one steps that
    took no part in the cycles so far (one made anew for the next part of the training), or
    when it has rested for far longer than any cycle lasted.

    ``wanted`` overrides this: the name of a class (``AdamW``), or a number, the place in
    the order in which optimizers first stepped, from 0.
    """

    def __init__(self, wanted: str = "") -> None:
        self._wanted = wanted
        self._places: IdentityMap[int] = IdentityMap()
        self._next_place = 0
        self._ref: weakref.ref[Any] | None = None
        self._steps = 0
        self._others = 0
        self._most_others = 0

    @property
    def current(self) -> Any:
        """The optimizer that was chosen, None when there is none or it is gone."""
        return None if self._ref is None else self._ref()

    @property
    def is_named(self) -> bool:
        """Whether the user has said which it is."""
        return bool(self._wanted)

    @property
    def patience(self) -> int:
        """Steps of others in a row after which it is taken to have ended."""
        return 2 * self._most_others + PATIENCE

    def may_be(self, optimizer: Any) -> bool:
        """Whether ``optimizer`` is the one, or none has been chosen yet."""
        current = self.current
        return current is None or current is optimizer

    def begins(self, optimizer: Any, preferred: Any = None) -> bool:
        """``optimizer`` is about to step; returns whether that is a step of the run.

        ``preferred`` is one that the user named in code; it wins over everything.
        """
        current = self.current
        if current is optimizer and (preferred is None or preferred is current):
            self._steps += 1
            if self._others:
                self._most_others = max(self._most_others, self._others)
                self._others = 0
            return True
        place = self._places.get(optimizer)
        is_new = place is None
        if place is None:
            place = self._places[optimizer] = self._next_place
            self._next_place += 1
        if not self._takes_over(optimizer, place, is_new, preferred):
            return False
        self._ref = weakref.ref(optimizer)
        self._steps, self._others, self._most_others = 1, 0, 0
        return True

    def _takes_over(self, optimizer: Any, place: int, is_new: bool, preferred: Any) -> bool:
        if preferred is not None:
            return optimizer is preferred
        if self._wanted:
            named = type(optimizer).__name__ == self._wanted and self.may_be(optimizer)
            return named or str(place) == self._wanted
        if self.current is None or (is_new and self._steps > 1):
            return True
        self._others += 1
        return self._others > 2 * self._most_others + PATIENCE


def parameters_of(*optimizers: Any) -> list[Any]:
    """Those of all their groups."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [each for group in groups for each in group["params"]]


class ParameterPlace(NamedTuple):
    """Where a parameter is in the groups of its optimizer, which keeps it alive.

    A weak reference to the parameter itself would make ``torch.utils.swap_tensors`` raise.
    """

    optimizer: weakref.ref[Any]
    group: int
    number: int


def place_of(parameter: Any, optimizer: Any) -> ParameterPlace | None:
    """That of ``parameter``, one of ``optimizer``'s."""
    for number, group in enumerate(optimizer.param_groups):
        for place, each in enumerate(group["params"]):
            if each is parameter:
                return ParameterPlace(weakref.ref(optimizer), number, place)
    return None


def parameter_at(place: ParameterPlace | None) -> Any:
    """The parameter at ``place``; None once that, or its optimizer, is gone."""
    optimizer = None if place is None else place[0]()
    if place is None or optimizer is None:
        return None
    try:
        return optimizer.param_groups[place[1]]["params"][place[2]]
    except (LookupError, TypeError):
        return None


def place_in(*optimizers: Any) -> ParameterPlace | None:
    """Where the first parameter of ``optimizers`` is that gets a gradient at all."""
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            for place, each in enumerate(group["params"]):
                if each.requires_grad:
                    return ParameterPlace(weakref.ref(optimizer), number, place)
    return None


def gradient_at(place: ParameterPlace | None) -> tuple[int, int] | None:
    """What changes when a gradient of the parameter there comes, goes or is changed."""
    parameter = parameter_at(place)
    gradient = None if parameter is None else parameter.grad
    return None if gradient is None else (id(gradient), gradient._version)
