"""Threshold tables: the meaning of a checked table's rows.

A table is plain data. :mod:`~esper_tamiyo.language.table_file` makes one from YAML and
refuses invalid ones, :mod:`~esper_tamiyo.judging.rules` turns it into something
that runs. Bounds and meanings of the fields and parameters stand here once: the reader, the
JSON Schema and the reference page (:mod:`ops.generate.table_page`) are made from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from esper_otel.leyline.decisions import Action, Severity
from esper_otel.leyline.wire import GUARDED
from esper_tamiyo.language.operators import FORMS, ON_RECORDS, BaselineKind, Operand, Operator

MAX_COUNT = 1 << 31

MAX_OF = 1024
"""Largest ``of``: a bit for each observation is kept, per rule and rank or seed."""

ID = r"[a-z][a-z0-9_]*"

# Limits of size, so that reading and checking a table ends in seconds whatever is in it, and
# what a rule says fits into an answer.
MAX_RULES = 1000
MAX_CONDITIONS = 32
"""Conditions of one rule."""
MAX_ID = 100
"""Characters of a rule's id, and of the table's version."""
MAX_TEXT = 1000
"""Characters of a rule's text."""

KNOWN_BEFORE_UPDATE = frozenset(
    {
        *("step", "loss", "gradient_norm", "optimizer_lr", "optimizer_momentum", "lr_scale"),
        "optimizer_lr_base",
        *("nonfinite", "loss_delta", "loss_ewma", "loss_volatility", "grad_norm_ewma"),
        "grad_var",
    }
)
"""Metrics whose values are known of a step before its update: those that a check can have."""


class Condition(msgspec.Struct, frozen=True, tag=True):
    """One metric compared with one number.

    ``number`` is the bound, factor, amount or count that belongs to the operator;
    ``nonfinite`` has none. ``baseline_of`` is empty but for conditions on a baseline.
    """

    metric: Annotated[str, Meta(description="key of the metric")]
    operator: Operator
    number: float = 0.0
    baseline_of: Annotated[
        str,
        Meta(
            description="metric whose baseline is multiplied, by default the condition's own; "
            "a seed's metric may be compared with the baseline of its rank's"
        ),
    ] = ""
    baseline: Annotated[
        BaselineKind, Meta(description="which past `above_baseline` and `below_baseline` use")
    ] = BaselineKind.ROLLING
    release: Annotated[
        float | None,
        Meta(
            description="an easier number for the same operator: once the rule fired, it stays "
            "active until the condition does not hold with this number either (hysteresis)"
        ),
    ] = None

    rising: Annotated[
        bool,
        Meta(
            description="with `above_record` or `below_record`: only while the value keeps "
            "moving away, beyond the first values of the excursion and beyond all but its last "
            "16. An intended change, such as other data, is farthest out at its beginning"
        ),
    ] = False
    hold: tuple[int, int] = (1, 1)
    """``for`` and ``of`` of its rule, for conditions on a record."""

    def __str__(self) -> str:
        """The condition as a person would say it."""
        release = "" if self.release is None else f" (release {self.release:g})"
        return f"{self._words()}{release}"

    def _words(self) -> str:
        name = self.operator.value.replace("_", " ")
        form = FORMS[self.operator]
        if self.operator is Operator.NONFINITE:
            whose = "a value" if self.metric == "nonfinite" else self.metric
            return f"{whose} is not finite"
        if self.baseline_of:
            own = "its" if self.baseline_of == self.metric else "the"
            of = "" if self.baseline_of == self.metric else f" of {self.baseline_of}"
            kind = "" if self.baseline is BaselineKind.ROLLING else f" {self.baseline.value}"
            side = name.split()[0]
            return f"{self.metric} {side} {self.number:g} × {own}{kind} baseline{of}"
        if self.operator in ON_RECORDS:
            side = name.split()[0]
            still = ", and rising" if self.rising else ""
            return f"{self.metric} {side} {self.number:g} × its record{still}"
        if form.operand is Operand.FACTOR:
            return f"{self.metric} {name.split()[0]} {self.number:g} × that of its peers"
        return f"{self.metric} {name} {self.number:g}"


