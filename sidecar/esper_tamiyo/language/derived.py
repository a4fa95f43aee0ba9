"""Metrics that no trainer sends: Tamiyo works them out of those that it gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from esper_otel.leyline.custom import custom_metric, is_custom
from esper_otel.leyline.metrics import BY_KEY, Metric

Values = Mapping[str, float]


class Derived(NamedTuple):
    """One worked-out metric of a seed; ``of`` gives None where it cannot be told."""

    metric: Metric
    of: Callable[[Values], float | None]


def cosine(values: Values) -> float | None:
    """Cosine of the angle between what comes back through seed and host.

    Unknown without isolation statistics, and where a norm is zero: an isolated seed sends
    nothing back, which is neither agreement nor conflict.
    """
    try:
        dot = values["kasmina.seed.isolation.dot"]
        norms = (
            values["kasmina.seed.isolation.host_norm"]
            * values["kasmina.seed.isolation.seed_norm"]
        )
    except KeyError:
        return None
    if norms <= 0.0:
        return None
    found = dot / norms
    return -1.0 if found < -1.0 else 1.0 if found > 1.0 else found


DERIVED: tuple[Derived, ...] = (
    Derived(
        Metric(
            "kasmina.seed.isolation.cosine",
            "1",
            "cosine of host and seed gradient at the slot's input, -1 when they pull in "
            "opposite directions",
            "when isolation statistics exist and neither norm is zero",
            scope="seed",
        ),
        cosine,
    ),
)

KNOWN: dict[str, Metric] = {**BY_KEY, **{row.metric.key: row.metric for row in DERIVED}}
"""Every metric that a table may name, but for custom values, which go by any name."""


def metric_of(key: str) -> Metric | None:
    """What a table may mean by ``key``, None for what nobody has."""
    return KNOWN.get(key) or (custom_metric(key) if is_custom(key) else None)


def is_seeds(key: str) -> bool:
    """Whether each seed has that metric for itself."""
    metric = metric_of(key)
    return metric is not None and metric.scope == "seed"


def needed(keys: Iterable[str]) -> tuple[Derived, ...]:
    """The derived metrics among ``keys``."""
    wanted = set(keys)
    return tuple(row for row in DERIVED if row.metric.key in wanted)
