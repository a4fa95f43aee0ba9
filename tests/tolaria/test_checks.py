"""Updates that cross a guard: asked about before they are made, and changed for once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from tolaria.loops import Clock, Late, Optimizer, make, one_step, stop_the_clock
from tolaria.sidecars import Sidecar, decided

from esper_otel.leyline.decisions import (
    FAILED_OPEN,
    TIMEOUT,
    Action,
    Finding,
    Severity,
    unanswered,
)
from esper_otel.leyline.guards import Guards
from esper_otel.leyline.wire import Guard
from esper_otel.tolaria.update_control import HELD_STEPS, MOST_SKIPS

INSIDE, OUTSIDE = 1.0, 20.0

EVERYTHING = [
    Guard("loss", above=10.0, below=0.0),
    Guard("gradient_norm", above=10.0),
    Guard("optimizer_lr", above=1.0),
    Guard("nonfinite", above=0.0),
]

PREVIEWED = (
    "loss",
    "loss_delta",
    "loss_ewma",
    "loss_volatility",
    "gradient_norm",
    "grad_norm_ewma",
    "grad_var",
)


@pytest.fixture
def clock(monkeypatch):
    return stop_the_clock(monkeypatch)


def guarded(clock, update=None, guards=EVERYTHING, enforce=True, **options):
    """A recorder whose sidecar has told guards, and answers checks with ``update``."""
    sidecar = Sidecar(clock, checks_ms=options.pop("checks_ms", 0.0))
    sidecar.guards = Guards(guards)
    sidecar.update = update
    recorder, frames = make(enforce, client=sidecar, **options)
    return recorder, frames, sidecar


class Parameter:
    grad = None


class Trained(Optimizer):
    """One parameter; :meth:`train` says what its update saw of rate and gradient."""

    def __init__(self, rate=0.1):
        self.parameter = Parameter()
        super().__init__({"lr": rate, "momentum": 0.9, "params": [self.parameter]})
        self.seen = []


def train(recorder, clock, losses, *, norm=2.0):
    """Steps with these losses; what the update of each saw: its rate and its gradient."""
    optimizer = recorder.optimizer = Trained()
    seen = []
    for loss in losses:
        optimizer.parameter.grad = own = torch.tensor([norm])
        clock.pass_ms(5)
        recorder.backward_begins()
        recorder.backward_ends(loss)
        recorder.optimizer_begins(clock(), norm, optimizer)
        left = optimizer.parameter.grad
        seen.append((optimizer.param_groups[0]["lr"], None if left is None else left.item()))
        recorder.optimizer_ends(optimizer)
        recorder.end_step()
        assert optimizer.parameter.grad is own
        assert optimizer.param_groups[0]["lr"] == 0.1
    return seen


@pytest.mark.parametrize(
    ("loss", "norm", "rate", "asked"),
    [
        (1.0, 2.0, 0.1, False),
        (10.0, 10.0, 1.0, False),
        (10.1, 2.0, 0.1, True),
        (-0.1, 2.0, 0.1, True),
        (1.0, 10.1, 0.1, True),
        (1.0, 2.0, 1.1, True),
        (math.nan, 2.0, 0.1, True),
        (1.0, math.inf, 0.1, True),
        (math.inf, math.nan, 0.1, True),
        (None, None, 0.1, False),
        (None, 11.0, 0.1, True),
        (1.0, None, 2.0, True),
    ],
)
def test_an_update_is_asked_about_only_when_it_crosses_a_guard(clock, loss, norm, rate, asked):
    recorder, _, sidecar = guarded(clock)
    recorder.optimizer = Optimizer({"lr": rate})
    one_step(recorder, clock, loss=loss, norm=norm)
    assert len(sidecar.checked) == asked


def test_the_rate_that_is_held_against_its_guard_is_the_one_in_force(clock):
    recorder, _, sidecar = guarded(clock, guards=[Guard("optimizer_lr", above=0.06)])
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    for _ in range(3):
        one_step(recorder, clock)
    assert [step for step, _ in sidecar.checked] == [1], "0.1, and then 0.05"


@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_before_any_guard_was_told_nothing_is_asked(clock, loss):
    recorder, _, sidecar = guarded(clock)
    sidecar.guards = None
    one_step(recorder, clock, loss=loss)
    assert sidecar.checked == []


def test_advise_never_checks(clock):
    recorder, _, sidecar = guarded(clock, decided(1, skip_step=1.0), enforce=False)
    seen = train(recorder, clock, [OUTSIDE, math.nan])
    assert sidecar.checked == []
    assert seen == [(0.1, 2.0)] * 2


@pytest.mark.parametrize("asks", [True, False])
def test_ranks_that_agree_never_check(clock, asks):
    class Agreement:
        any_unsound = False

        def submit_answer(self, decision):
            pass

        def settle(self, step):
            return unanswered("r", step, "nominal")

    recorder, _, sidecar = guarded(clock, decided(1, skip_step=1.0))
    recorder.share_decisions(Agreement(), asks=asks)
    assert train(recorder, clock, [OUTSIDE, math.nan]) == [(0.1, 2.0)] * 2
    assert sidecar.checked == []


def test_what_is_still_on_a_device_is_not_waited_for(clock):
    recorder, _, sidecar = guarded(clock, decided(1, skip_step=1.0))
    late = Late()
    one_step(recorder, clock, loss=late, norm=late)
    assert sidecar.checked == []


def test_a_step_with_a_closure_is_not_held_against_guards(clock):
    recorder, _, sidecar = guarded(clock, decided(1, skip_step=1.0))
    recorder.closure_begins(recorder.optimizer)
    recorder.backward_begins()
    recorder.backward_ends(math.nan)
    recorder.optimizer_ends(recorder.optimizer)
    recorder.end_step()
    assert sidecar.checked == []


# --- what is asked


def untimed(row):
    return {key: value for key, value in row.items() if not key.endswith("_ms")}


NUMBERS = st.floats(-1e6, 1e6, width=32) | st.sampled_from([math.nan, math.inf, -math.inf])
VALUES = st.tuples(st.none() | NUMBERS, st.none() | NUMBERS, st.booleans())


@given(values=st.lists(VALUES, min_size=1, max_size=20), parts=st.integers(1, 3))
def test_a_check_holds_what_the_frame_of_its_step_will_hold(values, parts):
    """And asking it changes no frame: the same loop, in which nothing is asked."""
    clock = Clock()
    guards = [Guard("loss", above=-math.inf), Guard("gradient_norm", above=-math.inf)]
    recorder, frames, sidecar = guarded(clock, guards=[*guards, Guard("nonfinite")])
    plain, plain_frames, plain_sidecar = guarded(clock, guards=[])
    for loss, norm, reports in values:
        for each in (recorder, plain):
            if reports and loss is not None:
                each.loop_reported(loss, {})
            for _ in range(parts):
                each.backward_begins()
                each.backward_ends(loss)
            each.optimizer_begins(clock(), norm, each.optimizer)
            each.optimizer_ends(each.optimizer)
            each.end_step()
    assert plain_sidecar.checked == []
    assert list(map(untimed, plain_frames.rows)) == list(map(untimed, frames.rows))
    assert len(sidecar.checked) == sum((loss, norm) != (None, None) for loss, norm, _ in values)
    for step, checked in sidecar.checked:
        row = frames.rows[step - 1]
        assert checked["step"] == row["step"] == step
        for key in (*PREVIEWED, "nonfinite", "optimizer_lr", "optimizer_momentum", "lr_scale"):
            assert checked.get(key) == row.get(key), key
        assert set(checked) <= {
            *PREVIEWED,
            "step",
            "nonfinite",
            "optimizer_lr",
            "optimizer_lr_base",
            "optimizer_momentum",
            "lr_scale",
        }


def test_a_check_tells_the_factor_in_force_and_the_rate_with_it(clock):
    recorder, _, sidecar = guarded(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.25)
    train(recorder, clock, [INSIDE, OUTSIDE])
    ((_, checked),) = sidecar.checked
    assert (checked["lr_scale"], checked["optimizer_lr"]) == (0.25, 0.025)


def test_without_enrichment_a_check_holds_what_its_frame_will(clock):
    recorder, frames, sidecar = guarded(clock, enriched=False)
    train(recorder, clock, [INSIDE, OUTSIDE])
    ((_, checked),) = sidecar.checked
    assert checked["loss"] == frames.rows[1]["loss"] == OUTSIDE
    assert "loss_ewma" not in checked


def test_a_check_is_asked_after_the_decision_about_the_step_before_was_taken(clock):
    recorder, frames, sidecar = guarded(clock)
    train(recorder, clock, [OUTSIDE] * 5)
    assert [step for step, _ in sidecar.checked] == [1, 2, 3, 4, 5]
    assert sidecar.lost == 0
    assert recorder.decision.step == 4, "what a check is answered is about one update only"
    assert frames.column("unjudged_steps") == [0.0] * 5


def test_the_time_of_a_check_is_time_spent_on_asking(clock):
    recorder, frames, _ = guarded(clock, checks_ms=0.4)
    for loss in (INSIDE, OUTSIDE, INSIDE):
        one_step(recorder, clock, loss=loss, norm_ms=0.5)
    assert frames.column("tamiyo_latency_ms") == pytest.approx([0.0, 0.4, 0.0])
    assert frames.column("hook_latency_ms") == pytest.approx([0.5, 0.9, 0.5])


# --- what is done


@pytest.mark.parametrize(
    ("parameters", "saw", "told"),
    [
        ({}, (0.1, 2.0), {"lr_scale": 1.0, "update_skipped": 0.0, "optimizer_lr": 0.1}),
        ({"skip_step": 1.0}, (0.1, None), {"lr_scale": 1.0, "update_skipped": 1.0}),
        ({"lr_scale": 0.5}, (0.05, 2.0), {"lr_scale": 0.5, "optimizer_lr": 0.05}),
        ({"max_norm": 0.5}, (0.1, 0.5), {"lr_scale": 1.0, "gradient_norm": 2.0}),
        ({"max_norm": 4.0}, (0.1, 2.0), {"lr_scale": 1.0}),
        ({"lr_scale": 0.5, "max_norm": 0.5}, (0.05, 0.5), {"lr_scale": 0.5}),
        ({"lr_scale": 0.001}, (0.001, 2.0), {"lr_scale": 0.01}),
        ({"skip_step": 0.0}, (0.1, 2.0), {"update_skipped": 0.0}),
        ({"lr_scale": math.nan, "max_norm": -1.0}, (0.1, 2.0), {"lr_scale": 1.0}),
    ],
)
def test_an_answer_is_about_one_update_only(clock, parameters, saw, told):
    recorder, frames, _ = guarded(clock, decided(2, **parameters), span_every=1)
    seen = train(recorder, clock, [INSIDE, OUTSIDE, INSIDE])
    assert seen[0] == seen[2] == (0.1, 2.0)
    assert seen[1] == pytest.approx(saw)
    row = frames.rows[1]
    assert {key: row[key] for key in told} == pytest.approx(told)
    for usual in (frames.rows[0], frames.rows[2]):
        assert (usual["lr_scale"], usual["update_skipped"]) == (1.0, 0.0)
    assert recorder._responses.lr_scale == 1.0


def test_on_top_of_the_factor_in_force_and_within_its_bounds(clock):
    recorder, frames, sidecar = guarded(clock, decided(2, lr_scale=0.1), minimum=0.1)
    sidecar.decisions[1] = decided(1, lr_scale=0.2)
    seen = train(recorder, clock, [INSIDE, OUTSIDE, INSIDE])
    assert [rate for rate, _ in seen] == pytest.approx([0.1, 0.01, 0.02])
    assert frames.column("lr_scale") == pytest.approx([1.0, 0.1, 0.2])
    assert frames.column("optimizer_lr") == pytest.approx([0.1, 0.01, 0.02])


def test_what_was_done_to_an_update_is_told_with_its_own_step(clock):
    answer = decided(2, skip_step=1.0)
    recorder, frames, _ = guarded(clock, answer, span_every=0)
    train(recorder, clock, [INSIDE, OUTSIDE, INSIDE, INSIDE])
    (timeline,) = frames.timelines
    assert (timeline.step, timeline.update) == (2, answer)
    assert timeline.decision.reason == "nominal"


@pytest.mark.parametrize("reason", sorted(FAILED_OPEN))
@pytest.mark.parametrize("loss", [OUTSIDE, math.nan])
def test_without_an_answer_nothing_is_skipped(clock, reason, loss):
    recorder, frames, sidecar = guarded(clock, lambda step, _: unanswered("r", step, reason))
    assert train(recorder, clock, [loss] * 3) == [(0.1, 2.0)] * 3
    assert len(sidecar.checked) == 3
    assert frames.column("update_skipped") == [0.0] * 3


HELD = [
    Guard("loss", above=10.0),
    Guard("gradient_norm", above=10.0, held_above=100.0, held_to=4.0),
    Guard("optimizer_lr", above=0.2, held_above=0.8, held_to=0.1),
]


def nobody(step, _):
    return unanswered("r", step, TIMEOUT)


@pytest.mark.parametrize(
    ("norm", "seen"),
    [(2.0, 2.0), (11.0, 11.0), (100.0, 100.0), (101.0, 4.0), (math.inf, math.inf)],
)
def test_without_an_answer_a_norm_beyond_what_is_held_is_clipped(clock, norm, seen):
    recorder, _, _ = guarded(clock, nobody, guards=HELD)
    ((rate, gradient),) = train(recorder, clock, [INSIDE], norm=norm)
    assert (rate, gradient) == (0.1, pytest.approx(seen))


@pytest.mark.parametrize(
    ("rate", "used"), [(0.1, 0.1), (0.8, 0.8), (0.81, 0.1), (8.0, 0.1), (1e4, 100.0)]
)
def test_without_an_answer_a_rate_beyond_what_is_held_is_scaled(clock, rate, used):
    """Within the bounds of all factors: a hundredth."""
    recorder, frames, _ = guarded(clock, nobody, guards=HELD)
    recorder.optimizer = Optimizer({"lr": rate})
    one_step(recorder, clock)
    assert frames.rows[0]["optimizer_lr"] == pytest.approx(used)
    assert recorder.optimizer.param_groups[0]["lr"] == rate


def test_an_answer_counts_and_not_what_is_held(clock):
    recorder, _, _ = guarded(clock, decided(1, max_norm=50.0), guards=HELD)
    assert train(recorder, clock, [INSIDE], norm=200.0) == [(0.1, pytest.approx(50.0))]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    ("loss", "norm"),
    [(math.nan, 2.0), (1.0, math.inf), (math.nan, math.nan), (math.inf, None), (1.0, 2.0)],
)
def test_without_an_answer_what_is_not_finite_is_skipped_where_a_rule_says_so(
    clock, loss, norm, skips
):
    """However long nobody answers: what is finite does not depend on the past."""
    guards = [*HELD, Guard("nonfinite", above=0.0, skips=skips)]
    recorder, frames, sidecar = guarded(clock, nobody, guards=guards)
    sidecar.decision = unanswered("r", 0, TIMEOUT)
    for _ in range(2 * HELD_STEPS):
        one_step(recorder, clock, loss=loss, norm=norm)
    is_finite = math.isfinite(loss) and (norm is None or math.isfinite(norm))
    assert set(frames.column("update_skipped")) == {float(skips and not is_finite)}


def scheduled(recorder, clock, rates):
    """Steps whose script sets these rates."""
    group = recorder.optimizer.param_groups[0]
    for rate in rates:
        group["lr"] = rate
        one_step(recorder, clock)
        assert group["lr"] == rate


LEAP = [0.1, 3.0, 2.4, 1.5, 0.6, 0.3, 0.16]
"""A schedule that is 30 times too high from its second step on, and comes down."""


@pytest.mark.parametrize("answers", [False, True])
def test_a_rate_that_leapt_keeps_the_shape_of_its_schedule(clock, answers):
    """One factor from the leap on, also below the bound that was crossed, and one check."""

    def answer(step, values):
        return decided(step, lr_scale=0.1 / values["optimizer_lr"])

    recorder, frames, sidecar = guarded(clock, answer if answers else nobody, guards=HELD)
    scheduled(recorder, clock, LEAP)
    assert frames.column("lr_scale") == pytest.approx([1.0, *[0.1 / 3.0] * 6])
    assert frames.column("optimizer_lr")[-1] == pytest.approx(0.16 / 30)
    assert [step for step, _ in sidecar.checked] == [2]


def test_a_rate_that_leapt_is_given_back_once_it_is_usual_again(clock):
    recorder, frames, sidecar = guarded(clock, nobody, guards=HELD)
    scheduled(recorder, clock, [*LEAP, 0.15, 0.16, 0.7, 3.0])
    assert frames.column("lr_scale")[-4:] == pytest.approx([1.0, 1.0, 1.0, 0.1 / 3.0])
    assert [step for step, _ in sidecar.checked] == [2, 10, 11], "0.7 is asked about, and made"


def test_a_rate_that_leaps_again_gets_a_smaller_factor(clock):
    recorder, frames, _ = guarded(clock, nobody, guards=HELD)
    scheduled(recorder, clock, [0.1, 1.0, 2.0, 9.5, 9.5])
    used = frames.column("optimizer_lr")
    assert used == pytest.approx([0.1, 0.1, 0.2, 0.1, 0.1])


def test_another_phase_ends_the_hold(clock):
    recorder, frames, _ = guarded(clock, nobody, guards=[HELD[0], HELD[1], HELD[2]])
    scheduled(recorder, clock, LEAP[:3])
    recorder.phase_begins("two")
    scheduled(recorder, clock, [0.6, 0.6])
    assert frames.column("lr_scale")[-2:] == [1.0, 1.0]


def test_a_held_rate_and_a_factor_in_force_multiply_within_the_bounds(clock):
    recorder, frames, sidecar = guarded(clock, nobody, guards=HELD, minimum=0.02)
    sidecar.decisions[2] = decided(2, lr_scale=0.5)
    scheduled(recorder, clock, LEAP[:5])
    assert frames.column("lr_scale") == pytest.approx([1.0, 1 / 30, 0.02, 0.02, 0.02])


MOMENTUM = [Guard("optimizer_momentum", above=0.954, held_above=0.99, held_to=0.9)]


def with_momenta(recorder, clock, momenta):
    """Steps whose script sets these momenta."""
    group = recorder.optimizer.param_groups[0]
    for momentum in momenta:
        group["momentum"] = momentum
        one_step(recorder, clock)
        assert group["momentum"] == momentum


@pytest.mark.parametrize("answers", [False, True])
def test_a_momentum_that_leapt_is_taken_back_until_it_is_usual_again(clock, answers):
    """One check when it leaps, and one more where it leaps again."""

    def answer(step, values):
        return decided(step, momentum_scale=0.9 / values["optimizer_momentum"])

    recorder, frames, sidecar = guarded(clock, answer if answers else nobody, guards=MOMENTUM)
    with_momenta(recorder, clock, [0.9, 0.999, 0.999, 0.9999, 0.98, 0.9, 0.94, 0.999])
    expected = [0.9, 0.9, 0.9, 0.9 / 0.999 * 0.9999, 0.9 / 0.999 * 0.98, 0.9, 0.94, 0.9]
    assert frames.column("optimizer_momentum") == pytest.approx(expected)
    assert frames.column("lr_scale") == [1.0] * 8
    assert [step for step, _ in sidecar.checked] == [2, 8]


def test_a_momentum_that_may_be_so_is_left_alone(clock):
    recorder, frames, sidecar = guarded(clock, guards=MOMENTUM)
    with_momenta(recorder, clock, [0.9, 0.96, 0.96])
    assert [step for step, _ in sidecar.checked] == [2, 3]
    assert frames.column("optimizer_momentum") == [0.9, 0.96, 0.96]


def test_another_phase_ends_the_hold_of_a_momentum(clock):
    recorder, frames, _ = guarded(clock, nobody, guards=MOMENTUM)
    with_momenta(recorder, clock, [0.9, 0.999])
    recorder.phase_begins("two")
    with_momenta(recorder, clock, [0.98])
    assert frames.column("optimizer_momentum") == pytest.approx([0.9, 0.9, 0.98])


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("value", [0.91, 0.94])
def test_a_leap_of_one_step_does_not_take_back_what_is_no_leap(clock, value, answers):
    """Somewhat above what is usual, which the momentum may be."""

    def answer(step, values):
        return decided(step, momentum_scale=0.9 / values["optimizer_momentum"])

    recorder, frames, _ = guarded(clock, answer if answers else nobody, guards=MOMENTUM)
    with_momenta(recorder, clock, [0.9, 0.999, value, value])
    assert frames.column("optimizer_momentum") == pytest.approx([0.9, 0.9, value, value])


def test_nor_does_one_that_was_seen_after_its_step(clock):
    recorder, frames, sidecar = guarded(clock, guards=[])
    sidecar.decisions[2] = about_momentum(2, 0.999)
    with_momenta(recorder, clock, [0.9, 0.999, 0.94, 0.94])
    assert frames.column("optimizer_momentum") == [0.9, 0.999, 0.94, 0.94]


@pytest.mark.parametrize("loop", [scheduled, with_momenta])
@pytest.mark.parametrize("before", [[], [5.0]])
def test_in_a_phase_that_begins_no_setting_leaps(clock, loop, before):
    """The guards are of the phase before it, until a step of it was judged; a hold of that one
    is not taken up once more."""
    recorder, frames, sidecar = guarded(clock, nobody, guards=[*HELD, *MOMENTUM])
    loop(recorder, clock, [0.1, *before])
    recorder.phase_begins("two")
    sidecar.decisions[len(before) + 2] = unanswered("r", 0, TIMEOUT)
    loop(recorder, clock, [5.0, 5.0])
    key = "optimizer_lr" if loop is scheduled else "optimizer_momentum"
    assert frames.column(key)[-2:] == [5.0, 5.0]
    loop(recorder, clock, [5.0])
    assert frames.column(key)[-1] < 1.0, "these guards are of the new one"


@pytest.mark.parametrize("loop", [scheduled, with_momenta])
def test_a_hold_outlasts_guards_that_a_new_sidecar_does_not_have_yet(clock, loop):
    recorder, frames, sidecar = guarded(clock, nobody, guards=[*HELD, *MOMENTUM])
    loop(recorder, clock, [0.1, 5.0])
    sidecar.guards = Guards([])
    loop(recorder, clock, [5.0])
    key = "optimizer_lr" if loop is scheduled else "optimizer_momentum"
    assert frames.column(key)[1:] == pytest.approx([frames.column(key)[1]] * 2)
    assert frames.column(key)[1] < 1.0


@pytest.mark.parametrize("scale", [1.5, 1.0, 0.0, -1.0, math.nan, math.inf])
def test_a_factor_on_momentum_that_would_not_reduce_it_is_not_applied(clock, scale):
    recorder, frames, sidecar = guarded(
        clock, decided(1, momentum_scale=scale), guards=[Guard("optimizer_momentum", 0.9)]
    )
    with_momenta(recorder, clock, [0.95])
    assert len(sidecar.checked) == 1
    assert frames.column("optimizer_momentum") == [0.95]


def about_momentum(step, value, usual=0.9):
    """A decision about a step that was made with ``value``."""
    seen = {"optimizer_momentum": value}
    finding = Finding("a_rule", Action.OPTIMIZER, Severity.HIGH, "", seen)
    return replace(decided(step, momentum_scale=usual / value), findings=[finding])


@pytest.mark.parametrize("guards", [None, []])
def test_a_momentum_seen_after_its_step_is_taken_back_from_the_next_update_on(clock, guards):
    """As where ranks agree, which do not check."""
    recorder, frames, sidecar = guarded(clock, guards=guards or [])
    if guards is None:
        sidecar.guards = None
    sidecar.decisions[2] = about_momentum(2, 0.999)
    sidecar.decisions[3] = about_momentum(3, 0.999)  # it was under way meanwhile
    with_momenta(recorder, clock, [0.9, 0.999, 0.999, 0.999, 0.96, 0.94, 0.96])
    used = frames.column("optimizer_momentum")
    assert used[:2] == [0.9, 0.999]
    assert used[-4:] == pytest.approx([0.9, 0.9 / 0.999 * 0.96, 0.94, 0.96])


def test_in_advise_a_momentum_is_left_alone(clock):
    recorder, frames, sidecar = guarded(clock, enforce=False)
    sidecar.decision = about_momentum(1, 0.999)
    with_momenta(recorder, clock, [0.999] * 4)
    assert frames.column("optimizer_momentum") == [0.999] * 4


def test_what_is_held_is_forgotten_when_nobody_has_answered_for_long(clock):
    recorder, _, sidecar = guarded(clock, nobody, guards=HELD)
    sidecar.decision = unanswered("r", 0, TIMEOUT)
    seen = [norm for _, norm in train(recorder, clock, [INSIDE] * 30, norm=200.0)]
    clipped = [norm < 5.0 for norm in seen]
    assert clipped == sorted(clipped, reverse=True)
    assert HELD_STEPS <= sum(clipped) <= HELD_STEPS + 2


def test_a_pause_may_leave_an_update_out_too(clock):
    recorder, _, _ = guarded(clock, decided(1, Action.PAUSE, skip_step=1.0))
    paused = []
    recorder._responses.on_pause(paused.append)
    assert train(recorder, clock, [OUTSIDE]) == [(0.1, None)]
    assert paused == [], "it is about the update, and pauses nothing"


def test_an_answer_about_an_update_is_no_clean_step_and_no_cut(clock):
    recorder, _, sidecar = guarded(
        clock, lambda step, _: decided(step, lr_scale=0.5), release_steps=3
    )
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    seen = train(recorder, clock, [INSIDE, *[OUTSIDE] * 3])
    assert [rate for rate, _ in seen] == pytest.approx([0.1, 0.025, 0.025, 0.025])
    assert recorder._responses.lr_scale == 0.5


def skips(clock, losses, update=None, **options):
    recorder, frames, _ = guarded(clock, update or decided(1, skip_step=1.0))
    train(recorder, clock, losses, **options)
    return [bool(skipped) for skipped in frames.column("update_skipped")]


def test_what_stays_outside_for_long_is_the_new_ordinary_state(clock):
    """Until it has been inside again."""
    made = skips(clock, [OUTSIDE] * (2 * MOST_SKIPS + 3) + [INSIDE, OUTSIDE])
    assert made == [True] * MOST_SKIPS + [False] * (MOST_SKIPS + 3) + [False, True]


def test_what_is_not_finite_is_always_skipped(clock):
    assert all(skips(clock, [INSIDE] * (3 * MOST_SKIPS), norm=math.nan))
    assert all(skips(clock, [math.nan] * (3 * MOST_SKIPS), norm=math.inf))


def test_a_loss_that_is_never_a_number_does_not_stop_a_run_whose_gradients_are(clock):
    assert skips(clock, [math.nan] * (MOST_SKIPS + 3))[-3:] == [False] * 3


@pytest.mark.parametrize("between", ["inside", "made all the same"])
def test_only_skips_in_a_row_count(clock, between):
    """An update that was made ends the row, whether it was asked about or not."""

    def update(step, values):
        return None if values["loss"] == 2 * OUTSIDE else decided(step, skip_step=1.0)

    made = INSIDE if between == "inside" else 2 * OUTSIDE
    losses = [*[OUTSIDE] * (MOST_SKIPS - 1), made, *[OUTSIDE] * MOST_SKIPS]
    assert skips(clock, losses, update) == [loss == OUTSIDE for loss in losses]


def test_a_factor_whose_first_update_is_skipped_is_applied_with_the_next(clock):
    recorder, frames, sidecar = guarded(clock, decided(2, skip_step=1.0), span_every=1)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    seen = train(recorder, clock, [INSIDE, OUTSIDE, INSIDE, INSIDE])
    recorder.flush()
    assert [rate for rate, _ in seen][2:] == [0.05, 0.05]
    assert [each.step for each in frames.timelines if each.applied] == [1]


def test_an_attempt_that_overflowed_leaves_nothing_for_the_next(clock):
    """As a fused optimizer does that a GradScaler has told so: its step is not counted."""
    recorder, frames, _ = guarded(clock, decided(1, lr_scale=0.5), span_every=1)
    optimizer = recorder.optimizer
    recorder.backward_begins()
    recorder.backward_ends(OUTSIDE)
    recorder.optimizer_begins(clock(), math.inf, optimizer)
    recorder.optimizer_ends(optimizer)
    recorder.skipped()
    one_step(recorder, clock, loss=INSIDE)
    one_step(recorder, clock, loss=INSIDE)
    assert frames.column("lr_scale") == [1.0, 1.0]
    assert [each.update for each in frames.timelines] == [None]


# --- optimizers with odd groups


ODD = {
    "betas is None": ({"lr": 0.1, "betas": None}, {"optimizer_lr": 0.1}),
    "betas is empty": ({"lr": 0.1, "betas": ()}, {"optimizer_lr": 0.1}),
    "betas holds none": ({"lr": 0.1, "betas": (None, 0.9)}, {"optimizer_lr": 0.1}),
    "momentum is text": ({"lr": 0.1, "momentum": "fast"}, {"optimizer_lr": 0.1}),
    "lr is None": ({"lr": None, "momentum": 0.9}, {"optimizer_momentum": 0.9}),
    "lr is text": ({"lr": "fast", "momentum": 0.9}, {"optimizer_momentum": 0.9}),
    "no lr": ({"momentum": 0.9}, {"optimizer_momentum": 0.9}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("enforce", [True, False])
@pytest.mark.parametrize(("group", "told"), ODD.values(), ids=ODD)
def test_an_odd_group_loses_nothing_but_its_own_metric(clock, caplog, group, told, enforce):
    recorder, frames, sidecar = guarded(clock, decided(2, skip_step=1.0), enforce=enforce)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder.optimizer = Optimizer(group)
    for loss in (INSIDE, OUTSIDE, INSIDE):
        one_step(recorder, clock, loss=loss)
    assert not caplog.records
    assert len(sidecar.asked) == 3
    assert len(sidecar.checked) == enforce
    first, second, third = frames.rows
    for key in ("optimizer_lr", "optimizer_momentum"):
        assert first.get(key) == told.get(key)
    assert (first["loss"], second["loss"], third["loss"]) == (INSIDE, OUTSIDE, INSIDE)
    assert first["nonfinite"] == 0.0


@pytest.mark.torch
def test_a_vector_of_rates_loses_nothing_but_its_own_metric(clock, caplog):
    torch = pytest.importorskip("torch")
    recorder, frames, sidecar = guarded(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    rates = torch.tensor([0.1, 0.2])
    recorder.optimizer = Optimizer({"lr": rates, "momentum": 0.9})
    used = []
    for _ in range(3):
        recorder.backward_ends(INSIDE)
        recorder.optimizer_begins(clock(), 2.0, recorder.optimizer)
        used.append(recorder.optimizer.param_groups[0]["lr"].tolist())
        recorder.optimizer_ends(recorder.optimizer)
        recorder.end_step()
    assert not caplog.records
    assert used[0] == rates.tolist()
    assert used[1] == used[2] == (rates / 2).tolist(), "and it is scaled as any other"
    assert "optimizer_lr" not in frames.rows[0]
    assert frames.column("optimizer_momentum") == [0.9] * 3


# --- where nobody answers any more


def test_what_was_made_smaller_stays_so_while_nobody_answers_and_the_guard_is_crossed(clock):
    def answer(step, values):
        return decided(1, lr_scale=0.5, max_norm=0.5) if step == 1 else None

    recorder, _, sidecar = guarded(clock)
    sidecar.update = answer
    made = []
    for loss, answers in [(OUTSIDE, True), (OUTSIDE, False), (INSIDE, False), (OUTSIDE, False)]:
        if not answers:
            sidecar.update = lambda step, values: unanswered("r", step, "timeout")
        made += train(recorder, clock, [loss])
    smaller = pytest.approx((0.05, 0.5), rel=1e-5)
    assert made == [smaller, smaller, (0.1, 2.0), (0.1, 2.0)]


def test_nothing_is_left_out_because_the_update_before_was(clock):
    recorder, _, sidecar = guarded(clock, decided(1, skip_step=1.0))
    (first,) = train(recorder, clock, [OUTSIDE])
    sidecar.update = lambda step, values: unanswered("r", step, "timeout")
    (second,) = train(recorder, clock, [OUTSIDE])
    assert (first, second) == ((0.1, None), (0.1, 2.0))
