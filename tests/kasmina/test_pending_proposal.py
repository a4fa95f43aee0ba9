"""What the garden proposes is told when it changes, so that a recording can be replayed."""

import pytest
from kasmina.driven import MLP, AtOnce, Driven, about, agreed, idle

from esper_otel.kasmina.planning import PendingProposal, PlannedOperation
from esper_otel.leyline import events
from esper_otel.leyline.decisions import Proposal, SeedOperation


def told(driven):
    """(step, operation, seed) of every such event so far."""
    return [
        (
            event.attributes["esper.step"],
            event.attributes["esper.operation"],
            event.attributes.get("esper.seed.id", ""),
        )
        for event in driven.events
        if event.name == events.PROPOSED
    ]


def replayed(changes, step):
    """What a reader of the log records takes for the proposal of ``step``."""
    operation, seed_id = events.NO_OPERATION, ""
    for since, *what in changes:
        if since <= step:
            operation, seed_id = what
    return operation, seed_id


@pytest.mark.parametrize(
    "decide",
    [agreed, idle, lambda p: agreed(p) if p and "b" in p.operation.value else idle(p)],
    ids=["agreed", "idle", "sometimes"],
)
def test_the_proposal_of_every_step_can_be_told_from_the_events(decide):
    driven = Driven(settings={"patience_steps": 50})
    for _ in range(60):
        driven.step(decide)
    changes = told(driven)
    for step, proposal in enumerate(driven.proposals, 1):
        expected = (
            (events.NO_OPERATION, "")
            if proposal is None
            else (proposal.operation.value, proposal.seed_id)
        )
        assert replayed(changes, step) == expected


def test_a_proposal_that_stays_is_told_once_and_names_slot_and_blueprint():
    driven = Driven()
    for _ in range(20):
        driven.step(idle)
    (event,) = [event for event in driven.events if event.name == events.PROPOSED]
    assert event.attributes == {
        "esper.step": 4,
        "esper.operation": "germinate",
        "esper.seed.id": "1-1",
        "esper.slot": "1",
        "esper.blueprint": MLP,
    }
    assert event.text == "proposed: germinate 1-1"


def test_a_withdrawal_is_told_as_none():
    driven = Driven()
    driven.until(lambda: driven.proposals[-1:] != [None] and driven.steps > 0, idle)
    driven.seen_loss = 0.1  # it falls again: no plateau any more
    driven.step(idle)
    assert [operation for _, operation, _ in told(driven)] == ["germinate", "none"]
    assert driven.events[-1].text == "nothing is proposed any more: germinate of 1-1"


def test_what_a_finalize_that_failed_no_longer_proposes_is_told(monkeypatch):
    driven = Driven()
    driven.until(lambda: driven.steps == 6, idle)
    garden = driven.garden
    with monkeypatch.context() as patched:
        patched.setattr("esper_otel.kasmina.planning.choose", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            garden.finalize(7, [1.0] * 64)
    garden.proposal_sent(7)
    (event,) = garden.take_events()
    assert event.attributes == {"esper.step": 7, "esper.operation": "none"}


def test_a_frame_that_waits_for_a_device_is_told_with_its_own_step():
    driven = Driven()
    driven.until(lambda: driven.steps == 6, idle)
    driven.seen_loss = 0.1
    driven.train()
    driven.garden.finalize(7, [0.1] * 64)
    driven.garden.proposal_sent(5)  # that is the frame whose values have arrived by now
    (event,) = driven.garden.take_events()
    assert event.attributes["esper.step"] == 5


def test_it_costs_an_ask_nothing_while_nothing_changes(monkeypatch):
    driven = Driven()
    driven.until(lambda: driven.steps == 6, idle)
    monkeypatch.setattr(driven.garden._context, "add_event", None)
    for _ in range(5):
        driven.step(idle)


def test_a_failed_kernel_is_proposed_to_be_culled(monkeypatch):
    monkeypatch.setattr(AtOnce, "reason", "raised ValueError: no")
    driven = Driven()
    driven.step(idle)
    driven.garden.germinate("3", MLP, "s")
    driven.step(idle)
    assert told(driven)[-1][1:] == (SeedOperation.CULL.value, "s")


# --- a proposal is awaited from its request until its decision


class Context:
    """Keeps the events that are added."""

    def __init__(self):
        self.added = []

    def add_event(self, name, severity, text, **attributes):
        self.added.append((attributes["step"], text))


BLEND = PlannedOperation(Proposal("a", SeedOperation.BLEND), "1")
CULL = PlannedOperation(
    Proposal("b", SeedOperation.CULL), "3", reason="its gradients are not finite"
)


def sent(planned, step):
    """One that went out with the request about ``step``."""
    pending = PendingProposal(Context())
    pending.set(planned)
    pending.mark_sent(step)
    return pending


def test_what_went_out_is_under_way_until_its_decision_and_is_used_up_by_that():
    pending = sent(BLEND, 5)
    assert pending.is_awaited
    assert pending.pop(5) is BLEND
    assert not pending.is_awaited
    assert pending.pop(5) is None


def test_a_decision_about_a_step_before_says_nothing_of_it():
    pending = sent(BLEND, 5)
    assert pending.pop(4) is None
    assert pending.pop(5) is BLEND


def test_one_that_nobody_will_decide_about_any_more_is_dropped():
    """Its request was not sent, or lost: then the next decision is about a later step."""
    pending = sent(BLEND, 5)
    assert pending.pop(6) is None
    assert not pending.is_awaited
    assert pending.pop(5) is None


def test_where_nobody_is_asked_it_is_whichever_is_under_way():
    assert sent(BLEND, 5).pop(None) is BLEND
    assert sent(None, 5).pop(None) is None


def test_what_is_proposed_meanwhile_does_not_take_its_place():
    pending = sent(BLEND, 5)
    pending.set(CULL)
    pending.mark_sent(6)
    assert pending.pop(6) is None, "it was not proposed in step 6"
    pending = sent(BLEND, 5)
    pending.set(CULL)
    pending.mark_sent(6)
    assert pending.pop(5) is BLEND


def test_the_next_may_go_out_when_the_one_before_was_answered():
    pending = sent(BLEND, 5)
    pending.pop(5)
    pending.set(CULL)
    pending.mark_sent(6)
    assert pending.pop(6) is CULL
    assert [step for step, _ in pending._context.added] == [5, 6]


def test_what_is_withdrawn_did_not_go_out():
    pending = PendingProposal(Context())
    pending.set(BLEND)
    assert pending.withdraw() is BLEND
    pending.mark_sent(5)
    assert not pending.is_awaited
    assert pending._context.added == []


def test_nothing_is_left_when_it_is_cleared():
    pending = sent(BLEND, 5)
    pending.set(CULL)
    pending.clear()
    pending.mark_sent(6)
    assert (pending.is_awaited, pending.pop(None)) == (False, None)


def test_a_garden_proposes_nothing_while_a_decision_is_awaited():
    driven = Driven()
    garden = driven.garden
    driven.until(lambda: driven.proposals[-1:] != [None] and driven.steps > 0, idle)
    before = driven.steps
    driven.train()
    frame = garden.finalize(before + 1, [1.0] * 64)
    assert frame.proposal is not None
    garden.proposal_sent(before + 1)
    for step in range(before + 2, before + 5):  # the answer is late
        driven.train()
        assert garden.finalize(step, [1.0] * 64).proposal is None
        garden.proposal_sent(step)
    assert garden.apply(about(before + 1, agreed(frame.proposal)), enforced=True)
    assert not garden.apply(about(before + 1, agreed(frame.proposal)), enforced=True), "once"
