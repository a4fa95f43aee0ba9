"""Asking: one request under way at most, and its answer taken by the update it can change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolaria.loops import MS, Clock, Late, make, one_step
from tolaria.sidecars import Sidecar, decided

from esper_otel.leyline.decisions import FAILED_OPEN, NOT_ASKED, Action, unanswered
from esper_otel.leyline.frames import GardenFrame
from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.tolaria.asking import Asking

ROW = [0.0] * len(STEP_KEYS)


def send(asking, step):
    asking.send(step, 1000 + step, ROW, (), None)


# --- one rank


def test_a_request_is_sent_without_waiting_and_its_answer_collected_once(clock):
    asking = Asking("r", Sidecar(clock, takes_ms=0.7, sends_ms=0.2))
    began = clock()
    send(asking, 1)
    assert clock() == began + 0.2 * MS
    clock.pass_ms(10)
    taken = asking.collect()
    assert (taken.decision.step, taken.sent, taken.taken) == (1, began, clock())
    assert asking.collect() is None
    assert asking.spent_ns == 0.9 * MS, "the time between is the loop's own"


def test_nobody_is_asked_where_there_is_no_client(clock):
    asking = Asking("r", None)
    send(asking, 1)
    assert asking.collect() is asking.collect_agreed(1) is None
    assert (asking.asks, asking.decides, asking.guards) == (False, False, None)
    assert asking.not_asked.reason == NOT_ASKED


def test_checking_is_time_spent_as_well(clock):
    asking = Asking("r", Sidecar(clock, checks_ms=0.4))
    assert asking.check_update(3, 1003, ROW).step == 3
    assert asking.spent_ns == 0.4 * MS


@pytest.mark.parametrize("reason", sorted(FAILED_OPEN))
def test_decisions_that_nobody_made_are_counted_while_they_follow_one_another(clock, reason):
    sidecar = Sidecar(clock)
    asking = Asking("r", sidecar)
    counts = []
    for step in range(1, 8):
        answered = step in (1, 5)
        sidecar.decisions[step] = unanswered("r", step, "nominal" if answered else reason)
        send(asking, step)
        asking.collect()
        counts.append(asking.unjudged)
    assert counts == [0, 1, 2, 3, 0, 1, 2]


# --- several ranks


class Settling:
    """An agreement that settles what it is told to."""

    any_unsound = False

    def __init__(self):
        self.heard, self.settled = [], []

    def submit_answer(self, decision):
        self.heard.append(decision.step)

    def settle(self, step):
        self.settled.append(step)
        return decided(step - 1)


def test_the_leader_gives_its_answer_to_the_others_and_takes_what_all_settle(clock):
    asking, agreement = Asking("r", Sidecar(clock)), Settling()
    asking.share_decisions(agreement, asks=True)
    began = clock()
    send(asking, 1)
    clock.pass_ms(5)
    assert asking.collect() is None
    assert agreement.heard == [1]
    taken = asking.collect_agreed(2)
    assert (taken.decision.step, taken.sent) == (1, began)
    assert asking.asks


def test_the_others_ask_nobody(clock):
    sidecar = Sidecar(clock)
    asking, agreement = Asking("r", sidecar), Settling()
    send(asking, 1)
    asking.share_decisions(agreement, asks=False)
    send(asking, 2)
    assert asking.collect() is None
    assert [step for step, *_ in sidecar.asked] == [1]
    assert asking.collect_agreed(2).decision.step == 1
    assert agreement.heard == []
    assert (asking.asks, asking.decides) == (False, True)


@pytest.mark.parametrize("asks", [True, False])
def test_ranks_that_act_alike_hold_their_own_update_against_nothing(clock, asks):
    sidecar = Sidecar(clock)
    sidecar.guards = object()
    asking = Asking("r", sidecar)
    assert asking.guards is sidecar.guards
    asking.share_decisions(Settling(), asks=asks)
    assert asking.guards is None


# --- collected and waited for: the same decisions


class Growing:
    """A garden that proposes to blend at every step, and notes what it may."""

    planted = True

    def __init__(self):
        self.step = 0
        self.done = []

    def learn(self, optimizer):
        pass

    def finalize(self, step, latest):
        self.step = step
        return GardenFrame([], 0.0, 0.0, 0.0)

    def proposal_sent(self, step):
        pass

    def apply(self, decision, *, enforced):
        self.done.append((decision.step, decision.action, self.step))
        return decision.action is Action.SEED

    def take_events(self):
        return []


class Judge(Sidecar):
    """Decides by the row it is sent, and by what it was sent before."""

    def __init__(self, clock):
        super().__init__(clock)
        self.told = []
        self.row = {}

    def send(self, step, time_unix_nano, row, seeds=(), proposal=None):
        super().send(step, time_unix_nano, row, seeds, proposal)
        self.row = self.asked[-1][2]

    def answer_about(self, step):
        values = self.row
        decision = unanswered("r", step, "nominal")
        if values.get("loss_delta", 0.0) > 1.0:
            decision = decided(step, lr_scale=0.5)
        elif values["loss"] > 8.0:
            decision = decided(step, Action.PAUSE)
        elif values["loss"] < 1.0:
            decision = decided(step, Action.SEED)
        elif 4.0 < values["loss"] < 5.0:
            decision = unanswered("r", step, "timeout")
        self.told.append(decision)
        return decision


def recorded(losses, *, waits, watched=True):
    """What a run over these losses asked, was answered and did."""
    clock = Clock()
    sidecar, garden = Judge(clock), Growing()
    recorder, frames = make(True, client=sidecar, waits=waits, release_steps=3)
    recorder.attach_garden(garden)
    paused, used = [], []
    recorder._responses.on_pause(lambda decision: paused.append(decision.step))
    for loss in losses:
        if watched:
            used.append(one_step(recorder, clock, loss=loss))
        else:
            recorder.loop_reported(loss, {})
            recorder.end_step()
    assert sidecar.lost == 0, "one at a time"
    return sidecar, frames, garden, used, paused


def judged(sidecar):
    return [(each.step, each.action, each.reason, each.parameters) for each in sidecar.told]


LOSSES = st.lists(st.floats(0.0, 10.0, width=16), min_size=1, max_size=40)


@given(losses=LOSSES)
def test_a_collecting_run_decides_and_does_what_a_waiting_one_does(losses):
    waiting = recorded(losses, waits=True)
    collecting = recorded(losses, waits=False)
    # The answer about the last step is still to be collected.
    assert judged(collecting[0]) == judged(waiting[0])[:-1]
    # The first update that a decision can change is the next, for both.
    assert collecting[3] == waiting[3]
    assert collecting[4] == [step for step in waiting[4] if step < len(losses)]
    assert collecting[1].column("lr_scale") == waiting[1].column("lr_scale")
    assert collecting[1].column("unjudged_steps") == waiting[1].column("unjudged_steps")
    # Seeds hear of it in the step itself, or at the end of the next, before that is finalized.
    assert [(step, action) for step, action, _ in collecting[2].done] == [
        (step, action) for step, action, _ in waiting[2].done[:-1]
    ]
    assert all(step == at for step, _, at in waiting[2].done)
    assert all(step == at for step, _, at in collecting[2].done)


@given(losses=LOSSES)
def test_a_loop_whose_optimizers_nobody_watches_gets_the_same_decisions(losses):
    watched = recorded(losses, waits=False)
    unwatched = recorded(losses, waits=False, watched=False)
    assert judged(unwatched[0]) == judged(watched[0])
    assert unwatched[4] == watched[4]
    assert [each[:2] for each in unwatched[2].done] == [each[:2] for each in watched[2].done]


def test_the_last_answer_is_taken_when_the_run_is_over(clock):
    sidecar = Sidecar(clock)
    recorder, frames = make(client=sidecar, span_every=1)
    for _ in range(3):
        one_step(recorder, clock)
    assert recorder.decision.step == 2
    recorder.flush()
    assert recorder.decision.step == 3
    assert [(each.step, each.decision.step) for each in frames.timelines] == [
        (1, 1),
        (2, 2),
        (3, 3),
    ]
    assert not frames.timelines[-1].applied


def test_frames_that_wait_for_a_device_are_asked_about_when_they_are_whole(clock):
    sidecar = Sidecar(clock)
    recorder, _ = make(client=sidecar)
    late = Late()
    one_step(recorder, clock, loss=late)
    one_step(recorder, clock, loss=2.0)
    assert recorder.decision.reason == NOT_ASKED
    late.number = 1.0
    one_step(recorder, clock, loss=3.0)
    assert [step for step, *_ in sidecar.asked] == [3], "the newest that is whole"
    one_step(recorder, clock)
    assert recorder.decision.step == 3


# --- what was decided goes to the spans of the step it was asked at


def test_a_request_that_could_not_be_sent_shifts_no_later_decision(clock):
    sidecar = Sidecar(clock)
    send = sidecar.send

    def fails_once(step, *more):
        if step == 3:
            raise RuntimeError("no")
        send(step, *more)

    sidecar.send = fails_once
    recorder, frames = make(client=sidecar, span_every=1)
    for _ in range(8):
        one_step(recorder, clock)
    recorder.flush()
    told = {each.step: each.decision and each.decision.step for each in frames.timelines}
    assert told == {step: None if step == 3 else step for step in range(1, 9)}


@pytest.mark.parametrize("asks", [True, False])
def test_where_ranks_agree_a_decision_goes_to_the_step_it_is_about_too(clock, asks):
    class Agreement(Settling):
        """Of ranks that begin at step 1, and whose leader could not ask about step 4."""

        def settle(self, step):
            unasked = step - 1 in (0, 4)
            return unanswered("r", step - 1, NOT_ASKED) if unasked else decided(step - 1)

    recorder, frames = make(client=Sidecar(clock), span_every=1)
    recorder.share_decisions(Agreement(), asks=asks)
    for _ in range(9):
        one_step(recorder, clock)
    recorder.flush()
    told = {each.step: each.decision.step for each in frames.timelines if each.decision}
    assert told == {step: step for step in (1, 2, 3, 5, 6, 7, 8)}


def test_a_decision_in_its_own_span(clock):
    recorder, frames = make(client=Sidecar(clock, takes_ms=1.0), span_every=1)
    for _ in range(3):
        one_step(recorder, clock)
    for timeline in frames.timelines:
        ((_, sent, taken),) = [each for each in timeline.phases if each[0] == "tamiyo.decide"]
        assert sent == timeline.end_unix_nano
        assert taken > sent


# --- what counts as applied


def applied_of(clock, *decisions, enforce=True, minimum=0.01, steps=6, **options):
    """Which of the decisions, about the first steps, were told as applied."""
    sidecar = Sidecar(clock)
    sidecar.decisions = {each.step: each for each in decisions}
    recorder, frames = make(enforce, client=sidecar, span_every=1, minimum=minimum, **options)
    for _ in range(steps):
        one_step(recorder, clock)
    recorder.flush()
    return [each.step for each in frames.timelines if each.applied]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(
    ("decisions", "options", "applied"),
    [
        ([decided(1, lr_scale=0.5)], {}, [1]),
        ([decided(1, lr_scale=0.5), decided(2, lr_scale=0.5)], {}, [1, 2]),
        ([decided(1, lr_scale=0.5)], {"enforce": False}, []),
        ([decided(1, lr_scale=0.5), decided(2, lr_scale=0.5)], {"minimum": 0.5}, [1]),
        ([decided(1, lr_scale=1.0)], {}, []),
        ([decided(1, lr_scale=float("nan"))], {}, []),
        ([decided(1)], {}, []),
        ([decided(1, Action.PAUSE)], {}, []),
        ([decided(1, max_norm=1.0)], {}, []),
        ([unanswered("r", 1, "timeout")], {}, []),
        ([decided(6, lr_scale=0.5)], {}, []),  # no update came after it
        ([decided(1, lr_scale=0.5), decided(3, lr_scale=2.0)], {}, [1, 3]),
    ],
)
def test_applied_is_what_an_update_was_made_with(clock, waits, decisions, options, applied):
    assert applied_of(clock, *decisions, waits=waits, **options) == applied


def test_a_factor_that_no_optimizer_used_is_not_applied(clock):
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, frames = make(True, client=sidecar, span_every=1)
    for _ in range(5):
        recorder.end_step()
    recorder.flush()
    assert not any(each.applied for each in frames.timelines)


@pytest.mark.parametrize("registered", [True, False])
def test_a_pause_is_applied_where_something_was_paused(clock, registered):
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, Action.PAUSE)
    recorder, frames = make(True, client=sidecar, span_every=1)
    if registered:
        recorder._responses.on_pause(lambda decision: None)
    for _ in range(3):
        one_step(recorder, clock)
    assert frames.timelines[0].applied is registered


@pytest.mark.parametrize(("granted", "acts"), [(True, True), (True, False), (False, False)])
def test_a_seed_is_applied_where_it_acted_because_of_the_decision(clock, granted, acts):
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, Action.SEED if granted else Action.CONTINUE)
    recorder, frames = make(True, client=sidecar, span_every=1)
    garden = Growing()
    garden.apply = lambda decision, *, enforced: acts and decision.step == 1
    recorder.attach_garden(garden)
    for _ in range(3):
        one_step(recorder, clock)
    assert [each.applied for each in frames.timelines] == [acts, False]


# --- unjudged


def test_what_is_held_stays_held_while_nobody_answers_and_how_long_is_told(clock):
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.25)
    for step in range(2, 502):
        sidecar.decisions[step] = unanswered("r", step, "breaker_open")
    recorder, frames = make(True, client=sidecar, release_steps=10)
    used = [one_step(recorder, clock) for _ in range(540)]
    assert used[0] == 0.1
    assert set(used[1:502]) == {0.025}
    # A step tells what was known when it ended: the decision about the one before.
    unjudged = frames.column("unjudged_steps")
    assert unjudged[:503] == [0, 0, *range(1, 501), 0]
    assert set(unjudged[502:]) == {0}
    # Judged on from there: ten clean steps, and then it is given back.
    assert set(used[502:512]) == {0.025}
    assert used[512] > 0.025
    assert used[-1] == 0.1
    assert frames.column("optimizer_lr") == pytest.approx(used)


def test_what_was_never_asked_is_no_failure_to_answer(clock):
    """At the first step of ranks that agree there is nothing to settle yet."""

    class Agreement(Settling):
        def settle(self, step):
            if step == 1:
                return unanswered("r", 0, NOT_ASKED)
            return unanswered("r", step - 1, "nominal")

    recorder, frames = make(client=Sidecar(clock))
    recorder.share_decisions(Agreement(), asks=True)
    for _ in range(5):
        one_step(recorder, clock)
    assert frames.column("unjudged_steps") == [0.0] * 5


def test_the_ask_carries_exactly_the_frame_that_is_streamed(clock):
    sidecar = Sidecar(clock)
    recorder, frames = make(client=sidecar)
    for _ in range(3):
        one_step(recorder, clock)
    assert [(time, values) for _, time, values in sidecar.asked] == frames.taken
