"""Decisions: Tamiyo's answers, and their order of precedence."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Action(StrEnum):
    """The effect of a decision on the run. Of two actions the later one here wins."""

    CONTINUE = "CONTINUE"
    """Nothing changes."""

    SEED = "SEED"
    """The proposed seed operation is granted."""

    OPTIMIZER = "OPTIMIZER"
    """Updates of the optimizer change, as the parameters say."""

    PAUSE = "PAUSE"
    """Seeds are frozen, and callbacks of ``on_pause`` called; training goes on."""


class Severity(StrEnum):
    """How severe a finding or decision is."""

    NORMAL = "NORMAL"
    WARNING = "WARNING"
    HIGH = "HIGH"
    CRITICAL = "CRITICAL"


FORCE: dict[Action, int] = {action: force for force, action in enumerate(Action)}
"""PAUSE over OPTIMIZER over SEED over CONTINUE."""

RANK_OF: dict[Severity, int] = {severity: rank for rank, severity in enumerate(Severity)}
"""NORMAL 0 to CRITICAL 3."""

NOMINAL = "nominal"
"""Reason of a decision when no rule fired."""

WARMING_UP = "warming_up"
"""Reason in place of :data:`NOMINAL` while rules that act have no past to compare with yet:
no rule fired, but some could not have. Such a step is not a clean one."""

CONSERVATIVE_MODE = "conservative_mode"
"""Reason of a PAUSE that conservative mode put in place of a SEED."""

# Reasons of a CONTINUE that the client gave itself because no answer came.
TIMEOUT = "timeout"
UNREACHABLE = "unreachable"
PROTOCOL_ERROR = "protocol_error"
BREAKER_OPEN = "breaker_open"
SUPERSEDED = "superseded"  # the sidecar says it: a newer process is that rank
NOT_ASKED = "not_asked"

NOT_AGREED = "not_agreed"
"""Reason of a CONTINUE where the ranks of a run have settled nothing, or no longer can."""

FAILED_OPEN: frozenset[str] = frozenset(
    {TIMEOUT, UNREACHABLE, PROTOCOL_ERROR, BREAKER_OPEN, SUPERSEDED, NOT_AGREED}
)
"""Reasons of an unevaluated step. Unknown is not healthy."""


UNJUDGED: frozenset[str] = FAILED_OPEN | {NOT_ASKED, WARMING_UP}
"""Reasons of decisions that no sidecar made, or that it had nothing to go by for: such a step
is not a clean one."""

LR_SCALE, MAX_NORM, SKIP_STEP = "lr_scale", "max_norm", "skip_step"
"""Parameters of a decision: times which learning rates are taken; the largest gradient norm
of one update; 1.0 to leave that update out."""

MOMENTUM_SCALE = "momentum_scale"
"""Parameter of a decision about one update: times which its momentum (Adam: beta1) is taken,
at most 1.0."""

CLEAR_GRADIENTS = "clear_gradients"
"""Parameter of a decision about a step: 1.0 to clear gradients that the script keeps."""

RESTORE = "restore"
"""Parameter of a decision: 1.0 to put the last good snapshot of weights and optimizer state
back in place of an update."""


class SeedOperation(StrEnum):
    """An operation on one seed, proposed by the garden and granted by a SEED decision."""

    GERMINATE = "germinate"
    TRAIN = "train"
    BLEND = "blend"
    SHADOW = "shadow"
    PROBATE = "probate"
    FOSSILIZE = "fossilize"
    CULL = "cull"


class Proposal(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One seed operation the garden would like to do after this step."""

    seed_id: str
    operation: SeedOperation


class Finding(msgspec.Struct, frozen=True, array_like=True):
    """One rule that fired, with its values (key of the metric → value)."""

    rule: str
    action: Action
    severity: Severity
    text: str
    values: dict[str, float]
    seed_id: str | None = None


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """Tamiyo's answer about one step.

    ``step`` is the step of its request, ``observed_step`` the newest step that the
    sidecar had of this rank, -1 without one. ``reason`` is the id of the winning rule,
    ``nominal``, ``warming_up``, ``conservative_mode``, or why the sidecar did not evaluate
    the step (``timeout``, ``unreachable``, …).
    """

    id: str
    run: str
    step: int
    observed_step: int
    action: Action
    severity: Severity
    reason: str
    findings: list[Finding] = []
    target_seed: str | None = None
    seed_operation: SeedOperation | None = None
    parameters: dict[str, float] = {}
    conservative: bool = False
    table_version: str = ""


def unanswered(run: str, step: int, reason: str) -> Decision:
    """The CONTINUE a trainer gives itself when nobody answered, or nobody was asked."""
    return Decision(
        id="",
        run=run,
        step=step,
        observed_step=-1,
        action=Action.CONTINUE,
        severity=Severity.NORMAL,
        reason=reason,
    )
