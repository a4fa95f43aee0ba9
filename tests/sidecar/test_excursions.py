"""Level, scatter and record of a metric's excursions."""

from __future__ import annotations

import random
from math import exp, sin

import pytest

from esper_tamiyo.judging.excursions import LAG, PATIENCE, Excursions
from esper_tamiyo.judging.history import BEYOND, MOST_INERTIA, Earlier, earlier_span

RISK = 1 / 50_000
ONE, LASTING = (1, 1), (6, 8)
WINDOW, WARMUP = 160, 16


def excursions(*, below: bool = False) -> Excursions:
    return Excursions((ONE, LASTING), WINDOW, WARMUP, RISK, below=below)


def beyond(values: list[float], hold: tuple[int, int] = ONE) -> list[int]:
    """Places at which so many of the newest values are beyond the record of those before."""
    made, found = excursions(), []
    k, n = hold
    newest: list[bool] = []
    for place, value in enumerate(values):
        bound = made.bound(hold, 1.0)
        newest = [*newest, bound is not None and value > bound][-n:]
        if sum(newest) >= k:
            found.append(place)
        made.add(value)
    return found


def noise(count: int, seed: int = 0) -> list[float]:
    source = random.Random(seed)
    return [1.0 + 0.1 * source.gauss(0, 1) for _ in range(count)]


def test_nothing_is_known_during_warm_up():
    made = excursions()
    for value in noise(WARMUP + LAG - 1):
        made.add(value)
    assert made.level is None
    assert made.bound(ONE, 1.0) is None


def test_level_and_scatter_are_those_of_the_noise():
    made = excursions()
    for value in noise(2000):
        made.add(value)
    assert made.level == pytest.approx(1.0, abs=0.1)
    assert made.scatter == pytest.approx(0.205, rel=0.4)  # 2.05 σ is the 98th percentile


@pytest.mark.parametrize("seed", range(5))
def test_chance_does_not_exceed_the_record(seed):
    assert len(beyond(noise(10_000, seed))) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_a_run_with_outliers_is_used_to_them(seed):
    source = random.Random(seed)
    values = [abs(source.gauss(0, 1) / max(source.random(), 1e-3) ** 0.7) for _ in range(5000)]
    assert len(beyond(values)) <= 4
    assert not beyond(values, LASTING)


def test_what_is_far_out_for_the_first_time_is_seen_at_once():
    values = noise(400)
    values[300] = 5.0
    assert beyond(values) == [300]


def test_the_same_again_and_again_is_explained():
    values = noise(3000)
    for place in range(300, 3000, 60):
        values[place] = 5.0
    found = beyond(values)
    assert found[0] == 300
    assert found[-1] < 1500


def test_a_slow_rise_is_part_of_the_scatter_and_a_jump_is_not():
    rising = [value + 0.002 * place for place, value in enumerate(noise(1000))]
    assert not beyond(rising)
    assert beyond([*rising[:500], *(value + 3 for value in rising[500:])])[0] == 500


def test_a_level_that_stays_becomes_the_ordinary_one():
    made = excursions()
    for value in [*noise(300), *(value + 3 for value in noise(PATIENCE + WARMUP + LAG))]:
        made.add(value)
    assert made.level == pytest.approx(4.0, abs=0.15)
    assert made.records[LASTING].peaks == 1


def test_an_excursion_does_not_move_what_it_is_compared_with():
    made = excursions()
    for value in noise(300):
        made.add(value)
    before = made.level, made.scatter
    for _ in range(PATIENCE - 1):
        made.add(9.0)
    assert (made.level, made.scatter) == before


def test_one_outlier_says_nothing_of_many_at_once():
    made = excursions()
    values = noise(400)
    values[300] = 500.0
    for value in values:
        made.add(value)
    assert made.records[ONE].largest > 100
    assert made.records[LASTING].largest == 0.0


def test_below_is_above_upside_down():
    up, down = excursions(), excursions(below=True)
    for value in noise(600):
        up.add(value)
        down.add(-value)
    bound = up.bound(ONE, 2.0)
    assert bound is not None
    assert down.bound(ONE, 2.0) == pytest.approx(-bound)


