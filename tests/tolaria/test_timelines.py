"""Timelines: a step's spans wait for its decision, and for the update made with it."""

from typing import NamedTuple

import pytest
from tolaria.sidecars import decided

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


def test_one_that_waits_for_no_decision_is_told_at_its_own_end(timelines, told):
    opened(timelines, 1, waits=False)
    timelines.on_update(1, Outcome(False))
    assert told.steps == [1]
    assert told[0].decision is None


def test_one_that_waits_is_told_when_the_next_update_has_been_made(timelines, told):
    opened(timelines, 1)
    timelines.on_update(1, Outcome(False))
    assert told.steps == []
    timelines.on_decision(nominal(1), 2)
    opened(timelines, 2)
    assert told.steps == []
    timelines.on_update(2, Outcome(False))
    assert told.steps == [1]


def test_they_are_told_in_the_order_of_their_steps(timelines, told):
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
def test_which_steps_become_spans(timelines, told, wanted, update, decision, expected):
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
