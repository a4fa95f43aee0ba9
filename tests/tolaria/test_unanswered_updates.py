"""Updates about which nobody answers: what the guards themselves say is done to them."""

import math

import pytest
from tolaria.guarded import HELD, INSIDE, OUTSIDE, guarded, nobody, train
from tolaria.loops import Optimizer, one_step
from tolaria.sidecars import decided

from esper_otel.leyline.decisions import FAILED_OPEN, TIMEOUT, unanswered
from esper_otel.leyline.wire import Guard
from esper_otel.tolaria.update_control import HELD_STEPS


@pytest.mark.parametrize("reason", sorted(FAILED_OPEN))
@pytest.mark.parametrize("loss", [OUTSIDE, math.nan])
def test_without_an_answer_nothing_is_skipped(clock, reason, loss):
    recorder, frames, sidecar = guarded(clock, lambda step, _: unanswered("r", step, reason))
    assert train(recorder, clock, [loss] * 3) == [(0.1, 2.0)] * 3
    assert len(sidecar.checked) == 3
    assert frames.column("update_skipped") == [0.0] * 3


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


def test_what_is_held_is_forgotten_when_nobody_has_answered_for_long(clock):
    recorder, _, sidecar = guarded(clock, nobody, guards=HELD)
    sidecar.decision = unanswered("r", 0, TIMEOUT)
    seen = [norm for _, norm in train(recorder, clock, [INSIDE] * 30, norm=200.0)]
    clipped = [norm < 5.0 for norm in seen]
    assert clipped == sorted(clipped, reverse=True)
    assert HELD_STEPS <= sum(clipped) <= HELD_STEPS + 2


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
