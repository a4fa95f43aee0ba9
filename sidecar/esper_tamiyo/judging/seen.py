"""The values behind a verdict of a rule, and their references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from esper_tamiyo.judging.history import BaselineKey, History
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.table import Condition, Rule, conditions

Values = Mapping[str, float]


def seen_by(rule: Rule, values: Values, history: History) -> dict[str, float]:
    """The values behind a verdict.

    By the key of the metric; what they were held against as ``baseline(key)`` (or
    ``frozen``, ``lowest``, ``highest``), ``peers(key)`` with the ``step`` compared,
    ``previous(key)``; the end of what was before as ``upper(key)`` or ``lower(key)``; the
    frames without a value as ``missing(key)``, the observations left as ``left(key)``.
    """
    seen: dict[str, float] = {}
    for condition in conditions(rule.when):
        key = condition.metric
        value: float | None
        match condition.operator:
            case Operator.ABOVE_PEERS | Operator.BELOW_PEERS:
                value, against = values.get(key), history.peers.get(key)
                named = f"peers({key})"
                if against is not None:  # not the step that is decided about
                    seen["step"] = values["step"]
            case Operator.ABOVE_BASELINE | Operator.BELOW_BASELINE:
                value = values.get(key)
                named = BaselineKey(condition.baseline_of, condition.baseline).name
                against = history.baselines[named].value
            case Operator.ABOVE_RECORD | Operator.BELOW_RECORD:
                value, against, named = values.get(key), None, ""
                seen.update(_record_seen(condition, history))
            case Operator.RISEN_FOR:
                value, against = values.get(key), history.earlier[key].upper
                named = f"upper({key})"
            case Operator.FALLEN_FOR:
                value, against = values.get(key), history.earlier[key].lower
                named = f"lower({key})"
            case Operator.RISES_BY:
                value, against = values.get(key), history.lasts[key].value
                named = f"previous({key})"
            case Operator.MISSING_FOR:
                # None for the rule on silence, which no frame breaks.
                value, last = values.get(key), history.lasts.get(key)
                against = last.missed + 1.0 if last and value is None and last.total else None
                named = f"missing({key})"
            case Operator.RUNS_OUT_WITHIN:
                value = values.get(key)
                against = None if value is None else history.slopes[key].left(value)
                named = f"left({key})"
            case Operator.NONFINITE:
                value, against, named = values.get(key), values.get("nonfinite"), "nonfinite"
            case _:
                value, against, named = values.get(key), None, ""
        if value is not None:
            seen[key] = value
        if against is not None:
            seen[named] = against
    return seen


def _record_seen(condition: Condition, history: History) -> Iterator[tuple[str, float]]:
    """The ordinary state of a metric and how far its record explains, by what they are.

    Not times the condition's number: a rule may have several on one record.
    """
    key = condition.metric
    excursions = history.excursions[key, condition.operator is Operator.BELOW_RECORD]
    bound = excursions.bound(condition.hold, 1.0)
    if bound is None or excursions.level is None or excursions.scatter is None:
        return
    record = excursions.records[condition.hold]
    yield f"level({key})", excursions.level
    yield f"scatter({key})", excursions.scatter
    yield f"expected({key})", bound
    yield f"excursions({key})", float(record.peaks)
    yield f"farthest({key})", record.largest