def test_what_never_moved_has_no_scatter_and_a_metric_of_zeros_no_bound():
    made = excursions()
    for _ in range(300):
        made.add(0.0)
    assert made.level == 0.0
    assert made.bound(ONE, 1.0) is None


def test_a_metric_that_comes_to_rest_keeps_some_of_its_scatter():
    made = excursions()
    for value in [*noise(300), *([0.01] * 300)]:
        made.add(value)
    assert made.scatter is not None
    assert made.scatter > 1e-3


def test_what_was_before_leaves_the_newest_out():
    span = earlier_span(16)
    assert span == (24, 3, 2)
    source = random.Random(1)
    values = [float(source.randrange(-5, 9)) for _ in range(100)]  # many of them equal
    made = Earlier(*span)
    for count, value in enumerate(values, 1):
        made.add(value)
        newest = 3 + (count - 3) % 2
        before = sorted(values[max(0, count - newest - 24) : max(0, count - newest)])
        if len(before) < 24:
            assert made.upper is made.lower is None
        else:
            upper, lower = before[-1 - 5], before[5]
            assert made.upper == pytest.approx(upper + BEYOND * abs(upper))
            assert made.lower == pytest.approx(lower - BEYOND * abs(lower))
    made.clear()
    assert made.upper is made.lower is None


def test_values_beyond_an_end_are_counted_in_a_row():
    made = Earlier(*earlier_span(16))
    for value in range(36):
        made.add(float(value % 10))
    rows = []
    for value in (9.5, 9.5, 5.0, 9.5, -1.0, -1.0):
        made.add(value)
        rows.append((made.above, made.below))
    assert rows == [(1, 0), (2, 0), (0, 0), (1, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_so_many_in_a_row_are_beyond_no_end_by_chance(seed):
    """Whatever the tail: a fifth to the power of twelve is next to nothing."""
    source = random.Random(seed)
    made = Earlier(*earlier_span(64))
    for _ in range(10_000):
        made.add(source.gauss(0, 1) / max(source.random(), 1e-3))
        assert max(made.above, made.below) < 12


def inertia(values: list[float]) -> float:
    made = Earlier(*earlier_span(64))
    for value in values:
        made.add(value)
    return made.inertia


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "shape",
    [
        lambda step, noise: 1 + 0.1 * noise,
        lambda step, noise: -50 + 0.1 * noise,
        lambda step, noise: 9 - 0.05 * step + 0.1 * noise,  # falls all the time
        lambda step, noise: 0.5 + exp(-step / 60) + 0.1 * noise,  # and ever less
        lambda step, noise: 1 + 0.1 * noise + (100 if step % 17 == 0 else 0),  # outliers
        lambda step, noise: [1.0, 5.0][step % 2] + 0.1 * noise,  # batches of two kinds in turn
    ],
)
def test_independent_values_have_hardly_any_inertia(shape, seed):
    source = random.Random(seed)
    assert inertia([shape(step, source.gauss(0, 1)) for step in range(120)]) < 2


def test_values_that_follow_each_other_smoothly_have_inertia():
    source = random.Random(1)
    waves = [sin(step / 9) + 0.05 * source.gauss(0, 1) for step in range(120)]
    assert inertia(waves) > 3
    wandering = [0.0]
    for _ in range(200):
        wandering.append(wandering[-1] + source.gauss(0, 1))
    assert 1.8 < inertia(wandering) < MOST_INERTIA


@pytest.mark.parametrize(
    "values",
    [[0.0] * 120, [0.1] * 120, [9 - 0.1 * step for step in range(120)], [1e300, -1e300] * 60],
)
def test_values_without_noise_have_no_inertia(values):
    """Their differences are alike, but for rounding."""
    assert inertia(values) == 1.0


def test_values_that_mostly_repeat_have_the_most_inertia():
    source = random.Random(1)
    repeated = [value for _ in range(12) for value in [source.random()] * 10]
    assert inertia(repeated) == MOST_INERTIA


def test_inertia_is_that_of_the_values_before_the_newest():
    made = Earlier(*earlier_span(64))
    source = random.Random(1)
    for _ in range(110):
        made.add(source.random())
    before = made.inertia
    for step in range(13):
        made.add(sin(step / 9))
    assert made.inertia == pytest.approx(before, rel=0.5)
    for step in range(13, 140):
        made.add(sin(step / 9))
    assert made.inertia > 3
