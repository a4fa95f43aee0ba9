"""Every operator, true, false and unknown; and every rule of the prototype at its number."""

from math import nextafter
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.decisions import Action, Proposal, SeedOperation, Severity
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.history import BaselineKey, History, Watched
from esper_tamiyo.judging.observations import Last, RollingMedian, Slope
from esper_tamiyo.judging.peers import PeerBoard
from esper_tamiyo.judging.rules import test_of as as_test
from esper_tamiyo.language.operators import BaselineKind, Operator
from esper_tamiyo.language.table import Combine, Condition, Group
from esper_tamiyo.language.table_file import load

PROPOSAL = Proposal("seed", SeedOperation.GERMINATE)
TRUE = Condition("loss", Operator.ABOVE, 0.0)
FALSE = Condition("loss", Operator.BELOW, 0.0)
UNKNOWN = Condition("accuracy", Operator.ABOVE, 0.0)


def verdict(condition, values, before=(), warmup=3, window=5):
    """The verdict on ``values`` after the frames ``before``."""
    kinds = [
        BaselineKey(key, kind) for key in ("loss", "loss_volatility") for kind in BaselineKind
    ]
    watched = Watched(
        tuple(kinds), ("loss",), ("loss",), window=window, warmup=warmup, earlier=("loss",)
    )
    history = History(watched)
    for earlier in before:
        history.absorb(earlier)
    return as_test(condition)(values, history)


def loss(*values):
    return [{"loss": value} for value in values]


@pytest.mark.parametrize(
    ("operator", "number", "value", "expected"),
    [
        (Operator.ABOVE, 2.0, 2.1, True),
        (Operator.ABOVE, 2.0, 2.0, False),
        (Operator.AT_LEAST, 2.0, 2.0, True),
        (Operator.AT_LEAST, 2.0, nextafter(2.0, 0.0), False),
        (Operator.BELOW, 2.0, 1.9, True),
        (Operator.BELOW, 2.0, 2.0, False),
        (Operator.AT_MOST, 2.0, 2.0, True),
        (Operator.AT_MOST, 2.0, nextafter(2.0, 3.0), False),
    ],
)
def test_a_bound(operator, number, value, expected):
    condition = Condition("loss", operator, number)
    assert verdict(condition, {"loss": value}) is expected
    assert verdict(condition, {"accuracy": value}) is None


@pytest.mark.parametrize(
    ("value", "before", "expected"),
    [
        (6.1, (1, 2, 9), True),
        (6.0, (1, 2, 9), False),
        (99.0, (1, 2), None),  # warm-up
        (None, (1, 2, 9), None),
        (1.0, (0, 0, 0), None),  # of nothing anything is any number of times
        # As far above -2 as 6 is above 2, in sizes of the baseline.
        (2.0, (-1, -2, -3), False),
        (2.1, (-1, -2, -3), True),
        (-7.0, (-1, -2, -3), False),
        (31.0, (99, 1, 10, 10, 10, 10), True),  # 99 has left the window of five
    ],
)
def test_above_baseline(value, before, expected):
    condition = Condition("loss", Operator.ABOVE_BASELINE, 3.0, "loss")
    values = {} if value is None else {"loss": value}
    assert verdict(condition, values, loss(*before)) is expected


def test_above_the_baseline_of_another_metric():
    condition = Condition("loss_delta", Operator.ABOVE_BASELINE, 3.0, "loss_volatility")
    before = [{"loss_volatility": 2.0}] * 3
    assert verdict(condition, {"loss_delta": 6.5}, before) is True
    assert verdict(condition, {"loss_delta": 6.0, "loss_volatility": 50.0}, before) is False


@pytest.mark.parametrize(
    ("value", "before", "expected"),
    [
        (0.9, (1, 2, 9), True),
        (1.0, (1, 2, 9), False),
        (0.0, (1, 2), None),  # warm-up
        (None, (1, 2, 9), None),
        (0.0, (0, 0, 0), None),  # no part of nothing is less than nothing
        (-3.0, (-1, -2, -3), False),
        (-3.1, (-1, -2, -3), True),
    ],
)
def test_below_baseline(value, before, expected):
    condition = Condition("loss", Operator.BELOW_BASELINE, 0.5, "loss")
    values = {} if value is None else {"loss": value}
    assert verdict(condition, values, loss(*before)) is expected


