"""What the bench on judging asks of the engine."""

from math import isfinite

from bench.judging import frames
from esper_tamiyo.judging.observations import Slope
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.table import conditions
from esper_tamiyo.language.table_file import load


def test_every_slope_of_the_default_table_is_worked_out():
    """A value that does not fall is let off without."""
    table = load("default")
    watched = {
        part.metric
        for rule in table.rules
        for part in conditions(rule.when)
        if part.operator is Operator.RUNS_OUT_WITHIN
    }
    assert watched
    *past, newest = frames(table.baseline.window + table.baseline.warmup + 1, seeds=0)
    for key in watched:
        slope = Slope(table.baseline.window, table.baseline.warmup)
        for frame in past:
            slope.add(frame.values[key])
        assert isfinite(slope.left(newest.values[key]))
