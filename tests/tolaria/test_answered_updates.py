"""Answers to checks: each changes one update, which is skipped or made smaller."""

import math

import pytest
from tolaria.guarded import INSIDE, OUTSIDE, guarded, train
from tolaria.loops import one_step
from tolaria.sidecars import decided

from esper_otel.leyline.decisions import Action
from esper_otel.tolaria.update_control import MOST_SKIPS


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


def test_an_answer_counts_on_top_of_the_factor_in_force_and_within_its_bounds(clock):
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
