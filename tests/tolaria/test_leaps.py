"""A rate or a momentum that leapt gets one factor until it is usual again."""

import math

import pytest
from msgspec.structs import replace
from tolaria.guarded import HELD, guarded, nobody
from tolaria.loops import one_step
from tolaria.sidecars import decided

from esper_otel.leyline.decisions import TIMEOUT, Action, Finding, Severity, unanswered
from esper_otel.leyline.guards import Guards
from esper_otel.leyline.wire import Guard


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


def about_momentum(step, value, usual=0.9):
    """A decision about a step that was made with ``value``."""
    seen = {"optimizer_momentum": value}
    finding = Finding("a_rule", Action.OPTIMIZER, Severity.HIGH, "", seen)
    return replace(decided(step, momentum_scale=usual / value), findings=[finding])


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


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("value", [0.91, 0.94])
def test_a_leap_of_one_step_does_not_take_back_what_is_no_leap(clock, value, answers):
    """Somewhat above what is usual, which the momentum may be."""

    def answer(step, values):
        return decided(step, momentum_scale=0.9 / values["optimizer_momentum"])

    recorder, frames, _ = guarded(clock, answer if answers else nobody, guards=MOMENTUM)
    with_momenta(recorder, clock, [0.9, 0.999, value, value])
    assert frames.column("optimizer_momentum") == pytest.approx([0.9, 0.9, value, value])


def test_a_leap_that_was_seen_after_its_step_does_not_take_back_what_is_no_leap(clock):
    recorder, frames, sidecar = guarded(clock, guards=[])
    sidecar.decisions[2] = about_momentum(2, 0.999)
    with_momenta(recorder, clock, [0.9, 0.999, 0.94, 0.94])
    assert frames.column("optimizer_momentum") == [0.9, 0.999, 0.94, 0.94]


def key_of(loop):
    return "optimizer_lr" if loop is scheduled else "optimizer_momentum"


@pytest.mark.parametrize(
    ("loop", "leapt", "held", "next_phase"),
    [
        (scheduled, LEAP[:3], [0.1, 0.1, 0.08], [0.6, 0.6]),
        (with_momenta, [0.9, 0.999], [0.9, 0.9], [0.98]),
    ],
    ids=["rate", "momentum"],
)
def test_another_phase_ends_the_hold(clock, loop, leapt, held, next_phase):
    recorder, frames, _ = guarded(clock, nobody, guards=[*HELD, *MOMENTUM])
    loop(recorder, clock, leapt)
    recorder.phase_begins("two")
    loop(recorder, clock, next_phase)
    used = frames.column(key_of(loop))
    assert used[: len(held)] == pytest.approx(held)
    assert used[len(held) :] == next_phase


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
    key = key_of(loop)
    assert frames.column(key)[-2:] == [5.0, 5.0]
    loop(recorder, clock, [5.0])
    assert frames.column(key)[-1] < 1.0, "these guards are of the new one"


@pytest.mark.parametrize("loop", [scheduled, with_momenta])
def test_a_hold_outlasts_guards_that_a_new_sidecar_does_not_have_yet(clock, loop):
    recorder, frames, sidecar = guarded(clock, nobody, guards=[*HELD, *MOMENTUM])
    loop(recorder, clock, [0.1, 5.0])
    sidecar.guards = Guards([])
    loop(recorder, clock, [5.0])
    key = key_of(loop)
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
