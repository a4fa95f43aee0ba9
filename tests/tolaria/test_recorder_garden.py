"""A recorder with a garden; the garden itself is a fake with a clock."""

import logging

import pytest
from tolaria import loops
from tolaria.loops import Late
from tolaria.sidecars import Sidecar

from esper_otel.leyline.decisions import (
    NOT_ASKED,
    Action,
    Decision,
    Proposal,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import GardenFrame, present, seed_row
from esper_otel.leyline.metrics import SEED_SLOT, STEP_KEYS, STEP_SLOT

PROPOSAL = Proposal("s", SeedOperation.BLEND)


class Garden:
    """Takes 3 ms to learn, 5 to finalize, 7 to apply; ``fails`` names what raises."""

    planted = True
    acts = True

    def __init__(self, clock, fails=()):
        self.clock, self.fails = clock, fails
        self.calls, self.waiting, self.latest = [], [], []
        self.asked_about, self.applied = [], []

    def note(self, name, milliseconds):
        self.calls.append(name)
        self.clock.pass_ms(milliseconds)
        if name in self.fails:
            raise RuntimeError(f"{name} failed")

    def learn(self, optimizer):
        self.note("learn", 3)
        self.optimizer = optimizer

    def finalize(self, step, latest):
        self.note("finalize", 5)
        self.latest.append(present(STEP_KEYS, latest))
        row = seed_row()
        row[SEED_SLOT["kasmina.seed.alpha"]] = step / 10
        return GardenFrame([("s", row)], 2.0, 0.5, 1, PROPOSAL)

    def proposal_sent(self, step):
        self.asked_about.append(step)

    def apply(self, decision, *, enforced):
        self.note("apply", 7)
        self.decision = (decision.action, decision.reason, enforced)
        self.applied.append(decision.step)
        self.waiting.append(Event("e", self.clock(), Severity.NORMAL, "t", {"a": 1}))
        return self.acts and decision.action is Action.SEED

    def take_events(self):
        if "take_events" in self.fails:
            raise RuntimeError("events failed")
        waiting, self.waiting = self.waiting, []
        return waiting


def make(clock, *, garden=True, enforce=True, fails=(), decision=None, client=True, **options):
    sidecar = Sidecar(clock, takes_ms=1, decision=decision)
    recorder, frames = loops.make(enforce, client=sidecar if client else None, **options)
    planted = Garden(clock, fails)
    if garden:
        recorder.attach_garden(planted)
    return recorder, frames, sidecar, planted


def one_step(recorder, clock, loss=1.0):
    clock.pass_ms(10)
    recorder.backward_begins()
    recorder.backward_ends(loss)
    recorder.optimizer_begins(clock(), 1.0, recorder.optimizer)
    clock.pass_ms(2)
    recorder.optimizer_ends(recorder.optimizer)
    recorder.end_step()


def test_the_garden_is_called_in_its_order_and_its_frame_goes_everywhere(clock):
    recorder, frames, sidecar, garden = make(clock)
    one_step(recorder, clock)
    assert garden.calls == ["learn", "finalize"]
    assert frames.seeds == [{"s": {"kasmina.seed.alpha": 0.1}}]
    (step,) = frames.rows
    assert step["kasmina.isolation.violations"] == 2.0
    assert step["kasmina.kernel_fetch_ms"] == 0.5
    assert step["kasmina.seeds_live"] == 1.0
    assert sidecar.proposed == [(1, ["s"], PROPOSAL)]
    one_step(recorder, clock)
    assert garden.calls[2:] == ["learn", "apply", "finalize"]
    assert garden.applied == [1]


def test_when_it_is_waited_for_the_decision_acts_in_its_own_step(clock):
    recorder, _, sidecar, garden = make(clock, waits=True)
    for step in range(1, 4):
        one_step(recorder, clock)
        assert garden.applied == garden.asked_about == list(range(1, step + 1))
    assert garden.calls == ["learn", "finalize", "apply"] * 3
    assert sidecar.lost == 0


def test_finalize_is_of_this_step_and_apply_of_the_end_before(clock):
    recorder, frames, _, _ = make(clock)
    for _ in range(3):
        one_step(recorder, clock)
    assert frames.column("kasmina.finalize_ms") == [5.0] * 3
    assert frames.column("kasmina.apply_ms") == [0.0, 0.0, 7.0]
    assert frames.column("tamiyo_latency_ms") == [0.0, 1.0, 1.0]
    # Learning is training: inside optimizer_ms, and outside of what this package cost.
    assert frames.column("optimizer_ms") == [2.0 + 3.0] * 3
    # The end of the step before, and taking its decision.
    assert frames.column("hook_latency_ms") == [0.0, 5.0 + 1.0, 7.0 + 5.0 + 1.0]
    for row in frames.rows[1:]:
        assert row["step_latency_ms"] == 10.0 + 2.0 + 3.0 + row["hook_latency_ms"]


def test_finalize_and_apply_are_spans_that_do_not_overlap(clock):
    recorder, frames, _, _ = make(clock, span_every=1)
    for _ in range(4):
        one_step(recorder, clock)
    phases = [phase for timeline in frames.timelines for phase in timeline.phases]
    took = {
        name: [(began, ended) for each, began, ended in phases if each == name]
        for name in ("kasmina.finalize", "kasmina.apply")
    }
    ended = 0
    for began, end in sorted(took["kasmina.finalize"] + took["kasmina.apply"]):
        assert ended <= began
        ended = end
    for name, milliseconds in (("kasmina.finalize", 5), ("kasmina.apply", 7)):
        assert {end - began for began, end in took[name]} == {milliseconds * loops.MS}


def test_a_garden_sees_the_newest_row_that_is_whole(clock):
    recorder, _, _, garden = make(clock)
    one_step(recorder, clock, loss=4.0)
    one_step(recorder, clock, loss=2.0)
    one_step(recorder, clock, loss=1.0)
    assert garden.latest[0] == {}
    assert [row["loss"] for row in garden.latest[1:]] == [4.0, 2.0]
    assert "loss_ewma" in garden.latest[2]


def test_seeds_wait_with_the_frame_whose_loss_is_still_on_a_device(clock):
    recorder, frames, sidecar, garden = make(clock)
    late = Late()
    one_step(recorder, clock, loss=late)
    assert (frames.taken, sidecar.asked) == ([], [])
    late.number = 1.0
    one_step(recorder, clock)
    assert garden.applied == [], "nothing has been decided yet"
    assert [seeds["s"]["kasmina.seed.alpha"] for seeds in frames.seeds] == [0.1, 0.2]
    assert sidecar.proposed == [(2, ["s"], PROPOSAL)]


def test_the_garden_hears_about_which_frame_it_was_asked(clock):
    recorder, _, sidecar, garden = make(clock)
    late = [Late() for _ in range(4)]
    for number, loss in enumerate(late):
        if number:
            late[number - 1].number = 1.0
        one_step(recorder, clock, loss=loss)
    assert garden.asked_about == [1, 2, 3] == [step for step, *_ in sidecar.asked]
    assert garden.applied == [1, 2]


def test_where_nobody_is_asked_the_garden_hears_of_the_step_itself(clock):
    recorder, _, _, garden = make(clock, client=False)
    for _ in range(2):
        one_step(recorder, clock, loss=Late())
    assert garden.asked_about == [1, 2]
    assert garden.calls == ["learn", "finalize", "apply"] * 2


def test_the_garden_of_a_loop_whose_optimizers_nobody_watches_hears_every_decision(clock):
    recorder, _, sidecar, garden = make(clock)
    for _ in range(4):
        clock.pass_ms(10)
        recorder.end_step()
    assert garden.asked_about == [1, 2, 3, 4]
    assert garden.applied == [1, 2, 3]
    assert sidecar.lost == 0


def test_an_event_that_knows_its_step_keeps_it(clock):
    recorder, frames, _, garden = make(clock)
    garden.waiting.append(Event("p", clock(), Severity.NORMAL, "t", {"esper.step": 7}))
    one_step(recorder, clock)
    one_step(recorder, clock)
    assert [event.attributes["esper.step"] for event in frames.events] == [7, 2]


def test_a_recorder_goes_on_from_a_state_and_refuses_what_is_none(clock):
    recorder, frames, _, _ = make(clock, garden=False)
    for loss in (4.0, 2.0, 3.0):
        one_step(recorder, clock, loss=loss)
    state = recorder.state_dict()
    resumed, frames_after, _, garden = make(clock)
    before = resumed.state_dict()
    for wrong in ({}, {**state, "step": "x"}, {**state, "colour": 1}):
        with pytest.raises(ValueError, match=r"`step`|`int`|`colour`"):
            resumed.load_state_dict(wrong)
    assert repr(resumed.state_dict()) == repr(before)
    resumed.load_state_dict({**state, "latest": {**state["latest"], "of_another_version": 1.0}})
    for each in (recorder, resumed):
        one_step(each, clock, loss=5.0)
    assert garden.latest == [frames.rows[2]]
    after, uncut = frames_after.rows[-1], frames.rows[-1]
    for key in ("step", "loss_delta", "loss_ewma", "loss_volatility", "grad_var"):
        assert after[key] == uncut[key]


@pytest.mark.parametrize("enforce", [True, False])
def test_the_decision_reaches_the_garden_with_whether_it_is_enforced(clock, enforce):
    decision = Decision("i", "r", 1, 1, Action.SEED, Severity.NORMAL, "nominal")
    recorder, frames, _, garden = make(clock, enforce=enforce, decision=decision)
    for _ in range(2):
        one_step(recorder, clock)
    assert garden.decision == (Action.SEED, "nominal", enforce)
    assert (frames.timelines[0].step, frames.timelines[0].applied) == (1, True)


def test_what_the_garden_did_not_do_is_not_told_as_applied(clock):
    """As one that grows by itself in ``advise``: it acts, but not because of the decision."""
    decision = Decision("i", "r", 1, 1, Action.SEED, Severity.NORMAL, "nominal")
    recorder, frames, _, garden = make(clock, enforce=False, decision=decision)
    garden.acts = False
    for _ in range(3):
        one_step(recorder, clock)
    assert [timeline.applied for timeline in frames.timelines] == [False, False]


def test_a_garden_without_a_sidecar_is_told_that_nobody_was_asked(clock):
    recorder, frames, _, garden = make(clock, client=False)
    one_step(recorder, clock)
    assert garden.decision[:2] == (Action.CONTINUE, NOT_ASKED)
    assert {"kasmina.finalize", "kasmina.apply", "train.seeds"} <= {
        name for name, _, _ in frames.timelines[0].phases
    }


def test_events_become_log_records_and_part_of_the_step_s_spans(clock):
    recorder, frames, _, _ = make(clock, span_every=0)
    for _ in range(3):
        one_step(recorder, clock)
    # Told at once, and the spans of the step when its decision has acted.
    first, second = frames.events
    assert first.attributes == {"a": 1, "esper.step": 2}
    (timeline,) = frames.timelines
    assert (timeline.step, timeline.events) == (2, [first])
    assert second.attributes["esper.step"] == 3


@pytest.mark.parametrize("name", ["learn", "finalize", "apply", "take_events"])
def test_a_garden_that_raises_costs_no_frame(clock, caplog, name):
    caplog.set_level(logging.ERROR, "esper_otel")
    recorder, frames, _, _ = make(clock, fails=[name])
    for _ in range(3):
        one_step(recorder, clock)
    assert frames.column("step") == [1, 2, 3]
    assert len(caplog.records) == 1
    seeds = {seed_id for seeds in frames.seeds for seed_id in seeds}
    assert seeds == (set() if name == "finalize" else {"s"})
    assert ("kasmina.seeds_live" in frames.rows[0]) is (name != "finalize")


def test_an_uprooted_garden_says_its_last_words_and_is_forgotten(clock):
    recorder, frames, _, garden = make(clock)
    one_step(recorder, clock)
    garden.planted = False
    one_step(recorder, clock)
    calls = len(garden.calls)
    one_step(recorder, clock)
    assert len(garden.calls) == calls
    assert len(frames.events) == 1
    assert "kasmina.seeds_live" not in frames.rows[2]
    assert frames.rows[2]["kasmina.finalize_ms"] == 0.0


def test_without_a_garden_nothing_is_said_of_one(clock):
    recorder, frames, sidecar, _ = make(clock, garden=False)
    one_step(recorder, clock)
    (step,) = frames.rows
    assert frames.seeds == [{}]
    assert step["kasmina.finalize_ms"] == 0.0
    assert not {"kasmina.seeds_live", "kasmina.isolation.violations"} & set(step)
    assert sidecar.proposed == [(1, [], None)]


def test_gated_off_finalize_is_not_told_and_the_seeds_are(clock):
    recorder, frames, _, _ = make(clock, enriched=False)
    one_step(recorder, clock)
    (step,) = frames.rows
    assert "kasmina.finalize_ms" not in step
    assert step["kasmina.seeds_live"] == 1.0
    assert set(frames.seeds[0]) == {"s"}
    assert STEP_SLOT["kasmina.seeds_live"]
