"""When a snapshot is good, and what becomes of a decision that asks to go back to it."""

import logging

import pytest
import torch
from tolaria.sidecars import decided
from torch import nn

from esper_otel.leyline.decisions import (
    BREAKER_OPEN,
    CONSERVATIVE_MODE,
    NOMINAL,
    NOT_ASKED,
    TIMEOUT,
    WARMING_UP,
    Action,
    unanswered,
)
from esper_otel.leyline.events import RESTORE_REFUSED, RESTORED
from esper_otel.tolaria.restoring import Restoring

EVERY = 5


class Loop:
    """One weight that is the number of the step, and its snapshots."""

    def __init__(self, **options):
        self.weight = nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)
        self.subject = Restoring(**{"every": EVERY, **options})
        self.step = 0

    def train(self, steps=1, decision=None, finite=True):
        """Steps whose answers say ``decision``: nominal, unless given."""
        for _ in range(steps):
            self.step += 1
            self.subject.update_begins(self.optimizer)
            ordered = self.subject.ordered
            if not ordered:
                self.weight.data.fill_(self.step)
            if ordered:
                self.subject.restore(self.step)
            self.subject.step_ended(self.step)
            about = decision or unanswered("r", self.step, NOMINAL)
            self.subject.judged(about_step(about, self.step), finite=finite)

    def asks(self, agreed=False):
        return self.subject.order(decided(self.step, restore=1.0), agreed=agreed)

    @property
    def at(self):
        return self.weight.item()


def about_step(decision, step):
    from msgspec.structs import replace

    return replace(decision, step=step)


def test_a_snapshot_is_good_once_as_many_steps_after_it_were():
    loop = Loop()
    loop.train(2)
    assert loop.subject.report.taken == 1, "at the end of the first step that was answered"
    loop.train(EVERY - 1)
    assert loop.subject.report.good_step is None
    loop.train()
    assert loop.subject.report.good_step == 2
    loop.train(EVERY)
    assert (loop.subject.report.taken, loop.subject.report.good_step) == (2, 2)
    loop.train()
    assert loop.subject.report.good_step == 8


def test_two_are_in_memory_at_most():
    loop = Loop()
    loop.train(100)
    assert loop.subject.report.taken > 10
    assert loop.subject.report.bytes == 2 * 4


@pytest.mark.parametrize(
    ("decision", "finite"),
    [
        (decided(0), True),
        (decided(0, Action.PAUSE), True),
        (unanswered("r", 0, TIMEOUT), True),
        (unanswered("r", 0, BREAKER_OPEN), True),
        (unanswered("r", 0, WARMING_UP), True),
        (unanswered("r", 0, NOMINAL), False),
    ],
)
def test_trouble_and_a_step_that_nobody_judged_drop_the_newer_one(decision, finite):
    loop = Loop()
    loop.train(7)
    assert loop.subject.report.good_step == 2
    loop.train(EVERY - 1)
    loop.train(decision=decision, finite=finite)
    loop.train(3)
    assert loop.subject.report.good_step == 2
    loop.train(3 * EVERY)
    assert loop.subject.report.good_step > 12, "but another is made when it is over"


def test_a_young_run_has_a_snapshot_before_the_rules_have_a_past():
    loop = Loop()
    loop.train(7, unanswered("r", 0, WARMING_UP))
    assert loop.subject.report.good_step == 2


@pytest.mark.parametrize("action", [Action.CONTINUE, Action.SEED])
def test_what_is_no_trouble_does_not(action):
    loop = Loop()
    loop.train(7, decided(0, action))
    assert loop.subject.report.good_step == 2
    held = decided(0, Action.PAUSE, CONSERVATIVE_MODE)
    loop.train(12, held)
    assert loop.subject.report.good_step > 2


def test_what_was_never_asked_counts_for_nothing():
    loop = Loop()
    loop.train(2)
    loop.train(20, unanswered("r", 0, NOT_ASKED))
    assert loop.subject.report.good_step is None
    loop.train(EVERY)
    assert loop.subject.report.good_step == 2


def test_nothing_is_made_while_there_is_trouble():
    loop = Loop()
    loop.train(30, decided(0))
    assert loop.subject.report.taken == 0


def test_going_back_puts_back_the_last_good_one_once():
    loop = Loop()
    loop.train(14)
    good = loop.subject.report.good_step
    assert loop.asks()
    assert loop.asks(), "asked again before it is done: it is done"
    loop.train()
    assert loop.at == good
    assert loop.subject.report.restored == [(good, 15)]
    assert not loop.asks(), "about a step before: it has been done"
    loop.train()
    assert loop.at == 16
    assert loop.subject.report.refused == {}


