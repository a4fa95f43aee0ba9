"""No sequence of operations, pauses, faults and restarts reaches an illegal stage, or loses
or doubles an operation."""

from collections import Counter

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kasmina.driven import AtOnce, Driven, said

from esper_otel.kasmina import isolation
from esper_otel.kasmina.garden import GardenError
from esper_otel.kasmina.lifecycle import TARGET
from esper_otel.kasmina.slot import IN_A_ROW
from esper_otel.leyline import events
from esper_otel.leyline.decisions import FAILED_OPEN, NOT_ASKED, Action, SeedOperation
from esper_otel.leyline.stages import TRANSITIONS, IllegalTransitionError, Stage

SLOTS = ("1", "3")
UNANSWERED = st.sampled_from([*sorted(FAILED_OPEN), NOT_ASKED])
EMPTY = (Stage.DORMANT, Stage.EMBARGOED, Stage.RESETTING)


class GardenMachine(RuleBasedStateMachine):
    """Drives a garden as a trainer and a sidecar in any mood would."""

    @initialize(
        growth=st.sampled_from(["asked", "autonomous"]),
        at_once=st.integers(0, 2),
        sown=st.lists(st.sampled_from(SLOTS), unique=True),
        lived=st.integers(0, 20),
    )
    def plant(self, growth, at_once, sown, lived):
        self.options = {
            "growth": growth,
            "seeds_at_once": at_once,
            "plateau_steps": 1,
            "blending_steps": 3,
            "training_steps": 1,
            "shadowing_steps": 1,
            "probation_steps": 1,
            "embargo_steps": 1,
            "isolation_every": 2,
        }
        self.driven = Driven(SLOTS, settings=self.options)
        self.begin()
        # Or hardly any example would come as far as blending.
        for slot in sown:
            self.user_germinates(slot)
        self.sidecar_agrees(lived)

    def begin(self):
        self.stages = dict.fromkeys(SLOTS, Stage.DORMANT)
        self.wanted = {}
        self.frozen = False
        self.replayed = None
        self.driven.step(lambda proposal: said(Action.CONTINUE))
        self.follow(None, None)

    def slots(self):
        """Each slot, with its path."""
        garden = self.driven.garden
        return [(path, garden.slot(path)) for path in garden.slots]

    def end_step(self, decide):
        """One step, and all of its events held against the rules of a life."""
        offered = []

        def answer(proposal):
            offered.append(proposal)
            return decide(proposal)

        was_frozen = self.frozen
        alphas = {path: slot.hook.alpha for path, slot in self.slots()}
        stages = self.driven.garden.slots
        self.driven.step(answer)
        self.follow(offered[0], decide(offered[0]))
        if was_frozen:
            for path, slot in self.slots():
                if stages[path] is Stage.BLENDING and slot.stage is Stage.BLENDING:
                    assert slot.hook.alpha == alphas[path]

    def follow(self, proposal, decision):
        moves = Counter()
        for event in self.driven.garden.take_events() + self.driven.events:
            assert event.name != events.FAULT, event.text
            if event.name == events.PROPOSED:
                self.replay(event)
            if event.name != events.STAGE_CHANGED:
                continue
            slot = event.attributes["esper.slot"]
            before, after = (
                Stage[event.attributes[key]] for key in ("esper.stage.before", "esper.stage")
            )
            assert self.stages[slot] is before
            assert after in TRANSITIONS[before]
            self.stages[slot] = after
            moves[event.attributes.get("esper.seed.id"), after] += 1
        self.driven.events.clear()
        assert self.stages == self.driven.garden.slots
        if decision is None:
            return
        assert self.replayed == (proposal and (proposal.operation.value, proposal.seed_id))
        judged = decision.reason not in FAILED_OPEN and decision.reason != NOT_ASKED
        self.check_granted(proposal, decision, moves, paused=self.frozen and not judged)
        if judged:
            self.frozen = decision.action is Action.PAUSE

    def replay(self, event):
        """What a recording's reader takes for the proposal, from this step on."""
        told = event.attributes
        assert told["esper.step"] == self.driven.steps
        before, self.replayed = self.replayed, None
        if told["esper.operation"] != events.NO_OPERATION:
            self.replayed = told["esper.operation"], told["esper.seed.id"]
            assert told["esper.slot"] in SLOTS
        assert self.replayed != before

    def check_granted(self, proposal, decision, moves, paused):
        """What was granted was done, once; nothing else was."""
        granted = (
            proposal is not None
            and decision.action is Action.SEED
            and (decision.target_seed, decision.seed_operation)
            == (proposal.seed_id, proposal.operation)
        )
        if granted:
            assert moves[proposal.seed_id, TARGET[proposal.operation]] == 1
        onward = Counter({move: n for move, n in moves.items() if move[1] in TARGET.values()})
        if granted:
            onward[proposal.seed_id, TARGET[proposal.operation]] -= 1
        for (seed_id, stage), count in onward.items():
            if not count:
                continue
            assert count == 1
            asked_for = self.wanted.pop((seed_id, stage), None) is not None
            faulty = stage is Stage.CULLED
            alone = self.options["growth"] == "autonomous" and (
                decision.action is Action.CONTINUE
                and not paused
                and (seed_id, stage)
                == (proposal and proposal.seed_id, proposal and TARGET[proposal.operation])
            )
            assert asked_for or faulty or alone

    # A step with every kind of answer.

    @rule(times=st.integers(1, 8))
    def sidecar_agrees(self, times):
        for _ in range(times):
            self.end_step(
                lambda p: (
                    said(Action.SEED, p.seed_id, p.operation) if p else said(Action.CONTINUE)
                )
            )

    @rule()
    def sidecar_says_continue(self):
        self.end_step(lambda p: said(Action.CONTINUE))

    @rule()
    def sidecar_downgrades(self):
        self.end_step(lambda p: said(Action.OPTIMIZER, reason="a_rule"))

    @rule(times=st.integers(1, 4))
    def sidecar_pauses(self, times):
        for _ in range(times):
            self.end_step(lambda p: said(Action.PAUSE, reason="a_rule"))

    @rule(reason=UNANSWERED, times=st.integers(1, 4))
    def nobody_answers(self, reason, times):
        for _ in range(times):
            self.end_step(lambda p: said(Action.CONTINUE, reason=reason))

    @rule(seed_id=st.text(max_size=3), operation=st.sampled_from(SeedOperation))
    def sidecar_is_confused(self, seed_id, operation):
        self.end_step(
            lambda p: said(
                Action.SEED,
                p.seed_id if p and len(seed_id) % 2 else seed_id,
                operation,
            )
        )

    # What else may happen.

    @rule(slot=st.sampled_from(SLOTS))
    def user_germinates(self, slot):
        try:
            seed_id = self.driven.garden.germinate(slot, "residual_mlp")
        except (GardenError, IllegalTransitionError):
            return
        self.wanted[seed_id, Stage.GERMINATED] = True

    @rule(slot=st.sampled_from(SLOTS))
    def user_culls(self, slot):
        seed = self.driven.garden.slot(slot).seed
        if seed is None:
            return
        try:
            self.driven.garden.cull(seed.id)
        except IllegalTransitionError:
            return
        self.wanted[seed.id, Stage.CULLED] = True

    @rule(loss=st.sampled_from([0.5, 1.0, 50.0, float("nan"), float("inf")]))
    def loss_moves(self, loss):
        self.driven.seen_loss = loss

    @rule(reason=st.sampled_from(["", "took longer than 10 ms"]))
    def kernels_come_or_fail(self, reason):
        self.driven.garden._context.fetcher.reason = reason

    @rule(slot=st.sampled_from(SLOTS))
    def a_seed_breaks(self, slot):
        if self.stages[slot] is Stage.FOSSILIZED:  # a layer as any other by now
            return
        with torch.no_grad():
            for parameter in self.driven.garden.slot(slot).hook.parameters():
                parameter.fill_(float("nan"))

    @rule(times=st.integers(1, 3))
    def isolation_leaks(self, times):
        tight = isolation.cut
        isolation.cut = lambda activation: activation
        try:
            for _ in range(times):
                self.end_step(lambda p: said(Action.CONTINUE))
        finally:
            isolation.cut = tight

    @rule(
        in_a_pause=st.booleans(),
        sown=st.none() | st.sampled_from(SLOTS),
        culled=st.none() | st.sampled_from(SLOTS),
    )
    def the_process_is_another_one(self, in_a_pause, sown, culled):
        if in_a_pause:
            self.sidecar_pauses(1)
        if sown is not None:
            self.user_germinates(sown)
        if culled is not None:
            self.user_culls(culled)
        before = self.driven
        self.driven = Driven(SLOTS, settings=self.options).resume(before.saved())
        self.driven.seen_loss = before.seen_loss
        self.replayed = None
        assert repr(self.driven.garden.state_dict()) == repr(before.garden.state_dict())
        assert self.driven.garden.slots == self.stages
        groups = before.optimizer.param_groups, self.driven.optimizer.param_groups
        sizes = [[len(group["params"]) for group in each] for each in groups]
        assert sizes[0] == sizes[1]

    @rule()
    def the_garden_is_planted_anew(self):
        self.driven.garden.uproot()
        assert set(self.driven.garden.slots.values()) == {Stage.TERMINATED}
        assert len(self.driven.optimizer.param_groups) == 1
        host = self.driven.host
        self.driven = Driven(SLOTS, settings=self.options)
        assert not any(module._forward_hooks for module in host.modules())
        self.begin()

    @invariant()
    def stages_and_seeds_agree(self):
        for path, slot in self.slots():
            assert (slot.seed is None) == (slot.stage in EMPTY), path
            if slot.seed is not None:
                assert slot.seed.violations_in_a_row < IN_A_ROW
            else:
                assert not slot.hook.occupied
                assert slot.hook.alpha == 0.0
            if slot.stage in (Stage.GERMINATED, Stage.TRAINING):
                assert slot.hook.alpha == 0.0
            if slot.stage in (Stage.SHADOWING, Stage.PROBATIONARY, Stage.FOSSILIZED):
                assert slot.hook.alpha == 1.0

    @invariant()
    def host_stays_sound(self):
        assert all(torch.isfinite(p).all() for p in self.driven.host.parameters())
        known = [id(p) for g in self.driven.optimizer.param_groups for p in g["params"]]
        assert len(known) == len(set(known))


GardenMachine.TestCase.settings = settings(
    max_examples=20, stateful_step_count=30, deadline=None
)
TestGarden = GardenMachine.TestCase


def test_a_kernel_that_failed_in_one_run_fails_in_no_other():
    assert AtOnce.reason == ""