class Combine(StrEnum):
    """How the parts of a group become one verdict."""

    ALL = "all"
    ANY = "any"


class Group(msgspec.Struct, frozen=True, tag=True):
    """Several conditions that count together; a part may itself be a group, once."""

    combine: Combine
    parts: tuple[Condition | Group, ...]

    def __str__(self) -> str:
        """The group as a person would say it."""
        joint = " and " if self.combine is Combine.ALL else " or "
        return joint.join(
            f"({part})" if isinstance(part, Group) else str(part) for part in self.parts
        )


class RuleScope(StrEnum):
    """Whose condition a rule is: it has a state of its own for each."""

    STEP = "step"
    SEED = "seed"
    RANK = "rank"


class RuleMode(StrEnum):
    """Whether a rule's action counts."""

    ACT = "act"
    OBSERVE = "observe"


class Rule(msgspec.Struct, frozen=True, rename={"persistence": "for"}):
    """One row of a table."""

    id: Annotated[
        str,
        Meta(
            pattern=f"^{ID}$",
            max_length=MAX_ID,
            description="name of the rule, the reason of its decisions",
        ),
    ]
    when: Condition | Group
    action: Annotated[Action, Meta(description="action that a decision by this rule requests")]
    severity: Annotated[
        Severity, Meta(description="which rule wins among those with the same action")
    ]
    text: Annotated[
        str,
        Meta(
            max_length=MAX_TEXT,
            description="message for people; by default the condition",
        ),
    ]
    persistence: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_COUNT,
            description="observations that must hold before the rule fires: in a row, or among "
            "the last `of`. Unknown values neither increment nor reset the counter",
        ),
    ] = 1
    of: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_OF,
            description="size of the window of observations in which `for` must hold; at least "
            "`for`",
        ),
    ] = 1
    cooldown: Annotated[
        int,
        Meta(ge=0, le=MAX_COUNT, description="steps before the rule may act again"),
    ] = 0
    scope: Annotated[
        RuleScope,
        Meta(
            description="follows from the metrics and operators, so never required: `seed` "
            "with a seed's metric, `rank` with `above_peers` or `below_peers`, else `step`. A "
            "given scope must match"
        ),
    ] = RuleScope.STEP
    downgrade: Annotated[
        bool, Meta(description="count only steps with a proposed seed operation")
    ] = False
    conservative: Annotated[
        bool, Meta(description="enter conservative mode, which grants no seed operation")
    ] = False
    mode: Annotated[
        RuleMode,
        Meta(
            description="`observe` tries a rule out: its states and findings are reported with "
            "the action CONTINUE, and it changes no decision, mode or other rule"
        ),
    ] = RuleMode.ACT
    inhibits: Annotated[
        tuple[str, ...],
        Meta(
            description="ids of rules, no more severe than this one, to inhibit: they neither "
            "act nor appear among the findings while this rule fires for the same rank and "
            "run. Of those that only report (action CONTINUE) the cool-down begins as well: "
            "one event is reported once"
        ),
    ] = ()
    parameters: Annotated[
        dict[str, float],
        Meta(description="changes to request of an update: see [below](#parameters)"),
    ] = {}

    @property
    def about_seeds(self) -> bool:
        """True when a condition looks at a metric that each seed has for itself."""
        return self.scope is RuleScope.SEED

    @property
    def about_ranks(self) -> bool:
        """True when a condition compares a rank with the others of its run."""
        return self.scope is RuleScope.RANK

    @property
    def about_silence(self) -> bool:
        """True for the rule on a rank that nothing comes from any more."""
        return is_silence(self.when)


class Baseline(msgspec.Struct, frozen=True):
    """Baselines: observations they span, and how many must be in before they count."""

    window: Annotated[
        int, Meta(ge=2, le=1024, description="observations that a baseline or slope spans")
    ] = 64
    warmup: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="observations before a baseline counts; at most `window`. `frozen` "
            "and slopes exclude them",
        ),
    ] = 20


