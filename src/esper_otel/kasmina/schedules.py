"""Schedules: how alpha rises from 0 to 1 over a number of steps.

A schedule is a function of (step, steps, temperature). It gives exactly 0.0 at step 0
and before, exactly 1.0 at step ``steps`` and after, and never falls in between. It raises
``ValueError`` for ``steps`` below 1 and for a temperature that is not positive.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, isfinite, pi, tanh
from typing import NamedTuple

Schedule = Callable[[int, int, float], float]

_REACH = 6.0
"""The sigmoid runs over [-6, 6] at temperature 1: from 0.25 % to 99.75 % before scaling."""


def linear(step: int, steps: int, temperature: float = 1.0) -> float:
    """The same amount every step; ``temperature`` has no meaning here."""
    return _share(step, steps, temperature)


def cosine(step: int, steps: int, temperature: float = 1.0) -> float:
    """Half a period of a cosine; ``temperature`` has no meaning here.

    The annealing of Loshchilov and Hutter, "SGDR" (2017), arXiv 1608.03983, upside down.
    """
    share = _share(step, steps, temperature)
    return (1.0 - cos(pi * share)) / 2.0 if 0.0 < share < 1.0 else share


def sigmoid(step: int, steps: int, temperature: float = 1.0) -> float:
    """A logistic curve, scaled so that its ends are 0 and 1.

    A low ``temperature`` makes it a jump in the middle, a high one a straight line. In
    tanh, which does not overflow: logistic(x) = (1 + tanh(x / 2)) / 2.
    """
    share = _share(step, steps, temperature)
    if not 0.0 < share < 1.0:
        return share
    end = _REACH / temperature / 2.0
    # So hot that tanh rounds to nothing: the limit is the straight line.
    if tanh(end) == 0.0:
        return share
    return min(max((1.0 + tanh(end * (2.0 * share - 1.0)) / tanh(end)) / 2.0, 0.0), 1.0)


SCHEDULES: dict[str, Schedule] = {"linear": linear, "cosine": cosine, "sigmoid": sigmoid}
"""Schedules by the name that settings give them."""


class Course(NamedTuple):
    """The way of one alpha from 0 to 1: a schedule by name, its length and temperature.

    A seed keeps the one it began to blend by, whatever the settings are by then.
    """

    schedule: str
    steps: int
    temperature: float

    def alpha(self, step: int) -> float:
        """Alpha after ``step`` steps; raises as schedules do, ``KeyError`` for the name."""
        return SCHEDULES[self.schedule](step, self.steps, self.temperature)


def _share(step: int, steps: int, temperature: float) -> float:
    if steps < 1:
        raise ValueError(f"steps={steps!r}: expected at least 1")
    if not (temperature > 0.0 and isfinite(temperature)):
        raise ValueError(f"temperature={temperature!r}: expected a number above 0")
    return min(max(step / steps, 0.0), 1.0)
