"""Timelines: a step's spans wait for its decision, and for the update made with it."""

from typing import NamedTuple

import pytest
from tolaria.loops import MS, make, one_step
from tolaria.sidecars import Sidecar, decided

from esper_otel.leyline.decisions import NOT_ASKED, Action, unanswered
from esper_otel.tolaria.asking import Taken
from esper_otel.tolaria.timelines import MOST_OPEN, EndedStep, Timelines

OFFSET = 1000


class Told(list):
    """What became spans."""

    @property
    def steps(self):
        return [timeline.step for timeline in self]


class Outcome(NamedTuple):
    """What became of a step's updates."""

    made: bool
    skipped: bool = False


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def timelines(told):
    return Timelines(told.append, OFFSET)


def opened(timelines, step, *, waits=True, wanted=True, update=None, asked=None):
    phases = [("train.forward", 10 * step, 10 * step + 4)]
    last_end = 10 * step - 1
    ended = EndedStep(step, 10 * step + 9, last_end, 10 * step, phases)
    ended.row = [float(step)]
    ended.wanted, ended.waits, ended.update = wanted, waits, update
    ended.asked = step if asked is None else asked
    timelines.open(ended)
    return ended


def nominal(step):
    return Taken(unanswered("r", step, "nominal"), 10 * step + 9, 10 * step + 15)


def test_marks_become_unix_times_and_the_decision_a_phase(timelines, told):
    opened(timelines, 1)
    timelines.on_decision(nominal(1), 2)
    timelines.on_update(2, Outcome(False))
    (timeline,) = told
    assert (timeline.step, timeline.row) == (1, [1.0])
    assert (timeline.start_unix_nano, timeline.end_unix_nano) == (1010, 1019)
    assert timeline.phases == [("train.forward", 1010, 1014), ("tamiyo.decide", 1019, 1025)]
    assert timeline.decision.step == 1


def test_a_step_whose_beginning_nobody_saw_begins_where_the_one_before_ended(timelines, told):
    opened(timelines, 2, waits=False).start = 0
    timelines.on_update(2, Outcome(False))
    assert told[0].start_unix_nano == 1019


def test_a_step_that_waits_for_no_decision_is_told_at_its_own_end(timelines, told):
    opened(timelines, 1, waits=False)
    timelines.on_update(1, Outcome(False))
    assert told.steps == [1]
    assert told[0].decision is None


def test_a_step_that_waits_for_its_decision_is_told_when_the_next_update_has_been_made(
    timelines, told
):
    opened(timelines, 1)
    timelines.on_update(1, Outcome(False))
    assert told.steps == []
    timelines.on_decision(nominal(1), 2)
    opened(timelines, 2)
    assert told.steps == []
    timelines.on_update(2, Outcome(False))
    assert told.steps == [1]


def test_timelines_are_told_in_the_order_of_their_steps(timelines, told):
    opened(timelines, 1)
    opened(timelines, 2, waits=False)
    timelines.on_update(2, Outcome(False))
    assert told.steps == []
    timelines.on_decision(nominal(1), 2)
    timelines.on_update(2, Outcome(False))
    assert told.steps == [1, 2]


CUT = decided(1, lr_scale=0.5)


@pytest.mark.parametrize(
    ("scales", "acted", "made", "applied"),
    [
        (False, False, False, False),
        (True, False, True, True),
        (True, False, False, False),  # no optimizer has stepped with it
        (False, False, True, False),  # at its bound: an earlier decision's factor
        (False, True, False, True),  # a seed or a pause
    ],
)
def test_applied_is_what_changed_an_update_or_acted(
    timelines, told, scales, acted, made, applied
):
    opened(timelines, 1)
    timeline = timelines.on_decision(Taken(CUT, 0, 0), 2)
    timeline.scales, timeline.acted = scales, acted
    timelines.on_update(2, Outcome(made))
    assert [each.applied for each in told] == [applied]


def test_what_a_skipped_update_was_not_made_with_shows_in_the_next(timelines, told):
    opened(timelines, 1)
    timelines.on_decision(Taken(CUT, 0, 0), 2).scales = True
    timelines.on_update(2, Outcome(False, skipped=True))
    assert told == []
    timelines.on_update(3, Outcome(True))
    assert [each.applied for each in told] == [True]


@pytest.mark.parametrize("answered", [True, False])
def test_a_decision_goes_to_the_step_it_is_about(timelines, told, answered):
    """Also where none came about the step before, or that was never asked about."""
    opened(timelines, 1)
    opened(timelines, 2)
    if not answered:
        assert timelines.on_decision(Taken(unanswered("r", 1, NOT_ASKED), 0, 0), 2) is None
    assert timelines.on_decision(nominal(2), 3).step == 2
    timelines.on_update(3, Outcome(False))
    assert [(each.step, each.decision and each.decision.step) for each in told] == [
        (1, None),
        (2, 2),
    ]