RANGE = [1 + step % 10 for step in range(50)]
"""Ends of 3 and 8, or 2 and 9, whichever of them are left out: of them 24 are looked at."""


@pytest.mark.parametrize(
    ("operator", "newest", "value", "expected"),
    [
        (Operator.RISEN_FOR, (12, 12), 12, True),
        (Operator.RISEN_FOR, (12, 12), 5, False),
        (Operator.RISEN_FOR, (12, 5), 12, False),
        (Operator.RISEN_FOR, (12, 12), None, None),
        (Operator.RISEN_FOR, (0, 0), 0, False),
        (Operator.FALLEN_FOR, (0, 0), 0, True),
        (Operator.FALLEN_FOR, (0, 5), 0, False),
        (Operator.FALLEN_FOR, (0, 0), None, None),
    ],
)
def test_what_has_risen_or_fallen_for_three_steps(operator, newest, value, expected):
    condition = Condition("loss", operator, 3.0)
    values = {} if value is None else {"loss": float(value)}
    assert verdict(condition, values, loss(*RANGE, *newest), window=16) is expected
    assert verdict(condition, values, loss(*RANGE[:20]), window=16) is None


@pytest.mark.parametrize(
    ("kind", "before", "against"),
    [
        # three warm it up, five are its window
        (BaselineKind.FROZEN, (99, 99, 99, 1, 2, 3, 4), None),
        (BaselineKind.FROZEN, (99, 99, 99, 1, 2, 3, 4, 5), 3),
        (BaselineKind.FROZEN, (99, 99, 99, 1, 2, 3, 4, 5, *[50] * 20), 3),
        (BaselineKind.LOWEST, (9, 9), None),
        (BaselineKind.LOWEST, (9, 9, 9, 1, 1, 1, *[50] * 9), 1),
        (BaselineKind.LOWEST, (9, 9, 9, 1, 9, 9), 9),  # one low value moves no median
        (BaselineKind.HIGHEST, (1, 1, 1, 7, 7, 7, *[0] * 9), 7),
        (BaselineKind.ROLLING, (1, 1, 1, 7, 7, 7, *[2] * 9), 2),
        (BaselineKind.ROLLING, (1, 1, 1, 7, 7, 7, *[0] * 9), None),
    ],
)
def test_which_past_a_baseline_is(kind, before, against):
    condition = Condition("loss", Operator.ABOVE_BASELINE, 2.0, "loss", kind)
    if against is None:
        assert verdict(condition, {"loss": 1e9}, loss(*before)) is None
    else:
        assert verdict(condition, {"loss": 2.0 * against + 0.1}, loss(*before)) is True
        assert verdict(condition, {"loss": 2.0 * against}, loss(*before)) is False


@pytest.mark.parametrize(
    ("value", "before", "expected"),
    [
        (50.0, [99, 99, 99, 100, 90, 80, 70, 60], True),  # five steps from here
        (50.1, [99, 99, 99, 100, 90, 80, 70, 60], False),
        (10.0, [99, 99, 99, 50, 40, 30, 20], None),  # four of a window of five
        (60.0, [99, 99, 99, 60, 60, 60, 60, 60], False),
        (61.0, [99, 99, 99, 60, 60, 60, 60, 60], False),  # it rises
        (10.0, [99, 99, 99, 90, 10, 10, 10, 10], False),  # it fell once, and falls no more
        (-1.0, [99, 99, 99, 8, 6, 4, 2, 1], True),
        (None, [99, 99, 99, 100, 90, 80, 70, 60], None),
    ],
)
def test_runs_out_within(value, before, expected):
    condition = Condition("loss", Operator.RUNS_OUT_WITHIN, 5.0)
    values = {} if value is None else {"loss": value}
    assert verdict(condition, values, loss(*before)) is expected


@given(
    st.floats(0.01, 10.0),
    st.integers(6, 40),
    st.lists(st.floats(-0.2, 0.2), min_size=70, max_size=70),
)
def test_a_noisy_line_runs_out_when_it_would(slope, steps, noise):
    """Within a tenth of what is drawn, plus what so much noise may hide."""
    slope_of = Slope(window=64, warmup=3)
    start = slope * (67 + steps)
    values = [start - slope * step + slope * noise[step] for step in range(68)]
    for value in values[:-1]:
        slope_of.add(value)
    left = slope_of.left(values[-1])
    assert left == pytest.approx(steps, rel=0.1, abs=1.0)


