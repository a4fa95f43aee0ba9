"""Checks: which updates are asked about before they are made, and with which values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolaria.guarded import INSIDE, OUTSIDE, guarded, train
from tolaria.loops import Clock, Late, Optimizer, one_step
from tolaria.sidecars import decided

from esper_otel.leyline.decisions import unanswered
from esper_otel.leyline.wire import Guard

PREVIEWED = (
    "loss",
    "loss_delta",
    "loss_ewma",
    "loss_volatility",
    "gradient_norm",
    "grad_norm_ewma",
    "grad_var",
)


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
