"""Curves as characters: no extreme is lost, and what is not known is not drawn."""

import numpy as np
import pytest

from esper_otel.report.curves import Points
from esper_otel.top.charts import ASCII, StepRange, braille, filled, means, without_braille

BLANK = "\u2800"


def points(values, first=0):
    numbers = np.array([np.nan if value is None else value for value in values], float)
    return Points(np.arange(first, first + len(values)), numbers)


def drawn(values, columns=20, rows=4, log=False):
    return braille(points(values), StepRange(0, len(values) - 1), columns, rows, log=log)


def test_a_straight_line_goes_from_corner_to_corner():
    found = drawn(range(8), columns=4, rows=2)
    assert found.lines == ["⠀⠀⡠⠊", "⡠⠊⠀⠀"]
    assert (found.low, found.high) == (0.0, 7.0)


def test_few_points_are_joined():
    lines = drawn([0.0, 3.0, 0.0]).lines
    assert all(any(line[column] != BLANK for line in lines) for column in range(20))


def test_a_single_spike_among_very_many_steps_is_there():
    values = np.zeros(100_000)
    values[77_777] = 5.0
    lines = drawn(values, columns=40).lines
    (place,) = (place for place, char in enumerate(lines[0]) if char != BLANK)
    assert place == StepRange(0, 99_999).column_of(77_777, 40)


def test_what_is_no_number_is_a_gap():
    values = [1.0] * 10 + [None] * 10 + [1.0] * 10
    line = "".join(
        "x" if any(row[column] != BLANK for row in drawn(values, 30).lines) else " "
        for column in range(30)
    )
    assert line.count(" ") >= 8
    assert line.strip().split() == ["x" * len(part) for part in line.split()]


def test_one_value_alone_and_none_at_all():
    assert any(line != BLANK * 20 for line in drawn([2.5]).lines)
    assert drawn([None, None]) is None
    assert braille(points([]), StepRange(0, 0), 5, 2, log=False) is None


def test_on_a_logarithmic_scale_what_is_not_above_zero_is_left_out():
    found = drawn([0.0, 1.0, 10.0, 100.0], log=True)
    assert (found.low, found.high) == (1.0, 100.0)
    assert drawn([0.0, -1.0], log=True) is None


def test_a_part_of_the_steps():
    found = braille(points(range(100)), StepRange(90, 99), 10, 2, log=False)
    assert (found.low, found.high) == (90.0, 99.0)


def test_means_are_of_equal_parts_and_gaps_are_filled():
    assert means(points([1, 3, 5, 7]), StepRange(0, 3), 2) == [2.0, 6.0]
    assert means(points([1, None, None, 7]), StepRange(0, 3), 4) == [1.0, None, None, 7.0]
    assert filled([None, 1.0, None, None, 7.0, None]) == [None, 1.0, 1.0, 1.0, 7.0, None]


@pytest.mark.parametrize(
    ("encoding", "lacks"), [("utf-8", False), ("latin-1", True), (None, True)]
)
def test_a_terminal_without_these_characters_gets_others(encoding, lacks):
    assert without_braille(encoding) is lacks
    text = "\n".join(drawn(range(50)).lines) + "▁▂▃▄▅▆▇█ → ▲ ▸ × … ← ↑ ↓"
    assert text.translate(ASCII).isascii()
