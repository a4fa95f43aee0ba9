"""What a rule may ask of an update: every parameter of the table language.

Names, meanings and bounds are written here once; the reader, the JSON Schema and the
reference page are made from them.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from esper_otel.leyline.decisions import LR_SCALE, MAX_NORM, SKIP_STEP, Action


class Parameter(NamedTuple):
    """What a parameter means, whose it may be, and its values.

    A number is more than 0 and at most ``most``. A ``flag`` is ``true`` in a table and 1.0 in
    a decision.
    """

    meaning: str
    actions: tuple[Action, ...]
    most: float = inf
    flag: bool = False


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
    SKIP_STEP: Parameter(
        "the update is left out; the step counts as one of the loop and not of the optimizer",
        (Action.OPTIMIZER, Action.PAUSE),
        flag=True,
    ),
}
"""By the name they have in tables and decisions."""
