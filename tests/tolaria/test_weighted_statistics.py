"""Weighted statistics against the sums they abbreviate."""

from __future__ import annotations

from math import isclose, isnan, sqrt
from sys import float_info

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_otel.leyline.metrics import WEIGHT
from esper_otel.tolaria.seal import WeightedStatistics

values = st.lists(
    st.floats(min_value=-1e12, max_value=1e12, allow_subnormal=False), min_size=1, max_size=60
)
weights = st.floats(min_value=0.01, max_value=1.0)


def weighted_sums(series: list[float], weight: float) -> tuple[float, float]:
    """Mean and variance by their definition: every observation with its final weight."""
    rest = 1.0 - weight
    shares = [weight * rest ** (len(series) - 1 - i) for i in range(len(series))]
    shares[0] = rest ** (len(series) - 1)
    assert isclose(sum(shares), 1.0, rel_tol=1e-9)
    mean = sum(share * x for share, x in zip(shares, series, strict=True))
    variance = sum(share * (x - mean) ** 2 for share, x in zip(shares, series, strict=True))
    return mean, variance


def after(series: list[float], weight: float = WEIGHT) -> WeightedStatistics:
    statistics = WeightedStatistics(weight)
    for x in series:
        statistics.update(x)
    return statistics


@settings(deadline=None)
@given(values, weights)
def test_equals_the_weighted_sums(series: list[float], weight: float) -> None:
    statistics = after(series, weight)
    mean, variance = weighted_sums(series, weight)
    scale = max(abs(x) for x in series)
    assert isclose(statistics.mean, mean, rel_tol=1e-9, abs_tol=1e-9 * scale)
    # Squares below the least normal double have lost their digits in both.
    least = max(1e-9 * scale**2, float_info.min)
    assert isclose(statistics.variance, variance, rel_tol=1e-6, abs_tol=least)


@settings(deadline=None)
@given(values, weights)
def test_variance_is_never_negative_and_the_mean_stays_within_the_values(
    series: list[float], weight: float
) -> None:
    statistics = after(series, weight)
    slack = 1e-9 * max(abs(x) for x in series)
    assert statistics.variance >= 0.0
    assert statistics.deviation == sqrt(statistics.variance)
    assert min(series) - slack <= statistics.mean <= max(series) + slack


@settings(deadline=None)
@given(st.floats(min_value=-1e150, max_value=1e150), st.integers(1, 50))
def test_a_constant_has_no_variance(x: float, times: int) -> None:
    statistics = after([x] * times)
    assert (statistics.mean, statistics.variance) == (x, 0.0)


def test_a_spread_far_from_zero_keeps_its_digits() -> None:
    near_zero, far_off = after([0.0, 1.0, 0.0, 1.0]), after([1e9, 1e9 + 1, 1e9, 1e9 + 1])
    assert far_off.variance == pytest.approx(near_zero.variance, rel=1e-6)


def test_by_hand() -> None:
    statistics = after([10.0])
    assert (statistics.mean, statistics.variance, statistics.deviation) == (10.0, 0.0, 0.0)
    statistics.update(20.0)
    assert statistics.mean == pytest.approx(12.0)
    assert statistics.variance == pytest.approx(0.8 * 0.2 * 100.0)


def test_nothing_is_known_before_the_first_value() -> None:
    statistics = WeightedStatistics()
    assert isnan(statistics.mean)
    assert isnan(statistics.variance)
    assert isnan(statistics.deviation)


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.01, float("nan")])
def test_a_weight_outside_its_range_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"expected a number above 0, up to 1"):
        WeightedStatistics(weight)
