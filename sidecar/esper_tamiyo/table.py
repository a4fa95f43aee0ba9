"""Threshold tables: what the rows of a checked table mean.

A table is plain data. :mod:`esper_tamiyo.table_file` makes one from YAML and refuses what
is wrong with it, :mod:`esper_tamiyo.rules` turns it into something that runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

import msgspec

from esper_otel.leyline.decisions import Action, Severity
from esper_otel.leyline.metrics import BY_KEY


class Operator(StrEnum):
    """How a condition looks at its metric; the value is the field's name in YAML."""

    ABOVE = "above"
    AT_LEAST = "at_least"
    BELOW = "below"
    AT_MOST = "at_most"
    ABOVE_BASELINE = "above_baseline"
    RISES_BY = "rises_by"
    UNCHANGED_FOR = "unchanged_for"
    NONFINITE = "nonfinite"


class Condition(msgspec.Struct, frozen=True):
    """One metric held against one number.

    ``number`` is the bound, the factor of ``above_baseline`` or the count of
    ``unchanged_for`` observations; ``nonfinite`` has none. ``baseline_of`` is the metric
    whose rolling median ``above_baseline`` multiplies, the metric itself unless said.
    """

    metric: str
    operator: Operator
    number: float = 0.0
    baseline_of: str = ""

    def __str__(self) -> str:
        """The condition as a person would say it."""
        if self.operator is Operator.NONFINITE:
            return (
                "a value is not finite"
                if self.metric == "nonfinite"
                else (f"{self.metric} is not finite")
            )
        if self.operator is Operator.ABOVE_BASELINE:
            own = self.baseline_of == self.metric
            whose = "its baseline" if own else f"the baseline of {self.baseline_of}"
            return f"{self.metric} above {self.number:g} × {whose}"
        return f"{self.metric} {self.operator.value.replace('_', ' ')} {self.number:g}"


class Combine(StrEnum):
    """How the parts of a group become one verdict."""

    ALL = "all"
    ANY = "any"


class Group(msgspec.Struct, frozen=True):
    """Several conditions that count together; a part may itself be a group, once."""

    combine: Combine
    parts: tuple[Condition | Group, ...]

    def __str__(self) -> str:
        """The group as a person would say it."""
        joint = " and " if self.combine is Combine.ALL else " or "
        return joint.join(
            f"({part})" if isinstance(part, Group) else str(part) for part in self.parts
        )


class Rule(msgspec.Struct, frozen=True):
    """One row of a table.

    ``persistence`` (``for`` in YAML) is how many observations in a row the condition must
    hold, ``cooldown`` how many steps pass before the rule may fire again. A ``downgrade``
    rule counts only on steps for which a seed operation is proposed.
    """

    id: str
    when: Condition | Group
    action: Action
    severity: Severity
    text: str
    persistence: int = 1
    cooldown: int = 0
    downgrade: bool = False
    conservative: bool = False
    parameters: dict[str, float] = {}

    @property
    def about_seeds(self) -> bool:
        """True when a condition looks at a metric that each seed has for itself."""
        return any(BY_KEY[part.metric].scope == "seed" for part in conditions(self.when))


class Baseline(msgspec.Struct, frozen=True):
    """Rolling medians: observations they span, and how many must be in before they count."""

    window: int = 64
    warmup: int = 20


class Table(msgspec.Struct, frozen=True):
    """A checked table. ``version`` carries a hash of the file, so it names one content."""

    version: str
    rules: tuple[Rule, ...]
    baseline: Baseline = Baseline()
    clean_steps: int = 50
    """Steps without trouble after which conservative mode is left."""


def conditions(when: Condition | Group) -> Iterator[Condition]:
    """The conditions below ``when``, in the order of the table."""
    if isinstance(when, Condition):
        yield when
        return
    for part in when.parts:
        yield from conditions(part)