def test_never_twice_to_the_same_without_progress(caplog):
    loop = Loop(every=20)
    loop.train(23)
    assert loop.subject.report.good_step == 2
    assert loop.asks()
    loop.train()  # at step 24, by which 22 steps are lost
    loop.train(22)
    assert not loop.asks()
    assert not loop.asks()
    why = "the run has made no progress since it was done last"
    assert loop.subject.report.refused == {why: 2}
    assert len([r for r in caplog.records if why in r.getMessage()]) == 1
    loop.train(30, decided(0))
    assert not loop.asks(), "steps with trouble are no progress"
    loop.train()
    assert loop.asks()
    loop.train()
    assert loop.at == 2


def test_a_newer_one_that_is_good_is_progress():
    loop = Loop()
    loop.train(40)
    assert loop.asks()
    loop.train(2 * EVERY + 3)
    again = loop.subject.report.good_step
    assert again > 40
    assert loop.asks()
    loop.train()
    assert loop.at == again


def test_only_so_many_times():
    loop = Loop(most=2)
    for _ in range(2):
        loop.train(3 * EVERY)
        assert loop.asks()
        loop.train()
    loop.train(5 * EVERY)
    assert not loop.asks()
    assert list(loop.subject.report.refused) == [
        "it was done 2 times (ESPER_SNAPSHOT_RESTORES_MAX)"
    ]


def test_without_snapshots_there_is_nothing_to_go_back_to():
    off = Loop(every=0)
    off.train(20)
    assert off.subject.report is None
    assert not off.asks()
    assert off.subject.report.refused == {"no snapshots are kept (ESPER_SNAPSHOT_EVERY)": 1}
    young = Loop()
    young.train(3)
    assert not young.asks()
    assert young.subject.report.refused == {"no snapshot is good yet": 1}


@pytest.mark.parametrize(("agreed", "done"), [(True, True), (False, False)])
def test_of_several_ranks_none_goes_back_alone(agreed, done):
    loop = Loop(several_ranks=lambda: True)
    loop.train(10)
    assert loop.asks(agreed=agreed) is done


def test_what_happened_is_told_once_each():
    loop = Loop()
    loop.train(10)
    loop.asks()
    loop.train()
    loop.train(3)
    loop.asks()
    restored, refused = loop.subject.events
    assert (restored.name, refused.name) == (RESTORED, RESTORE_REFUSED)
    assert restored.attributes == {"esper.step": 11, "esper.snapshot.step": 2}
    assert "no progress" in refused.text


def test_a_new_optimizer_of_the_same_weights_drops_what_cannot_be_put_back_any_more():
    loop = Loop()
    loop.train(7)
    assert loop.subject.report.good_step == 2
    loop.optimizer = torch.optim.SGD([loop.weight], lr=0.01)
    warming = unanswered("r", 0, WARMING_UP)  # a phase begins with such an optimizer
    loop.train(decision=warming)
    assert loop.subject.report.good_step is None
    assert not loop.asks()
    loop.train(EVERY + 2, warming)
    good = loop.subject.report.good_step
    assert good == 9, "made at the next step whose answer asked for nothing"
    assert loop.asks()
    loop.train()
    assert loop.at == good


def test_what_was_ordered_before_a_new_optimizer_steps_is_refused():
    loop = Loop()
    loop.train(7)
    assert loop.asks()
    loop.optimizer = torch.optim.SGD([loop.weight], lr=0.01)
    loop.subject.update_begins(loop.optimizer)
    assert not loop.subject.restore(8)
    assert loop.subject.report.refused == {"it could not be restored": 1}


def test_parameters_that_were_replaced_drop_the_good_one_when_another_is_made():
    loop = Loop()
    loop.train(8)
    assert (loop.subject.report.taken, loop.subject.report.good_step) == (2, 2)
    loop.weight = loop.optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(1))
    loop.train(EVERY + 1)
    assert loop.subject.report.good_step is None
    loop.train(EVERY)
    assert loop.subject.report.good_step == 14


def test_a_copy_that_fails_is_reported_once_and_made_when_it_can_be(monkeypatch, caplog):
    loop = Loop()
    loop.train(10)
    good = loop.subject.report.good_step

    def no_memory(*_args, **_options):
        raise torch.OutOfMemoryError("of the host")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", no_memory)
        loop.train(4 * EVERY)
    assert loop.subject.failed
    assert loop.subject.report.good_step >= good
    told = [r for r in caplog.records if "could not be taken" in r.getMessage()]
    assert len(told) == 1
    before = loop.subject.report.taken
    loop.train(3 * EVERY)
    assert loop.subject.report.taken > before


def test_one_that_does_not_fit_any_more_is_dropped_and_the_run_goes_on(caplog):
    caplog.set_level(logging.WARNING)
    loop = Loop()
    loop.train(10)
    assert loop.asks()
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    loop.train()
    assert loop.at == 10, "nothing was put back"
    assert loop.subject.report.refused == {"it could not be restored": 1}
    assert any("not those of the snapshot" in r.getMessage() for r in caplog.records)
    loop.train(3 * EVERY)
    assert loop.subject.report.good_step > 10
