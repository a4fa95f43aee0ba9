"""What a rule may ask of an update: every parameter of the table language."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from esper_otel.leyline.decisions import (
    LR_SCALE,
    MAX_NORM,
    RESTORE,
    SKIP_STEP,
    Action,
)


class Parameter(NamedTuple):
    """What a rule may ask of an update: what it means, whose it may be, and its values.

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

PARAMETERS: dict[str, Parameter] = {
    LR_SCALE: Parameter(
        "the learning rates of the optimizer are taken times this factor: for the update at "
        "hand when the rule fires before it, and from the next update on when the rule fires "
        "after a step",
        (Action.OPTIMIZER,),
        most=10.0,
    ),
    MAX_NORM: Parameter(
        "before the update its gradients are scaled down to this norm, all of them together, "
        "if theirs is larger",
        (Action.OPTIMIZER, Action.PAUSE),
    ),
    USUAL_NORM: Parameter(
        "as `max_norm`, with the norm that the run's gradients usually have at most: it is "
        "worked out when the rule fires, and sent as `max_norm`. Beside a condition on a "
        "record or baseline of `gradient_norm`",
        (Action.OPTIMIZER, Action.PAUSE),
        flag=True,
    ),
    USUAL_RATE: Parameter(
        "as `lr_scale`, with the factor that takes the learning rate back to the baseline that "
        "the rule compares `optimizer_lr` with",
        (Action.OPTIMIZER,),
        flag=True,
    ),
    SKIP_STEP: Parameter(
        "the update is left out; the step counts as one of the loop and not of the optimizer",
        (Action.OPTIMIZER, Action.PAUSE),
        flag=True,
    ),
    RESTORE: Parameter(
        "the last good snapshot of weights and optimizer state is put back in place of the "
        "update, by a trainer that keeps snapshots",
        (Action.OPTIMIZER,),
        flag=True,
    ),
}
"""By the name they have in tables and decisions."""