@pytest.mark.parametrize(
    ("present", "before", "expected"),
    [
        (False, [{"loss": 1.0}, {}, {}], True),
        (False, [{"loss": 1.0}, {}], False),
        (True, [{"loss": 1.0}, {}, {}], False),
        (False, [{}, {}, {}], None),  # never there: it may be that this run has none
    ],
)
def test_missing_for(present, before, expected):
    condition = Condition("loss", Operator.MISSING_FOR, 3.0)
    assert verdict(condition, {"loss": 1.0} if present else {}, before) is expected


@pytest.mark.parametrize(
    ("operator", "values", "expected"),
    [
        (Operator.ABOVE_PEERS, {0: 3.1, 1: 1.0, 2: 2.0}, True),
        (Operator.ABOVE_PEERS, {0: 3.0, 1: 1.0, 2: 2.0}, False),  # their median is 1.5
        (Operator.ABOVE_PEERS, {0: 9.0, 1: 1.0, 2: 2.0, 3: 5.0}, True),
        (Operator.ABOVE_PEERS, {0: 9.0}, None),
        (Operator.ABOVE_PEERS, {1: 1.0, 2: 2.0}, None),
        (Operator.ABOVE_PEERS, {0: 1.0, 1: -1.0}, None),
        (Operator.BELOW_PEERS, {0: 2.9, 1: 1.0, 2: 2.0}, True),
        (Operator.BELOW_PEERS, {0: 3.0, 1: 1.0, 2: 2.0}, False),
    ],
)
def test_peers_are_the_other_ranks_at_the_same_step(operator, values, expected):
    board = PeerBoard()
    for rank, value in values.items():
        board.post(rank, 7, 0, {"loss": value})
        board.post(rank, 8, 0, {"loss": 1e9})
    history = History(Watched())
    others = board.others(0, 7, "loss", by_ns=0)
    history.peers = {} if others is None else {"loss": others}
    test = as_test(Condition("loss", operator, 2.0))
    own = {"loss": values[0]} if 0 in values else {}
    assert test(own, history) is expected


@given(st.dictionaries(st.integers(0, 9), st.floats(0.0, 1e3), min_size=2), st.data())
def test_the_median_of_the_others_is_theirs(values, data):
    board = PeerBoard()
    for rank, value in values.items():
        board.post(rank, 1, 0, {"loss": value})
    rank = data.draw(st.sampled_from(sorted(values)))
    others = [value for other, value in values.items() if other != rank]
    assert board.others(rank, 1, "loss", by_ns=0) == pytest.approx(median(others))


def test_what_a_rank_told_before_it_began_anew_counts_no_more():
    board = PeerBoard()
    for rank, value in enumerate((1.0, 2.0, 9.0)):
        board.post(rank, 1, 0, {"loss": value})
    assert board.others(0, 1, "loss", by_ns=0) == 5.5
    board.remove_rank(2)
    board.post(2, 1, 0, {"loss": 4.0})
    assert board.others(0, 1, "loss", by_ns=0) == 3.0


@pytest.mark.parametrize(
    ("value", "before", "expected"),
    [
        (3.0, (2.0,), True),
        (2.9, (2.0,), False),
        (3.0, (), None),
        (None, (2.0,), None),
    ],
)
def test_rises_by(value, before, expected):
    condition = Condition("loss", Operator.RISES_BY, 1.0)
    values = {} if value is None else {"loss": value}
    assert verdict(condition, values, loss(*before)) is expected


def test_rises_by_looks_past_steps_without_the_value():
    condition = Condition("loss", Operator.RISES_BY, 1.0)
    assert verdict(condition, {"loss": 3.0}, [{"loss": 2.0}, {}, {}]) is True


@pytest.mark.parametrize(
    ("value", "before", "expected"),
    [
        (1.0, (1, 1), True),
        (1.0, (2, 1, 1), True),
        (1.0, (1, 2, 1), False),
        (2.0, (1, 1), False),
        (1.0, (1,), None),  # equal so far, too few to say
        (None, (1, 1), None),
    ],
)
def test_unchanged_for(value, before, expected):
    condition = Condition("loss", Operator.UNCHANGED_FOR, 3.0)
    values = {} if value is None else {"loss": value}
    assert verdict(condition, values, loss(*before)) is expected


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("nonfinite", {"nonfinite": 1.0}, True),
        ("nonfinite", {"nonfinite": 0.0}, False),
        ("nonfinite", {"loss": 1.0}, None),
        ("loss", {"nonfinite": 1.0}, True),
        ("loss", {"nonfinite": 1.0, "loss": 1.0}, False),
        ("loss", {"nonfinite": 0.0}, None),
        ("loss", {}, None),
    ],
)
def test_nonfinite(metric, values, expected):
    assert verdict(Condition(metric, Operator.NONFINITE), values) is expected


