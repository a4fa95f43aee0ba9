"""How alpha rises: exact ends, and never down."""

from __future__ import annotations

from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.kasmina.blending import SCHEDULES, cosine, linear, sigmoid

STEPS = st.integers(1, 10_000)
TEMPERATURE = st.floats(1e-3, 1e9)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@every_schedule
@given(steps=STEPS, temperature=TEMPERATURE, beyond=st.integers(0, 100))
def test_alpha_is_exactly_0_before_and_1_after(schedule, steps, temperature, beyond) -> None:
    assert schedule(-beyond, steps, temperature) == 0.0
    assert schedule(steps + beyond, steps, temperature) == 1.0


@every_schedule
@given(steps=STEPS, temperature=TEMPERATURE, data=st.data())
def test_alpha_never_falls_and_stays_in_range(schedule, steps, temperature, data) -> None:
    step = data.draw(st.integers(0, steps))
    now, next_ = (schedule(s, steps, temperature) for s in (step, step + 1))
    assert 0.0 <= now <= next_ <= 1.0


@every_schedule
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_alpha_is_symmetric_around_the_middle(schedule, temperature) -> None:
    assert schedule(50, 100, temperature) == pytest.approx(0.5)
    for step in range(101):
        mirrored = 1.0 - schedule(100 - step, 100, temperature)
        assert schedule(step, 100, temperature) == pytest.approx(mirrored)


@pytest.mark.parametrize(
    ("schedule", "quarter"), [(linear, 0.25), (cosine, 0.5 - 0.5**0.5 / 2), (sigmoid, 0.0452)]
)
def test_values(schedule, quarter) -> None:
    assert schedule(25, 100, 1.0) == pytest.approx(quarter, abs=1e-4)


def test_the_sigmoid_is_the_scaled_logistic_curve() -> None:
    def logistic(share: float) -> float:
        return 1.0 / (1.0 + exp(-12.0 * (share - 0.5) / 0.7))

    low, high = logistic(0.0), logistic(1.0)
    for step in range(1, 100):
        scaled = (logistic(step / 100) - low) / (high - low)
        assert sigmoid(step, 100, 0.7) == pytest.approx(scaled)


def test_temperature_goes_from_a_jump_to_a_straight_line() -> None:
    assert sigmoid(49, 100, 1e-3) == 0.0
    assert sigmoid(51, 100, 1e-3) == 1.0
    assert sigmoid(10, 100, 1e9) == pytest.approx(0.1)
    assert sigmoid(10, 100, 1e300) == pytest.approx(0.1)


@every_schedule
@pytest.mark.parametrize(
    ("steps", "temperature", "named"),
    [
        (0, 1.0, "steps=0"),
        (-3, 1.0, "steps=-3"),
        (10, 0.0, "temperature=0.0"),
        (10, -1.0, "temperature=-1.0"),
        (10, float("nan"), "temperature=nan"),
        (10, float("inf"), "temperature=inf"),
    ],
)
def test_what_cannot_be_is_refused_by_name(schedule, steps, temperature, named) -> None:
    with pytest.raises(ValueError, match=named):
        schedule(1, steps, temperature)