def test_where_values_come_late_a_step_asks_about_one_before_it(timelines, told):
    opened(timelines, 3, asked=1)
    assert timelines.on_decision(nominal(1), 4).step == 3
    timelines.on_update(4, Outcome(False))
    assert [(each.step, each.decision.step) for each in told] == [(3, 1)]


@pytest.mark.parametrize(
    ("wanted", "update", "decision", "expected"),
    [
        (False, None, nominal(1).decision, []),
        (True, None, nominal(1).decision, [1]),
        (False, CUT, nominal(1).decision, [1]),
        (False, None, CUT, [1]),
        (False, None, decided(1, Action.PAUSE), [1]),
        (False, None, unanswered("r", 1, "timeout"), []),
    ],
)
def test_a_step_becomes_spans_where_it_is_wanted_or_something_was_done(
    timelines, told, wanted, update, decision, expected
):
    opened(timelines, 1, wanted=wanted, update=update)
    timelines.on_decision(Taken(decision, 0, 0), 2)
    timelines.on_update(2, Outcome(False))
    assert told.steps == expected
    assert all(each.update is update for each in told)


def test_what_no_decision_comes_for_is_told_without_and_takes_no_memory(timelines, told):
    for step in range(1, MOST_OPEN + 11):
        opened(timelines, step)
    assert told.steps == list(range(1, 11))
    assert {each.decision for each in told} == {None}
    timelines.flush()
    timelines.flush()
    assert told.steps == list(range(1, MOST_OPEN + 11))


def test_a_decision_that_no_step_waits_for_is_left(timelines, told):
    assert timelines.on_decision(nominal(1), 2) is None
    opened(timelines, 1, waits=False)
    assert timelines.on_decision(nominal(1), 2) is None


def test_spans_go_to_every_nth_step_to_slow_ones_and_to_findings(clock):
    sidecar = Sidecar(clock)
    sidecar.decisions[17] = decided(17, Action.PAUSE)
    recorder, frames = make(span_every=10, client=sidecar)
    for step in range(1, 31):
        one_step(recorder, clock, forward=40.0 if step == 24 else 4.0)
    assert [timeline.step for timeline in frames.timelines] == [10, 17, 20, 24]
    recorder.flush()
    assert [timeline.step for timeline in frames.timelines] == [10, 17, 20, 24, 30]
    for timeline in frames.timelines:
        assert timeline.decision.step == timeline.step


def test_the_spans_of_a_step_tile_it_and_its_decision_follows(clock):
    recorder, frames = make(span_every=2, client=Sidecar(clock, takes_ms=0.7, sends_ms=0.2))
    for _ in range(3):
        one_step(recorder, clock, norm_ms=0.5)
    (timeline,) = frames.timelines
    *within, (decide, sent, taken), (apply, applied, done) = timeline.phases
    assert [name for name, _, _ in within] == [
        "train.input_wait",
        "train.forward",
        "train.backward",
        "tolaria.gradient_norm",
        "train.optimizer",
    ]
    ends = [timeline.start_unix_nano]
    for name, began, ended in within:
        # The decision about the step before is taken in between: a span of its own.
        collected = 0.7 if name == "train.optimizer" else 0.0
        assert began == ends[-1] + int(collected * MS)
        ends.append(ended)
    assert ends[-1] == timeline.end_unix_nano
    assert (decide, apply) == ("tamiyo.decide", "kasmina.apply")
    # Sent when the step had ended, taken when the next update was about to be made.
    assert sent == timeline.end_unix_nano
    assert taken == sent + round((0.2 + 1 + 4 + 6 + 0.5 + 0.7) * MS)
    # The update is made, and what becomes of seeds follows at the end of that step.
    assert applied == done == taken + 2 * MS


def test_the_first_step_of_an_explicit_loop_begins_with_its_first_phase(clock):
    recorder, frames = make(span_every=1)
    clock.pass_ms(500.0)
    began = clock.now
    for name in ("forward", "backward", "optimizer"):
        since = clock.now
        clock.pass_ms(2.0)
        recorder.phase(name, since, clock.now)
    recorder.end_step()
    (timeline,) = frames.timelines
    assert timeline.start_unix_nano == timeline.phases[0][1] == began + recorder.clock.offset
    assert timeline.end_unix_nano - timeline.start_unix_nano == 6 * MS
