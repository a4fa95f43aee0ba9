"""Parameters of the table language: changes that a rule requests of an update."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from esper_otel.leyline.decisions import (
    CLEAR_GRADIENTS,
    LR_SCALE,
    MAX_NORM,
    MOMENTUM_SCALE,
    RESTORE,
    SKIP_STEP,
    Action,
)


class Parameter(NamedTuple):
    """A change that a rule may request of an update: meaning, actions that allow it, values.

    A number is more than 0 and at most ``most``. A ``flag`` is ``true`` in a table and 1.0 in
    a decision.
    """

    meaning: str
    actions: tuple[Action, ...]
    most: float = inf
    flag: bool = False


USUAL_NORM = "usual_norm"
"""The parameter that becomes a ``max_norm`` when its rule fires."""

USUAL_RATE = "usual_rate"
"""The parameter that becomes an ``lr_scale`` when its rule fires."""

USUAL_MOMENTUM = "usual_momentum"
"""The parameter that becomes a ``momentum_scale`` when its rule fires."""

PARAMETERS: dict[str, Parameter] = {
    LR_SCALE: Parameter(
        "multiplies the learning rates of the optimizer by this factor: for the current update "
        "when the rule fires before it, and from the next update on when the rule fires after "
        "a step",
        (Action.OPTIMIZER,),
        most=10.0,
    ),
    MAX_NORM: Parameter(
        "scales all gradients of the update together down to this norm, if theirs is larger",
        (Action.OPTIMIZER, Action.PAUSE),
    ),
    USUAL_NORM: Parameter(
        "as `max_norm`, with the usual upper norm of the run's gradients: the sidecar computes "
        "it when the rule fires, and sends it as `max_norm`. Requires a condition on a record "
        "or baseline of `gradient_norm`",
        (Action.OPTIMIZER, Action.PAUSE),
        flag=True,
    ),
    USUAL_RATE: Parameter(
        "as `lr_scale`, with the factor that returns the learning rate to the baseline with "
        "which the rule compares `optimizer_lr`. If the rule depends on the rate alone, the "
        "trainer keeps that factor until the script's rate is at most 1.5 times the baseline, "
        "so that a schedule keeps its shape",
        (Action.OPTIMIZER,),
        flag=True,
    ),
    MOMENTUM_SCALE: Parameter(
        "multiplies the momentum of the optimizer (Adam: beta1) by this factor for the current "
        "update, when the rule fires before it",
        (Action.OPTIMIZER,),
        most=1.0,
    ),
    USUAL_MOMENTUM: Parameter(
        "as `momentum_scale`, with the factor that returns the momentum to the baseline with "
        "which the rule compares `optimizer_momentum`. If the rule depends on the momentum "
        "alone, the trainer keeps that factor until the script's momentum has come half of the "
        "way back. When the rule fires after a step, this begins with the next update",
        (Action.OPTIMIZER,),
        flag=True,
    ),
    CLEAR_GRADIENTS: Parameter(
        "sets gradients that the script keeps after an update to zero, before the next "
        "`backward` adds to them, until the script has cleared them itself for a while",
        (Action.OPTIMIZER,),
        flag=True,
    ),
    SKIP_STEP: Parameter(
        "skips the update; the step counts as one of the loop and not of the optimizer",
        (Action.OPTIMIZER, Action.PAUSE),
        flag=True,
    ),
    RESTORE: Parameter(
        "restores the last good snapshot of weights and optimizer state in place of the "
        "update, if the trainer keeps snapshots",
        (Action.OPTIMIZER,),
        flag=True,
    ),
}
"""By the name they have in tables and decisions."""
