"""The factor on the rate: how it is bounded, given back, and used by updates alone."""

import itertools

import pytest
from tolaria.loops import make, one_step
from tolaria.sidecars import Sidecar, decided

from esper_otel.tolaria.responses import RateFactor


def rate(release_steps=10, minimum=0.01, maximum=1.0):
    return RateFactor(minimum=minimum, maximum=maximum, release_steps=release_steps)


def test_factors_multiply():
    subject = rate()
    assert subject.scale_by(0.5)
    assert subject.scale_by(0.5)
    assert subject.value == 0.25


@pytest.mark.parametrize(
    ("factor", "minimum", "maximum", "bound"), [(0.1, 0.05, 1.0, 0.05), (3.0, 0.05, 2.0, 2.0)]
)
def test_the_product_of_all_factors_is_bounded(factor, minimum, maximum, bound):
    subject = rate(minimum=minimum, maximum=maximum)
    changed = [subject.scale_by(factor) for _ in range(5)]
    assert subject.value == bound
    assert not changed[-1], "at its bound a cut changes nothing"


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_is_no_positive_number_is_reported_once_and_not_applied(factor, caplog):
    subject = rate()
    assert not subject.scale_by(factor)
    assert not subject.scale_by(factor)
    assert subject.bounded(factor) == 1.0
    assert subject.value == 1.0
    (record,) = caplog.records
    assert "expected a positive number" in record.getMessage()


def test_after_enough_clean_steps_the_rate_is_given_back_to_the_last_bit():
    subject = rate(release_steps=10)
    subject.scale_by(0.125)
    seen = []
    for _ in range(20):
        subject.clean_step()
        seen.append(subject.value)
    assert seen[:10] == [0.125] * 10, "held while the trouble may come back"
    assert seen[10:] == sorted(seen[10:]), "then ever closer to the script's own"
    assert all(b / a < 1.3 for a, b in itertools.pairwise(seen[10:])), "gently"
    assert subject.value == 1.0
    assert not subject.held


def test_trouble_that_comes_back_is_waited_out_twice_as_long():
    subject = rate(release_steps=10)
    subject.scale_by(0.5)
    for _ in range(15):
        subject.clean_step()
    assert subject.value > 0.5, "on its way back"
    subject.scale_by(0.5)
    held = subject.value
    for _ in range(20):
        subject.clean_step()
        assert subject.value == held
    subject.clean_step()
    assert subject.value > held


def test_a_long_calm_forgets_the_doubled_wait():
    subject = rate(release_steps=5)
    subject.scale_by(0.5)
    for _ in range(7):
        subject.clean_step()
    subject.scale_by(0.5)  # back already: the wait is 10 now
    for _ in range(10 + 5 + 10 + 5):
        subject.clean_step()
    subject.scale_by(0.5)
    for _ in range(6):
        subject.clean_step()
    assert subject.value > 0.5, "given back from the sixth step on, as the first time"


def test_a_single_update_gets_no_more_than_the_bounds_leave_room_for():
    subject = rate(minimum=0.1)
    subject.scale_by(0.25)
    assert subject.bounded(0.5) == 0.5
    assert subject.value * subject.bounded(0.1) == pytest.approx(0.1)
    assert subject.bounded(100.0) == 4.0
    assert subject.value == 0.25, "the factor in force stays as it was"


def test_the_state_goes_on_where_it_was():
    subject, again = rate(), rate()
    subject.scale_by(0.25)
    for _ in range(13):
        subject.clean_step()
    again.load_state_dict(subject.state_dict())
    for _ in range(40):
        subject.clean_step()
        again.clean_step()
        assert again.value == subject.value
    assert again.state_dict() == subject.state_dict()


WRONG = {
    "nothing": {},
    "unknown field": {**rate().state_dict(), "more": 1},
    "text": {**rate().state_dict(), "factor": "x"},
    "zero": {**rate().state_dict(), "factor": 0.0},
    "not finite": {**rate().state_dict(), "return_factor": float("nan")},
}


@pytest.mark.parametrize("state", WRONG.values(), ids=WRONG)
def test_what_is_no_state_is_refused_and_changes_nothing(state):
    subject = rate()
    subject.scale_by(0.5)
    with pytest.raises(ValueError):  # noqa: PT011  (each kind says something else)
        subject.load_state_dict(state)
    assert subject.value == 0.5


def test_an_enforced_decision_changes_the_next_update_and_not_the_optimizer(clock):
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, frames = make(enforce=True, client=sidecar)
    used = [one_step(recorder, clock) for _ in range(2)]
    assert used == [0.1, 0.05]
    assert recorder.optimizer.param_groups[0]["lr"] == 0.1
    assert frames.column("optimizer_lr") == used
    assert frames.column("lr_scale") == [1.0, 0.5]
    (timeline,) = frames.timelines
    assert timeline.decision is sidecar.decisions[1] is recorder.decision
    assert (timeline.step, timeline.applied) == (1, True)


def test_a_step_without_an_update_has_no_scaled_rate(clock):
    """A loop that only calls ``run.step()``: nobody makes its updates smaller."""
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, frames = make(enforce=True, client=sidecar)
    recorder.optimizer = None
    for _ in range(3):
        clock.pass_ms(5.0)
        recorder.end_step()
    recorder.flush()
    assert frames.column("lr_scale") == [1.0, 1.0, 1.0]
    assert not any(timeline.applied for timeline in frames.timelines)


def test_a_schedule_sees_nothing_of_the_factor(clock):
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, _ = make(enforce=True, client=sidecar)
    used = []
    for step in range(5):
        recorder.optimizer.param_groups[0]["lr"] = 0.1 / 2**step
        used.append(one_step(recorder, clock))
        assert recorder.optimizer.param_groups[0]["lr"] == 0.1 / 2**step
    assert used == [0.1, *(0.05 / 2**step for step in range(1, 5))]


def test_a_recorder_that_is_switched_off_touches_no_update(clock):
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, _ = make(enforce=True, client=sidecar)
    one_step(recorder, clock)
    recorder.switch_off()
    assert one_step(recorder, clock) == 0.1


def test_in_advise_the_factor_is_always_one(clock):
    """Also where the run goes on from one that enforced, and held something."""
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, frames = make(enforce=False, client=sidecar)
    held = {"factor": 0.25, "wait": 10, "clean_steps": 0, "return_factor": 1.0}
    recorder._responses.rate.load_state_dict(held)
    used = [one_step(recorder, clock) for _ in range(4)]
    assert used == frames.column("optimizer_lr") == [0.1] * 4
    assert frames.column("lr_scale") == [1.0] * 4
    recorder.flush()
    assert not any(timeline.applied for timeline in frames.timelines)
