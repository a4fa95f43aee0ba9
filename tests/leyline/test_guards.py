"""Guards: bounds that the sidecar told, held against what is known before an update."""

import math
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.guards import Guards, Held
from esper_otel.leyline.wire import GUARDED, Guard

NONFINITE = Guard("nonfinite", above=0.0)


@pytest.mark.parametrize(
    ("guards", "values", "crossed"),
    [
        # Nothing is guarded.
        ([], (1e9, 1e9, 1e9), False),
        ([], (nan, nan, nan), False),
        # One bound, of each value, on each side; the bound itself is inside.
        ([Guard("loss", above=2.0)], (2.0, None, None), False),
        ([Guard("loss", above=2.0)], (2.1, None, None), True),
        ([Guard("loss", below=-1.0)], (-1.0, None, None), False),
        ([Guard("loss", below=-1.0)], (-1.1, None, None), True),
        ([Guard("gradient_norm", above=2.0)], (9.0, 2.0, 9.0), False),
        ([Guard("gradient_norm", above=2.0)], (0.0, 2.1, 0.0), True),
        ([Guard("gradient_norm", below=0.1)], (0.0, 0.05, 0.0), True),
        ([Guard("optimizer_lr", above=0.1)], (9.0, 9.0, 0.1), False),
        ([Guard("optimizer_lr", above=0.1)], (0.0, 0.0, 0.2), True),
        ([Guard("optimizer_lr", below=0.1)], (0.0, 0.0, 0.05), True),
        # What is not known is not held against anything.
        ([Guard("loss", above=2.0, below=1.0)], (None, None, None), False),
        ([Guard("gradient_norm", above=2.0)], (None, None, 5.0), False),
        # What is not finite crosses that guard and no other.
        ([NONFINITE], (nan, None, None), True),
        ([NONFINITE], (1.0, inf, None), True),
        ([NONFINITE], (-inf, 1.0, None), True),
        ([NONFINITE], (1.0, 1.0, 1.0), False),
        ([Guard("loss", above=2.0)], (nan, None, None), False),
        ([Guard("loss", above=2.0)], (None, inf, None), False),
        # And it hides nothing of the other values.
        ([Guard("gradient_norm", above=2.0)], (nan, 3.0, None), True),
        ([Guard("optimizer_lr", above=0.1)], (nan, nan, 0.2), True),
        ([Guard("optimizer_lr", above=0.1)], (1.0, inf, 0.2), True),
        # Metrics that this version does not know.
        ([Guard("accuracy", below=0.5)], (1.0, 1.0, 1.0), False),
        # Of two about the same metric the newest counts.
        ([Guard("loss", above=2.0), Guard("loss", above=9.0)], (3.0, None, None), False),
    ],
)
def test_crossed(guards, values, crossed):
    assert Guards(guards).crossed(*values) is crossed


NUMBERS = st.floats(allow_nan=False, width=32)
VALUES = st.none() | st.floats(width=32)


@given(
    bounds=st.dictionaries(st.sampled_from(GUARDED[:4]), st.tuples(NUMBERS, NUMBERS)),
    nonfinite=st.booleans(),
    values=st.tuples(VALUES, VALUES, VALUES, VALUES),
)
def test_an_update_is_inside_if_every_value_that_is_known_is(bounds, nonfinite, values):
    guards = [Guard(metric, above, below) for metric, (above, below) in bounds.items()]
    finite = {
        metric: value
        for metric, value in zip(GUARDED, values, strict=False)
        if value is not None and abs(value) < inf
    }
    bad = any(value is not None and not abs(value) < inf for value in values[:2])
    expected = (bad and nonfinite) or any(
        value > bounds[metric][0] or value < bounds[metric][1]
        for metric, value in finite.items()
        if metric in bounds
    )
    if nonfinite:
        guards.append(NONFINITE)
    if all(setting is None or abs(setting) < inf for setting in values[2:]):
        assert Guards(guards).crossed(*values) is expected


@pytest.mark.parametrize(
    ("guards", "looks", "skips"),
    [
        ([], (False, False), False),
        ([Guard("optimizer_lr", above=1.0)], (True, False), False),
        ([Guard("optimizer_momentum", above=0.9)], (False, True), False),
        ([NONFINITE], (False, False), False),
        ([Guard("nonfinite", above=0.0, skips=True)], (False, False), True),
        ([Guard("loss", above=1.0, skips=True)], (False, False), False),
    ],
)
def test_what_is_looked_at_and_what_may_be_left_out_unasked(guards, looks, skips):
    made = Guards(guards)
    assert (made.looks_at_rate, made.looks_at_momentum) == looks
    assert made.skips_nonfinite is skips


@pytest.mark.parametrize(
    ("momentum", "scale"),
    [(None, 1.0), (0.95, 1.0), (0.99, 1.0), (0.999, 0.9 / 0.999), (inf, 1.0), (math.nan, 1.0)],
)
def test_a_momentum_beyond_what_is_held_is_scaled(momentum, scale):
    guards = Guards([Guard("optimizer_momentum", 0.954, held_above=0.99, held_to=0.9)])
    assert guards.held(1.0, 2.0, 0.1, momentum) == Held(None, 1.0, False, scale)
