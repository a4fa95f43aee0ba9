"""Rates: learning rate and momentum of an optimizer's groups, read without a device."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Real
from typing import Any

from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.tolaria.seal import put

_LR = STEP_SLOT["optimizer_lr"]
_LR_BASE = STEP_SLOT["optimizer_lr_base"]
_MOMENTUM = STEP_SLOT["optimizer_momentum"]
_PAIRS = (tuple, list)


Rates = Sequence[dict[str, Any]]
"""What groups of an optimizer had, under the names that :func:`put_optimizer` looks at."""


class BaseRate:
    """The learning rate that a run is meant to have at most, as far as that is said.

    It is the mean of ``initial_lr``, which every schedule of torch writes into the groups; in a
    loop that sets its rates by hand it is the first rate that was seen.
    """

    __slots__ = ("first",)

    def __init__(self) -> None:
        self.first: float | None = None
        """Of a loop that sets its rates by hand: the first that was seen."""

    def of(self, groups: Rates) -> float | None:
        """The base rate of ``groups``; None where the host knows none."""
        if self.first is not None and "initial_lr" not in groups[0]:
            return self.first
        base = _mean_of("initial_lr", groups)
        if base is not None and isfinite(base):
            return base
        if self.first is None:
            first = mean_rate(groups)
            self.first = first if first is not None and isfinite(first) else None
        return self.first


def put_optimizer(
    row: list[float],
    groups: Rates,
    factor: float,
    base: BaseRate,
    momentum_factor: float = 1.0,
) -> None:
    """Mean learning rate used, base rate and momentum used of parameter groups, as far as the
    host has them.

    ``factor`` is what decisions multiplied the script's own rates by, and ``momentum_factor``
    its momentum. A group may hold anything under these names: what is no number of the host
    leaves its metric out.
    """
    if len(groups) == 1 and _put_group(row, groups[0], factor, base, momentum_factor):
        return
    base_rate = base.of(groups) if groups else None
    if base_rate is not None and isfinite(base_rate):  # the rate itself counts what is not
        row[_LR_BASE] = base_rate
    rate = mean_rate(groups)
    if rate is not None:
        put(row, _LR, rate * factor)
    momentum = mean_momentum(groups)
    if momentum is not None:
        put(row, _MOMENTUM, momentum * momentum_factor)


def _put_group(
    row: list[float],
    group: dict[str, Any],
    factor: float,
    base: BaseRate,
    momentum_factor: float,
) -> bool:
    """As :func:`put_optimizer` for one group whose values are floats of the host, as nearly all
    are; False where one is none, or not finite."""
    rate, momentum = group.get("lr"), group.get("momentum")
    if momentum is None and type(betas := group.get("betas")) is tuple and betas:
        momentum = betas[0]
    base_rate = group.get("initial_lr", base.first)
    if not type(rate) is type(momentum) is type(base_rate) is float:
        return False
    total = rate + momentum + base_rate
    if total - total != 0.0:
        return False
    row[_LR], row[_LR_BASE] = rate * factor, base_rate
    row[_MOMENTUM] = momentum * momentum_factor
    return True


_NAMES = ("lr", "momentum", "betas", "initial_lr")


def host_rates(groups: list[dict[str, Any]]) -> Rates | None:
    """What ``groups`` have now; None where any of it may change later, as a tensor does."""
    if len(groups) == 1:  # and floats, as nearly all are
        get = groups[0].get
        rate, momentum, base = get("lr"), get("momentum"), get("initial_lr")
        if momentum is None and type(betas := get("betas")) is tuple and betas:
            momentum = betas[0]
        if type(rate) is type(momentum) is float:
            if base is None:
                return ({"lr": rate, "momentum": momentum},)
            if type(base) is float:
                return ({"lr": rate, "momentum": momentum, "initial_lr": base},)
    rates = []
    for group in groups:
        had = {}
        for name in _NAMES:
            if name in group:
                value = had[name] = group[name]
                kind = type(value)
                if kind is not float and value is not None:
                    if kind is not tuple:
                        return None
                    for part in value:
                        if type(part) is not float:
                            return None
        rates.append(had)
    return rates


def mean_rate(groups: Rates) -> float | None:
    """Mean of the groups' learning rates; None unless all are numbers of the host."""
    return _mean_of("lr", groups)


def mean_momentum(groups: Rates) -> float | None:
    """Mean momentum of the groups whose momentum is a number of the host; None without one."""
    known = [number for group in groups if (number := _momentum_of(group)) is not None]
    return sum(known) / len(known) if known else None


def _mean_of(name: str, groups: Rates) -> float | None:
    total = 0.0
    for group in groups:
        rate = host_number(group.get(name))
        if rate is None:
            return None
        total += rate
    return total / len(groups) if groups else None


def _momentum_of(group: dict[str, Any]) -> float | None:
    """``momentum``, or the first of ``betas``."""
    momentum = group.get("momentum")
    if momentum is None:
        betas = group.get("betas")
        momentum = betas[0] if type(betas) in _PAIRS and betas else None
    return host_number(momentum)


def host_number(value: object) -> float | None:
    """``value`` as a float when that needs no device: numbers, and tensors on the CPU."""
    if type(value) is float:
        return value
    if value is None:
        return None
    try:
        if isinstance(value, (int, float, Real)):  # numpy's numbers as well
            return float(value)
        if getattr(getattr(value, "device", None), "type", None) != "cpu":
            return None
        return float(value.detach())  # type: ignore[attr-defined]
    except Exception:  # a vector, for example, or something of the script's own
        return None
