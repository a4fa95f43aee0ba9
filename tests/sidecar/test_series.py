"""The notation of series: many values in few characters."""

from contextlib import suppress
from math import inf, isnan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_tamiyo.replaying.table_tests import MAX_VALUES, SeriesError, series


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", []),
        ("4", [4]),
        ("1 1 2", [1, 1, 2]),
        ("  1\n 2\t3 ", [1, 2, 3]),
        ("4x3", [4, 4, 4]),
        ("4X1", [4]),
        ("1+2x3", [1, 3, 5]),
        ("1-0.5x3", [1, 0.5, 0]),
        ("-2+4x2", [-2, 2]),
        ("-2--4x2", [-2, 2]),
        ("1e-3x2", [0.001, 0.001]),
        ("1e-3-1e-3x2", [0.001, 0]),
        ("1e+3+1e+3x2", [1000, 2000]),
        (".5 5. +5", [0.5, 5, 5]),
        ("_ 1 _x2", [None, 1, None, None]),
        ("inf -inf +INF", [inf, -inf, inf]),
        ("inf+0x2", [inf, inf]),
    ],
)
def test_what_a_series_stands_for(text, values):
    assert series(text) == values


def test_nan_is_a_value_and_not_a_gap():
    assert [isnan(value) for value in series("nanx2 NaN")] == [True] * 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fast", "expected values like 4, 4x20, 1+0.5x10, _ or nan; got 'fast'"),
        ("1,2", "got '1,2'"),
        ("4x", "got '4x'"),
        ("x4", "got 'x4'"),
        ("4x-1", "got '4x-1'"),
        ("4x1.5", "got '4x1.5'"),
        ("__", "got '__'"),
        ("_+1x3", "got '_+1x3'"),
        ("1_000", "got '1_000'"),
        ("١x2", "got '١x2'"),
        ("1+nanx3", "got '1+nanx3'"),
        ("1+1", "'1+1' does not say how often: expected 1+1x10 or the like"),
        ("4x0", "'4x0' makes 0 values; expected 1 to 100,000"),
        ("4x100001", "makes 100,001 values"),
        ("4x99999 1x2", "'1x2' makes 2 values"),
        ("4x" + "9" * 5000, "got '4x999"),
        ("y" * 500, f"got '{'y' * 60}'"),
    ],
)
def test_a_word_that_is_none_is_shown_with_what_was_expected(text, problem):
    with pytest.raises(SeriesError) as caught:
        series(text)
    assert problem in str(caught.value)


NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), NUMBERS)))
def test_values_one_by_one_are_themselves(values):
    assert series(" ".join("_" if value is None else repr(value) for value in values)) == values


@settings(deadline=None)
@given(NUMBERS, NUMBERS, st.integers(1, 50))
def test_a_ramp_is_start_and_slope(start, slope, count):
    values = series(f"{start!r}+{slope!r}x{count}")
    assert values == [start + place * slope for place in range(count)]


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_values_or_an_error_and_nothing_else(text):
    with suppress(SeriesError):
        assert len(series(text)) <= MAX_VALUES
