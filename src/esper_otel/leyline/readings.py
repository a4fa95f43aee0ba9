"""Readings: numbers that a device may still have to deliver, without waiting for them."""

from __future__ import annotations

from math import nan
from typing import Protocol


class Reading(Protocol):
    """A number that a device still has to deliver."""

    def ready(self) -> bool:
        """Whether it has arrived; never waits for it."""

    def value(self) -> float | None:
        """The number; None when it has been lost or is not here yet."""


Value = float | Reading
"""A number, or one that a device still has to deliver."""


def arrived(value: Value) -> float | None:
    """The number; None when it has been lost or is not here yet."""
    return value if isinstance(value, float) else value.value()


def known(value: Value) -> float:
    """As :func:`arrived`, with NaN for what is not known."""
    number = arrived(value)
    return nan if number is None else number


def delivered(value: Value) -> float | None:
    """The number, NaN where it was lost; None while it is on its way."""
    if isinstance(value, float):
        return value
    return known(value) if value.ready() else None
