"""What of a table is about updates that are not made yet.

Before an update only some of its step is known: :data:`TOLD` names it. A rule acts on an
update when it acts at all and has parameters. Rules about seeds or other ranks are left to
the steps, as is what only counts beside a proposal.
"""

from __future__ import annotations

from esper_otel.leyline.wire import GUARDED
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.table import Condition, Mode, Rule

TOLD = frozenset(
    {
        *("step", "loss", "gradient_norm", "optimizer_lr", "optimizer_momentum", "lr_scale"),
        *("nonfinite", "loss_delta", "loss_ewma", "loss_volatility", "grad_norm_ewma"),
        "grad_var",
    }
)
"""Metrics that a check tells."""


def tells(condition: Condition) -> bool:
    """Whether a check can tell of a condition.

    What a check lacks may yet come with the step: that is neither missing for another frame
    nor, unless it is the loss or the norm of the gradients, the value that was not finite.
    """
    if condition.operator is Operator.MISSING_FOR:
        return False
    if condition.operator is Operator.NONFINITE:
        return condition.metric in ("nonfinite", "loss", "gradient_norm")
    return condition.metric in TOLD


def is_guarded(condition: Condition) -> bool:
    """Whether ``condition`` cannot hold unless a value that a trainer guards is beyond a
    bound."""
    is_counted = condition.operator is Operator.NONFINITE
    return tells(condition) and (is_counted or condition.metric in GUARDED)


def acts_on_updates(rule: Rule) -> bool:
    """Whether ``rule`` can change an update that is not made yet."""
    return (
        bool(rule.parameters)
        and rule.mode is Mode.ACT
        and not (rule.downgrade or rule.about_seeds or rule.about_ranks or rule.about_silence)
    )