@pytest.mark.parametrize(
    ("combine", "parts", "expected"),
    [
        (Combine.ALL, (TRUE, TRUE), True),
        (Combine.ALL, (TRUE, FALSE), False),
        (Combine.ALL, (TRUE, UNKNOWN), None),
        (Combine.ALL, (UNKNOWN, FALSE), False),
        (Combine.ANY, (FALSE, TRUE), True),
        (Combine.ANY, (UNKNOWN, TRUE), True),
        (Combine.ANY, (FALSE, FALSE), False),
        (Combine.ANY, (FALSE, UNKNOWN), None),
        (Combine.ALL, (TRUE, Group(Combine.ANY, (FALSE, UNKNOWN))), None),
    ],
)
def test_groups_are_three_valued(combine, parts, expected):
    assert verdict(Group(combine, parts), {"loss": 1.0}) is expected


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    st.integers(2, 9),
    st.integers(1, 9),
)
def test_the_rolling_median_is_the_median_of_the_last_values(values, window, warmup):
    rolling = RollingMedian(window, min(warmup, window))
    for count, value in enumerate(values, 1):
        rolling.add(value)
        if count < min(warmup, window):
            assert rolling.value is None
            continue
        last = sorted(values[max(0, count - window) : count])
        low, high = last[(len(last) - 1) // 2], last[len(last) // 2]
        assert rolling.value == pytest.approx((low + high) / 2)
        assert low <= rolling.value <= high


def test_last_counts_repeats():
    last = Last()
    for value in (1.0, 2.0, 2.0):
        last.add(value)
    assert (last.value, last.repeats, last.total) == (2.0, 2, 3)


QUIET = {
    "step": 0.0,
    "loss": 1.0,
    "loss_delta": 0.0,
    "loss_volatility": 0.0,
    "grad_var": 0.0,
    "optimizer_lr": 0.1,
    "nonfinite": 0.0,
    "kasmina.isolation.violations": 4.0,
}
JUST_MORE = 1.0000001

PROTOTYPE = [
    # rule, values at its number (silent), values beyond (fires), severity, action
    ("hook_budget", {"hook_latency_ms": 50.0}, {"hook_latency_ms": 50.1}),
    ("step_latency_high", {"step_latency_ms": 120.0}, {"step_latency_ms": 120.1}),
    ("kasmina_apply_slow", {"kasmina.apply_ms": 30.0}, {"kasmina.apply_ms": 30.1}),
    ("kasmina_finalize_slow", {"kasmina.finalize_ms": 30.0}, {"kasmina.finalize_ms": 30.1}),
    (
        "isolation_violations",
        {"kasmina.isolation.violations": 4.0},
        {"kasmina.isolation.violations": 5.0},
    ),
    ("loss_spike", {"loss_delta": 0.15}, {"loss_delta": 0.15 * JUST_MORE}),
    ("loss_warning", {"loss_delta": 0.075}, {"loss_delta": 0.075 * JUST_MORE}),
    (
        "loss_volatility_high",
        {"loss_volatility": 0.1125},
        {"loss_volatility": 0.1125 * JUST_MORE},
    ),
    ("grad_variance_high", {"grad_var": 1.0}, {"grad_var": JUST_MORE}),
    ("grad_conflict_high", {"grad_conflict_rate": 0.5}, {"grad_conflict_rate": 0.51}),
    (
        "optimizer_hint",
        {"optimizer_lr": 1e-9, "loss_delta": 0.08},
        {"optimizer_lr": 0.0, "loss_delta": 0.08},
    ),
    (
        "device_pressure_high",
        {"gpu_util_percent": 95.0, "gpu_mem_free_gb": 0.21},
        {"gpu_util_percent": 95.0, "gpu_mem_free_gb": 0.2},
    ),
    ("cpu_pressure_high", {"cpu_util_percent": 94.9}, {"cpu_util_percent": 95.0}),
    ("nonfinite_loss", {"nonfinite": 0.0}, {"nonfinite": 1.0}),
]


def fired(engine, step, values):
    frame = StepFrame("run", "one", 0, step, step, {**QUIET, **values, "step": float(step)})
    return {finding.rule for finding in engine.observe(frame, PROPOSAL).findings}


@pytest.mark.parametrize(("rule", "at", "beyond"), PROTOTYPE, ids=[row[0] for row in PROTOTYPE])
def test_prototype_rules_fire_beyond_their_number_and_not_at_it(rule, at, beyond):
    engine = Engine(load("prototype"))
    fired(engine, 0, {})
    assert rule not in fired(engine, 1, at)
    assert rule in fired(engine, 2, beyond)


def test_optimizer_stale_needs_fifty_equal_rates_and_drift():
    engine = Engine(load("prototype"))
    drift = {"loss_volatility": 0.2}
    for step in range(49):
        assert "optimizer_stale" not in fired(engine, step, drift)
    assert "optimizer_stale" in fired(engine, 49, drift)
    assert "optimizer_stale" not in fired(engine, 50, {})
    assert "optimizer_stale" in fired(engine, 51, {"grad_var": 1.1})
    assert "optimizer_stale" not in fired(engine, 52, {"optimizer_lr": 0.2, **drift})


def test_prototype_severities_and_actions_are_the_design_s():
    table = {rule.id: rule for rule in load("prototype").rules}
    pauses = {"hook_budget", "step_latency_high", "isolation_violations", "loss_spike"}
    pauses |= {"device_pressure_high", "nonfinite_loss"}
    assert {name for name, rule in table.items() if rule.action is Action.PAUSE} == pauses
    high = (pauses - {"nonfinite_loss"}) | {"cpu_pressure_high"}
    assert {name for name, rule in table.items() if rule.severity is Severity.HIGH} == high
    assert table["nonfinite_loss"].severity is Severity.CRITICAL
    entering = {name for name, rule in table.items() if rule.conservative}
    assert entering == {"loss_spike", "nonfinite_loss"}
    at_any_time = pauses | {"optimizer_hint", "optimizer_stale"}
    assert {name for name, rule in table.items() if not rule.downgrade} == at_any_time


@pytest.mark.parametrize("step_ms", [0.5, 30_000.0])
@pytest.mark.parametrize("level", [0.01, 11.0])
def test_the_default_table_fits_any_scale(step_ms, level):
    """Quiet on a steady run; a jump that stays is one event, and going on is divergence."""
    engine = Engine(load("default"))

    def values(step, loss, before, volatility):
        wobble = 1 + 0.05 * (-1) ** step
        return {
            "loss": loss * wobble,
            "loss_delta": loss * wobble - before,
            "loss_volatility": volatility,
            "gradient_norm": wobble,
            "grad_var": 0.01,
            "optimizer_lr": 0.1,
            "step_latency_ms": step_ms * wobble,
            "hook_latency_ms": 0.3,
            "nonfinite": 0.0,
        }

    before = level
    for step in range(120):
        now = values(step, level, before, level * 0.05)
        assert fired(engine, step, now) == set()
        before = now["loss"]
    found = []
    for step in range(120, 140):
        loss = level * 6 * max(1.0, 1.2 ** (step - 133))
        found.append(fired(engine, step, values(step, loss, before, level * 2.5)))
    assert set.union(*found[:7]) == {"loss_warning"}  # which holds a proposal back
    assert found[7] == {"loss_spike"}
    assert set.union(*found[8:14]) == set()
    assert "loss_diverging" in set.union(*found[14:])
    assert "loss_spike" not in set.union(*found[8:])


def test_a_huge_value_breaks_nothing():
    engine = Engine(load("default"))
    for step in range(70):
        fired(engine, step, {"loss": 1e308 * (-1) ** step, "loss_delta": -1e308})
    assert engine.overview()["frames"]["bad"] == 0


@given(
    st.lists(st.floats(-5.0, 100.0), min_size=20, max_size=40),
    st.floats(0.0, 100.0),
    st.integers(1, 2000),
)
def test_what_no_line_is_fitted_for_would_not_have_run_out(before, fall, number):
    slope = Slope(window=12, warmup=2)
    # Something that falls on the whole, so that both outcomes come up.
    values = [value / 10 - fall * place / 10 for place, value in enumerate(before)]
    lowest = min(values)
    for value in values:
        left = slope.left(value - lowest)
        expected = None if left is None else left <= number
        assert slope.within(value - lowest, number) == expected
        slope.add(value - lowest)
