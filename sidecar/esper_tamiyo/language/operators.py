"""What a condition can ask of its metric: every operator of the table language.

Names, meanings and bounds are written here once; the reader, the JSON Schema and the
reference page are made from them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Operator(StrEnum):
    """How a condition looks at its metric; the value is the field's name in YAML."""

    ABOVE = "above"
    AT_LEAST = "at_least"
    BELOW = "below"
    AT_MOST = "at_most"
    ABOVE_BASELINE = "above_baseline"
    BELOW_BASELINE = "below_baseline"
    ABOVE_RECORD = "above_record"
    BELOW_RECORD = "below_record"
    ABOVE_PEERS = "above_peers"
    BELOW_PEERS = "below_peers"
    RISES_BY = "rises_by"
    RISEN_FOR = "risen_for"
    FALLEN_FOR = "fallen_for"
    UNCHANGED_FOR = "unchanged_for"
    RUNS_OUT_WITHIN = "runs_out_within"
    NONFINITE = "nonfinite"
    MISSING_FOR = "missing_for"


ON_BASELINES = (Operator.ABOVE_BASELINE, Operator.BELOW_BASELINE)
ON_RECORDS = (Operator.ABOVE_RECORD, Operator.BELOW_RECORD)
ON_EARLIER = (Operator.RISEN_FOR, Operator.FALLEN_FOR)
ON_PEERS = (Operator.ABOVE_PEERS, Operator.BELOW_PEERS)


class BaselineKind(StrEnum):
    """Which past a baseline is."""

    ROLLING = "rolling"
    FROZEN = "frozen"
    LOWEST = "lowest"
    HIGHEST = "highest"


BASELINES: dict[BaselineKind, str] = {
    BaselineKind.ROLLING: "the median of the last `window` observations: follows the run, "
    "and so a slow drift as well",
    BaselineKind.FROZEN: "the median of the first `window` observations after warm-up, kept "
    "for good: for what drifts into trouble slowly",
    BaselineKind.LOWEST: "the lowest that the rolling median has ever been",
    BaselineKind.HIGHEST: "the highest that the rolling median has ever been",
}


class Operand(StrEnum):
    """What the number beside an operator is."""

    BOUND = "bound"
    FACTOR = "factor"
    AMOUNT = "amount"
    COUNT = "count"
    FLAG = "flag"


class Form(NamedTuple):
    """How an operator is written and what it means.

    ``eases`` says on which side of the number a ``release`` lies: -1 below it, as of
    ``above``, +1 above it, 0 when the operator has none. ``least`` is the smallest COUNT.
    """

    operand: Operand
    meaning: str
    eases: int = 0
    least: int = 1


FORMS: dict[Operator, Form] = {
    Operator.ABOVE: Form(Operand.BOUND, "the value is above the number", -1),
    Operator.AT_LEAST: Form(Operand.BOUND, "the value is the number or above it", -1),
    Operator.BELOW: Form(Operand.BOUND, "the value is below the number", 1),
    Operator.AT_MOST: Form(Operand.BOUND, "the value is the number or below it", 1),
    Operator.ABOVE_BASELINE: Form(
        Operand.FACTOR,
        "the value is above so many times the baseline: above the baseline by the number "
        "less one, times its size, so that it has a meaning below zero as well; unknown "
        "during warm-up",
        -1,
    ),
    Operator.BELOW_BASELINE: Form(
        Operand.FACTOR,
        "the value is below so many times the baseline, as `above_baseline`",
        1,
    ),
    Operator.ABOVE_RECORD: Form(
        Operand.FACTOR,
        "the value is farther above its ordinary state than so many times what the run's own "
        "excursions explain: those of as many values at once as the rule's `for` and `of` say, "
        "at the risk that `record` states; unknown during warm-up",
        -1,
    ),
    Operator.BELOW_RECORD: Form(
        Operand.FACTOR,
        "as `above_record`, below its ordinary state",
        -1,
    ),
    Operator.ABOVE_PEERS: Form(
        Operand.FACTOR,
        "the value is above so many times the median of the other ranks' at the same step; "
        "judged in hindsight, when all have told it, and unknown without other ranks",
        -1,
    ),
    Operator.BELOW_PEERS: Form(
        Operand.FACTOR,
        "as `above_peers`, below so many times the median of the other ranks'",
        1,
    ),
    Operator.RISES_BY: Form(
        Operand.AMOUNT, "the value is at least so much higher than the last one seen"
    ),
    Operator.RISEN_FOR: Form(
        Operand.COUNT,
        "the value has been above what it was before for so many observations, this one "
        "included: above the 80th percentile of one and a half `window`, by a fiftieth of it, "
        "with the newest 14 to 21 (of a `window` of 64) left out. However far single values "
        "stray, by chance so many in a row are not above it. Unknown until that many "
        "observations are in",
    ),
    Operator.FALLEN_FOR: Form(
        Operand.COUNT,
        "as `risen_for`, below the 20th percentile",
    ),
    Operator.UNCHANGED_FOR: Form(
        Operand.COUNT, "the value is the same for so many observations, this one included", 0, 2
    ),
    Operator.RUNS_OUT_WITHIN: Form(
        Operand.COUNT,
        "the value falls, and at its present slope (least squares over the window, and over "
        "its newer half, whichever is more hopeful) reaches zero within so many "
        "observations; unknown before warm-up and a full window",
        1,
    ),
    Operator.NONFINITE: Form(
        Operand.FLAG,
        "the value was NaN or infinite; without a metric, any value of the step was",
    ),
    Operator.MISSING_FOR: Form(
        Operand.COUNT,
        "the value was seen before and is absent for so many steps, this one included. Of "
        "the metric `step`: nothing at all came from the rank for so many times its own "
        "step time, and for ten seconds at least, or for ten minutes while only one step of it "
        "is known",
    ),
}
