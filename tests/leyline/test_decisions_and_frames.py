"""Force of decisions, and rows of values."""

from __future__ import annotations

from math import inf, isnan, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_otel.leyline.decisions import (
    CONSERVATIVE_MODE,
    FAILED_OPEN,
    FORCE,
    NOMINAL,
    NOT_ASKED,
    RANK_OF,
    Action,
    Severity,
    unanswered,
)
from esper_otel.leyline.frames import ABSENT, present, seed_row, step_row
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS


def test_pause_over_optimizer_over_seed_over_continue() -> None:
    weakest_first = sorted(Action, key=FORCE.__getitem__)
    assert weakest_first == ["CONTINUE", "SEED", "OPTIMIZER", "PAUSE"]


def test_severities_from_normal_to_critical() -> None:
    assert sorted(Severity, key=RANK_OF.__getitem__) == [
        "NORMAL",
        "WARNING",
        "HIGH",
        "CRITICAL",
    ]


@pytest.mark.parametrize("reason", [*sorted(FAILED_OPEN), NOT_ASKED])
def test_without_an_answer_training_goes_on_and_says_why(reason: str) -> None:
    decision = unanswered("run", 7, reason)
    assert (decision.action, decision.severity) == (Action.CONTINUE, Severity.NORMAL)
    assert (decision.run, decision.step, decision.reason) == ("run", 7, reason)
    assert decision.observed_step == -1
    assert decision.findings == []


def test_failing_open_is_never_taken_for_a_verdict() -> None:
    assert {
        "timeout",
        "unreachable",
        "protocol_error",
        "breaker_open",
        "superseded",
        "not_agreed",
    } == FAILED_OPEN
    assert FAILED_OPEN.isdisjoint({NOMINAL, CONSERVATIVE_MODE, NOT_ASKED})


def test_a_new_row_is_absent_throughout_and_nobody_elses() -> None:
    assert isnan(ABSENT)
    for make, keys in ((step_row, STEP_KEYS), (seed_row, SEED_KEYS)):
        row = make()
        assert len(row) == len(keys)
        assert present(keys, row) == {}
        row[0] = 1.0
        assert isnan(make()[0])


@settings(deadline=None)
@given(st.lists(st.floats(), min_size=len(STEP_KEYS), max_size=len(STEP_KEYS)))
def test_present_keeps_the_finite_values_and_only_those(row: list[float]) -> None:
    values = present(STEP_KEYS, row)
    for key, value in zip(STEP_KEYS, row, strict=True):
        assert (key in values) == (value not in (inf, -inf) and value == value)
        assert values.get(key, value) == value or isnan(value)


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        present(("step", "loss"), [nan])