class RecordSpan(msgspec.Struct, frozen=True):
    """Records of excursions: their spans, and the false alarm rate at which rules use them."""

    window: Annotated[
        int,
        Meta(ge=8, le=1024, description="observations that define level and scatter"),
    ] = 160
    warmup: Annotated[
        int,
        Meta(
            ge=8,
            le=1024,
            description="observations before there is a level; at most `window`",
        ),
    ] = 16
    false_alarm_steps: Annotated[
        int,
        Meta(
            ge=100,
            le=MAX_COUNT,
            description="false alarm budget: chance alone may take a metric beyond its record "
            "once in this many observations",
        ),
    ] = 50_000


class Conservative(msgspec.Struct, frozen=True):
    """Conservative mode: while it is on, every seed operation becomes a PAUSE."""

    clean_steps: Annotated[
        int,
        Meta(ge=1, le=MAX_COUNT, description="steps without trouble before the mode ends"),
    ] = 50


class Table(msgspec.Struct, frozen=True):
    """A checked table. ``version`` carries a hash of the file, so it names one content."""

    version: str
    rules: tuple[Rule, ...]
    baseline: Baseline = Baseline()
    record: RecordSpan = RecordSpan()
    clean_steps: int = Conservative().clean_steps
    """Steps without trouble before conservative mode ends."""


def conditions(when: Condition | Group) -> Iterator[Condition]:
    """The conditions below ``when``, in the order of the table."""
    if isinstance(when, Condition):
        yield when
        return
    for part in when.parts:
        yield from conditions(part)


def held(when: Condition | Group, hold: tuple[int, int]) -> Condition | Group:
    """``when``, its conditions on records knowing the ``for`` and ``of`` of their rule."""
    if isinstance(when, Group):
        return Group(when.combine, tuple(held(part, hold) for part in when.parts))
    return msgspec.structs.replace(when, hold=hold) if when.operator in ON_RECORDS else when


def eased(when: Condition | Group) -> Condition | Group | None:
    """``when`` with the numbers of ``release``; None when there are none."""
    if all(part.release is None for part in conditions(when)):
        return None
    return _eased(when)


def _eased(when: Condition | Group) -> Condition | Group:
    if isinstance(when, Condition):
        easier = when.number if when.release is None else when.release
        return msgspec.structs.replace(when, number=easier, release=None)
    return Group(when.combine, tuple(_eased(part) for part in when.parts))


def is_silence(when: Condition | Group) -> bool:
    """Whether ``when`` speaks of a rank that sends nothing, so that no frame can tell."""
    return any(
        part.operator is Operator.MISSING_FOR and part.metric == "step"
        for part in conditions(when)
    )


def is_known_before_update(condition: Condition) -> bool:
    """Whether an update can be held against a condition before it is made.

    What a check lacks may yet come with the step: that is neither missing for another frame
    nor, unless it is the loss or the norm of the gradients, the value that was not finite.
    """
    if condition.operator is Operator.MISSING_FOR:
        return False
    if condition.operator is Operator.NONFINITE:
        return condition.metric in ("nonfinite", "loss", "gradient_norm")
    return condition.metric in KNOWN_BEFORE_UPDATE


def is_guarded(condition: Condition) -> bool:
    """Whether ``condition`` cannot hold unless a value that a trainer guards is beyond a
    bound."""
    is_counted = condition.operator is Operator.NONFINITE
    return is_known_before_update(condition) and (is_counted or condition.metric in GUARDED)


def acts_on_updates(rule: Rule) -> bool:
    """Whether ``rule`` can change an update that is not made yet.

    Rules about seeds or other ranks are left to the steps, as is what only counts beside a
    proposal.
    """
    return (
        bool(rule.parameters)
        and rule.mode is RuleMode.ACT
        and not (rule.downgrade or rule.about_seeds or rule.about_ranks or rule.about_silence)
    )


@cache  # reading the hints takes longer than reading a rule
def meta(owner: type[msgspec.Struct], field: str) -> Meta:
    """Bounds and description of a field of a table."""
    hint: Any = get_type_hints(owner, include_extras=True)[field]
    found: Meta = hint.__metadata__[0]
    return found


def span(owner: type[msgspec.Struct], field: str) -> tuple[int, int]:
    """Lowest and highest of a whole-numbered field."""
    bounds = meta(owner, field)
    return int(bounds.ge or 0), int(bounds.le or MAX_COUNT)
