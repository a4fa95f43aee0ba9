"""Thinning: no extreme is lost, gaps stay, and what is dropped can be drawn from the rest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.report import curves
from esper_otel.report.curves import Curve, Points, thinned, without_repeats

values = st.lists(
    st.one_of(st.floats(-1e6, 1e6), st.just(float("nan")), st.sampled_from([0.0, 1.0])),
    min_size=1,
    max_size=200,
)


def points(numbers):
    return Points(np.arange(len(numbers), dtype=np.int64) * 3, np.array(numbers, float))


@given(values, st.integers(1, 20))
def test_extremes_ends_and_gaps_stay(numbers, parts):
    before = points(numbers)
    after = thinned(before, parts)
    assert set(after.steps.tolist()) <= set(before.steps.tolist())
    at = dict(zip(before.steps.tolist(), before.values.tolist(), strict=True))
    for step, value in zip(after.steps.tolist(), after.values.tolist(), strict=True):
        assert at[step] == value or np.isnan(value)
    finite = before.values[~np.isnan(before.values)]
    if len(finite):
        kept = after.values[~np.isnan(after.values)]
        assert (kept.min(), kept.max()) == (finite.min(), finite.max())
    assert np.isnan(after.values).any() == np.isnan(before.values).any()
    assert (after.steps[0], after.steps[-1]) == (before.steps[0], before.steps[-1])
    assert len(after.steps) <= 3 * parts + 2


@given(values)
def test_without_repeats_every_value_can_still_be_told(numbers):
    before = points(numbers)
    after = without_repeats(before)
    if not np.isnan(before.values).any():
        place = np.searchsorted(after.steps, before.steps, side="right") - 1
        assert np.array_equal(after.values[place], before.values)


def test_a_long_curve_is_thinned_while_it_is_read(monkeypatch):
    monkeypatch.setattr(curves, "HELD", 1000)
    curve = Curve()
    rng = np.random.default_rng(0)
    whole = rng.random(100_000)
    whole[77_777], whole[12_345] = 50.0, -50.0
    for start in range(0, len(whole), 500):
        curve.extend(np.arange(start, start + 500), whole[start : start + 500])
    steps, found = curve.points()
    assert curve.thinned
    assert len(steps) <= 1000
    assert found[steps == 77_777] == 50.0
    assert found[steps == 12_345] == -50.0
    total = curve.total
    assert (total.count, total.greatest, total.greatest_step) == (100_000, 50.0, 77_777)
    assert (total.least, total.least_step) == (-50.0, 12_345)
    assert total.sum == pytest.approx(whole.sum())
    assert (total.first, total.last) == (whole[0], whole[-1])


def test_a_curve_can_be_told_to_hold_less():
    curve = Curve()
    noise = np.random.default_rng(0).random(5000)
    curve.extend(np.arange(5000), noise)
    assert not curve.thinned
    curve.hold_at_most(400)
    assert curve.thinned
    assert len(curve.points().steps) <= 202
    assert curve.points().values.max() == noise.max()
    curve.extend(np.arange(5000, 9000), noise[:4000])
    assert len(curve.points().steps) <= 400


def test_steps_that_come_late_or_twice_are_put_in_order():
    curve = Curve()
    curve.extend(np.array([5, 6, 7]), np.array([5.0, 6.0, 7.0]))
    curve.extend(np.array([1, 6]), np.array([1.0, 66.0]))
    assert curve.points().steps.tolist() == [1, 5, 6, 7]
    assert curve.points().values.tolist() == [1.0, 5.0, 66.0, 7.0]
    assert (curve.total.first, curve.total.last) == (1.0, 7.0)


def test_a_curve_goes_on_with_another():
    first, then = Curve(), Curve()
    first.extend(np.array([1, 2]), np.array([4.0, 3.0]))
    then.extend(np.array([3]), np.array([9.0]))
    first.absorb(then)
    first.absorb(Curve())
    assert first.points().values.tolist() == [4.0, 3.0, 9.0]
    assert (first.total.count, first.total.greatest, first.total.last) == (3, 9.0, 9.0)
