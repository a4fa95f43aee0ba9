"""Operators of the table language: the conditions on a metric.

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
    BaselineKind.ROLLING: "the median of the last `window` observations; it follows the "
    "run, and so also a slow drift",
    BaselineKind.FROZEN: "the median of the first `window` observations after warm-up, kept "
    "for good; it reveals slow drifts",
    BaselineKind.LOWEST: "the lowest value that the rolling median has ever had",
    BaselineKind.HIGHEST: "the highest value that the rolling median has ever had",
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
        "the value is above this multiple of the baseline: above the baseline by (number - 1) "
        "times its size, so that it is also defined below zero; unknown during warm-up",
        -1,
    ),
    Operator.BELOW_BASELINE: Form(
        Operand.FACTOR,
        "as `above_baseline`, below this multiple of the baseline",
        1,
    ),
    Operator.ABOVE_RECORD: Form(
        Operand.FACTOR,
        "the value is farther above its ordinary state than this multiple of the run's own "
        "excursions: those that the rule's `for` and `of` values reach at once, at the false "
        "alarm rate in `record`; unknown during warm-up",
        -1,
    ),
    Operator.BELOW_RECORD: Form(
        Operand.FACTOR,
        "as `above_record`, below its ordinary state",
        -1,
    ),
    Operator.ABOVE_PEERS: Form(
        Operand.FACTOR,
        "the value is above this multiple of the other ranks' median at the same step; "
        "evaluated with a delay, once all have reported it, and unknown without other ranks",
        -1,
    ),
    Operator.BELOW_PEERS: Form(
        Operand.FACTOR,
        "as `above_peers`, below this multiple of the other ranks' median",
        1,
    ),
    Operator.RISES_BY: Form(
        Operand.AMOUNT, "the value is at least this much higher than the last known one"
    ),
    Operator.RISEN_FOR: Form(
        Operand.COUNT,
        "the value has been above its earlier values for so many observations, including the "
        "current one: above the 80th percentile of one and a half `window`, by a fiftieth of "
        "it, without the newest 14 to 21 (for a `window` of 64). A metric that hardly moves "
        "between observations needs up to four times as many. Chance alone does not produce "
        "so many in a row, however far single values stray. Unknown until that many "
        "observations are in",
    ),
    Operator.FALLEN_FOR: Form(
        Operand.COUNT,
        "as `risen_for`, below the 20th percentile",
    ),
    Operator.UNCHANGED_FOR: Form(
        Operand.COUNT,
        "the value is the same for this many observations, including the current one",
        0,
        2,
    ),
    Operator.RUNS_OUT_WITHIN: Form(
        Operand.COUNT,
        "the value falls, and at its present slope reaches zero within this many observations "
        "(least squares over the window, and over its newer half, whichever predicts the later "
        "exhaustion); unknown before warm-up and a full window",
        1,
    ),
    Operator.NONFINITE: Form(
        Operand.FLAG,
        "the value is NaN or infinite; without a metric, any value of the step",
    ),
    Operator.MISSING_FOR: Form(
        Operand.COUNT,
        "the value was present before and is absent for this many steps, including the current "
        "one. For the metric `step`: the rank sent nothing for this many times its own step "
        "time, and for at least ten seconds, or for ten minutes while only one of its steps is "
        "known",
    ),
}
