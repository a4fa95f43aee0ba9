"""Every transition of a seed that is allowed, and that every other is refused."""

from __future__ import annotations

from itertools import product

import pytest

from esper_otel.leyline.stages import (
    TRANSITIONS,
    IllegalTransitionError,
    Stage,
    check_transition,
)

NUMBERS = {
    "UNKNOWN": 0,
    "DORMANT": 1,
    "GERMINATED": 2,
    "TRAINING": 3,
    "BLENDING": 4,
    "SHADOWING": 5,
    "PROBATIONARY": 6,
    "FOSSILIZED": 7,
    "CULLED": 8,
    "EMBARGOED": 9,
    "RESETTING": 10,
    "TERMINATED": 11,
}

ALLOWED = {
    ("DORMANT", "GERMINATED"),
    ("DORMANT", "TERMINATED"),
    ("GERMINATED", "TRAINING"),
    ("GERMINATED", "CULLED"),
    ("TRAINING", "BLENDING"),
    ("TRAINING", "CULLED"),
    ("BLENDING", "SHADOWING"),
    ("BLENDING", "CULLED"),
    ("SHADOWING", "PROBATIONARY"),
    ("SHADOWING", "CULLED"),
    ("PROBATIONARY", "FOSSILIZED"),
    ("PROBATIONARY", "CULLED"),
    ("FOSSILIZED", "TERMINATED"),
    ("CULLED", "EMBARGOED"),
    ("EMBARGOED", "RESETTING"),
    ("RESETTING", "DORMANT"),
}


def test_numbers_are_those_of_the_contract() -> None:
    assert {stage.name: stage.value for stage in Stage} == NUMBERS
    assert set(TRANSITIONS) == set(Stage)


@pytest.mark.parametrize(
    ("source", "target"), list(product(Stage, Stage)), ids=lambda stage: stage.name
)
def test_transition(source: Stage, target: Stage) -> None:
    if (source.name, target.name) in ALLOWED:
        check_transition(source, target)
        return
    with pytest.raises(IllegalTransitionError) as refusal:
        check_transition(source, target)
    assert f"from {source.name} to {target.name}" in str(refusal.value)
    assert (refusal.value.source, refusal.value.target) == (source, target)


def test_the_refusal_says_what_would_be_allowed() -> None:
    with pytest.raises(IllegalTransitionError, match=r"TRAINING may go to BLENDING, CULLED$"):
        check_transition(Stage.TRAINING, Stage.FOSSILIZED)
    with pytest.raises(IllegalTransitionError, match=r"TERMINATED may go to nothing$"):
        check_transition(Stage.TERMINATED, Stage.DORMANT)


def test_a_life_ends_in_terminated_or_goes_round() -> None:
    """From every known stage one comes to TERMINATED in the end."""
    reaching = {Stage.TERMINATED}
    for _ in Stage:
        reaching |= {stage for stage in Stage if TRANSITIONS[stage] & reaching}
    assert reaching == set(Stage) - {Stage.UNKNOWN}
