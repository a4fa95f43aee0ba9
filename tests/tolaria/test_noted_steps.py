"""Noted steps: what is made of notes later equals what is made of events at once."""

import random
from threading import Thread

import pytest
from tolaria.loops import MS, Frames, Late, Optimizer, make, one_step
from tolaria.sidecars import Sidecar

from esper_otel.tolaria.fetches import Source
from esper_otel.tolaria.losses import Evaluation
from esper_otel.tolaria.noted_steps import MANY_WAITING, MOST_NOTES, MOST_WAITING
from testkit.patience import PATIENCE_S

BEGAN = 10**12


class FramesLater(Frames):
    """Takes up notes when it is told to."""

    def __init__(self):
        super().__init__()
        self.notes, self.is_awaited, self.rung = None, False, 0

    def follow(self, notes):
        self.notes = notes
        return self

    def ring(self):
        self.rung += 1


def making(frames, **options):
    """As ``make``, with a recorder that gives its frames to ``frames``."""
    recorder, _ = make(frames=frames, **options)
    return recorder


def noting(**options):
    frames = FramesLater()
    recorder = making(frames, **options)
    recorder.defer_to(frames)
    return recorder, frames


class Loop:
    """Random steps, the same for the same seed, most of them ordinary."""

    def __init__(self, recorder, clock, seed):
        self.recorder, self.clock = recorder, clock
        self.random = random.Random(seed)
        self.source = Source(1, 1)

    def passes(self):
        self.clock.now += self.random.choice([0, 0, 1, 17, 250, 10_000, MS])

    def batch(self):
        asked_for = self.clock()
        self.passes()
        size = (self.random.choice([32, 32, 32, 7]), self.random.choice([0, 10]))
        self.recorder.batch_came(asked_for, size, self.source)

    def backward(self):
        self.passes()
        self.recorder.backward_begins()
        self.clock.now += self.random.choice([0, 3, MS, MS])
        loss = self.random.choice([1.0, 0.25, 3.5, float("nan"), None, self.random.random()])
        evaluation = self.random.choice([None, None, None, Evaluation(2.0, 1, ("Div",))])
        self.recorder.backward_ends(loss, evaluation)

    def odd(self):
        recorder = self.recorder
        what = self.random.randrange(16)
        if what == 0:
            recorder.batches_ended(self.source.iterator)
            self.source = Source(self.source.iterator + 1, 1)
        elif what == 1:
            recorder.skipped()
        elif what == 2:
            recorder.phase_begins("a phase")
        elif what == 3:
            recorder.clipped(self.random.random())
        elif what == 4:
            recorder.loop_reported(2.5, {"of its own": 1.0, "gradient_norm": 3.0})
        elif what == 5:
            self.batch()
        elif what == 6:
            self.backward()
        elif what == 7:
            recorder.under_way.losses.another_stepped()
        elif what == 8:
            recorder.phase("forward", self.clock() - 5, self.clock())
        elif what == 9:
            recorder.state_dict()
        elif what == 10:
            recorder.closure_begins()
        elif what == 11:
            recorder.batch_came(self.clock(), (8, 0), Source(90, 9, graded=False))

    def step(self):
        recorder, chance = self.recorder, self.random.random
        if chance() < 0.95:
            self.batch()
        for _ in range(3 if chance() < 0.05 else 1):
            self.backward()
        if chance() < 0.1:
            self.odd()
        if chance() < 0.3:
            began = self.clock()
            self.passes()
            recorder.measured(self.random.choice([None, 1.0, float("inf")]), began)
        if chance() < 0.5:
            recorder.loop_reported(None, {"accuracy": chance(), "grad_conflict_rate": 0.5})
        self.passes()
        hook_began = self.clock()
        self.passes()
        norm = self.random.choice([None, 2.0, chance(), float("nan")])
        wants = recorder.wants_norm, recorder.optimizing
        recorder.optimizer_begins(hook_began, norm if wants[0] else None)
        if chance() < 0.02:
            self.odd()
        self.passes()
        groups = self.random.choice(
            [
                [{"lr": 0.1, "momentum": 0.9}],
                [{"lr": chance(), "betas": (0.9, 0.99), "initial_lr": 0.5}],
                [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.2, "momentum": 0.5}],
                [{"lr": 1, "momentum": None}],
                [],
            ]
        )
        recorder.optimizer = Optimizer(*groups) if chance() < 0.95 else None
        ended = recorder.optimizer_ends()
        recorder.end_step(ended if chance() < 0.9 else 0)
        recorder.optimizer = None
        self.passes()
        return wants


def recorded(frames, recorder):
    """All that was given away, its times those of the loop's clock."""
    offset = recorder.clock.offset
    return (
        [(time - offset, row) for time, row in frames.taken],
        frames.customs,
        [
            each._replace(
                start_unix_nano=each.start_unix_nano - offset,
                end_unix_nano=each.end_unix_nano - offset,
                phases=[(name, a - offset, b - offset) for name, a, b in each.phases],
                row=str(each.row),
            )
            for each in frames.timelines
        ],
    )


@pytest.mark.parametrize("enriched", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_notes_make_what_events_make(clock, seed, enriched):
    found = []
    for later in (False, True):
        clock.now = BEGAN
        frames = FramesLater() if later else Frames()
        options = {"enriched": enriched, "span_every": 3}
        probes = {"cpu_util_percent": 5.0} if enriched else {}
        recorder = making(frames, device_values=lambda probes=probes: probes, **options)
        if later:
            recorder.defer_to(frames)
        loop, often, seen = Loop(recorder, clock, seed), random.Random(seed), []
        for _ in range(80):
            seen.append(loop.step())
            if later and often.random() < 0.3:
                frames.notes.catch_up()
        state = recorder.state_dict()
        recorder.flush()
        found.append((recorded(frames, recorder), seen, str(state)))
    assert found[0] == found[1]


def test_a_row_is_made_when_it_is_taken_up_and_not_before(clock):
    recorder, frames = noting()
    for _ in range(3):
        one_step(recorder, clock)
    assert frames.taken == []
    frames.notes.catch_up()
    assert frames.column("step") == [1, 2, 3]
    assert frames.column("step_latency_ms")[1:] == [13.5, 13.5]


def test_what_devices_and_rates_have_newly_is_in_the_rows_from_then_on(clock):
    probes = [{"cpu_util_percent": 5.0}]
    recorder, frames = noting(device_values=lambda: probes[-1])
    optimizers = [Optimizer({"lr": rate, "momentum": 0.9}) for rate in (0.2, 0.1)]
    for values, optimizer in ((5.0, 0), (5.0, 0), (6.0, 0), (6.0, 1), (None, 1), (None, 0)):
        if probes[-1].get("cpu_util_percent") != values:
            probes.append({} if values is None else {"cpu_util_percent": values})
        recorder.optimizer = optimizers[optimizer]
        one_step(recorder, clock)
        frames.notes.catch_up()
    assert frames.column("optimizer_lr") == [0.2, 0.2, 0.2, 0.1, 0.1, 0.2]
    assert frames.column("optimizer_lr_base") == [0.2] * 6
    assert frames.column("cpu_util_percent") == [5.0, 5.0, 6.0, 6.0, None, None]


def test_whoever_sleeps_is_woken_by_a_step(clock):
    recorder, frames = noting()
    one_step(recorder, clock)
    assert frames.rung == 0
    frames.is_awaited = True
    one_step(recorder, clock)
    assert frames.rung == 1


def test_nothing_is_noted_of_a_run_that_is_decided_about(clock):
    for options in ({"client": Sidecar(clock)}, {"enforce": True}):
        recorder, frames = noting(**options)
        one_step(recorder, clock)
        assert frames.column("step") == [1]


def test_a_client_that_comes_later_is_asked_about_the_next_step(clock):
    recorder, frames = noting()
    one_step(recorder, clock)
    sidecar = Sidecar(clock)
    recorder.set_client(sidecar)
    assert frames.column("step") == [1]
    one_step(recorder, clock)
    assert [step for step, _, _ in sidecar.asked] == [2]
    assert frames.column("step_latency_ms")[1] == 13.5


def test_a_value_on_a_device_ends_the_noting(clock):
    recorder, frames = noting()
    one_step(recorder, clock)
    late = Late()
    one_step(recorder, clock, loss=late)
    assert frames.column("step") == [1]
    late.number = 4.0
    one_step(recorder, clock)
    assert frames.column("step") == [1, 2, 3]
    assert frames.column("loss")[1] == 4.0


@pytest.mark.parametrize("where", ["norm", "measured", "clipped", "reported"])
def test_so_does_any_value_of_a_step(clock, where):
    recorder, frames = noting()
    late = Late()
    one_step(recorder, clock)
    if where == "norm":
        one_step(recorder, clock, norm=late)
    else:
        told = {
            "measured": lambda: recorder.measured(late),
            "clipped": lambda: recorder.clipped(late),
            "reported": lambda: recorder.loop_reported(None, {"gradient_norm": late}),
        }
        told[where]()
        assert not recorder.wants_norm
        one_step(recorder, clock, norm=None)
    late.number = 6.0
    recorder.flush()
    assert frames.column("gradient_norm") == [2.0, 6.0]


def test_steps_that_nobody_takes_up_are_bounded(clock):
    recorder, frames = noting()
    for _ in range(MOST_WAITING + 50):
        one_step(recorder, clock)
    assert len(frames.notes.waiting) <= MOST_WAITING + 1
    recorder.flush()
    assert frames.column("step") == list(range(1, MOST_WAITING + 51))


def test_so_are_the_notes_of_a_step_that_never_ends(clock):
    recorder, frames = noting()
    for _ in range(MOST_NOTES):
        recorder.batch_came(clock(), (8, 0))
        recorder.loop_reported(None, {"accuracy": 0.5})
    assert len(frames.notes._notes) <= MOST_NOTES


def test_a_forked_child_forgets_what_its_parent_noted(clock):
    recorder, frames = noting()
    one_step(recorder, clock)

    def child():
        recorder.switch_off()
        one_step(recorder, clock)
        assert recorder.under_way.norm is None
        done.append(True)

    done = []
    with frames.notes._lock:  # another thread was at it in that moment
        forked = Thread(target=child, daemon=True)
        forked.start()
        forked.join(PATIENCE_S)
    frames.notes.catch_up()
    assert done
    assert frames.taken == []


def test_a_handler_of_a_signal_may_ask_while_notes_are_taken_up(clock):
    recorder, frames = noting()
    for _ in range(3):
        one_step(recorder, clock)
    take, states = frames.frame, []

    def frame(*told):
        take(*told)
        states.append(recorder.state_dict())  # as one that writes a checkpoint does

    def goes_on():
        frames.frame = frame
        recorder.phase_begins("b")
        frames.frame = take
        one_step(recorder, clock)
        recorder.flush()

    trains = Thread(target=goes_on, daemon=True)
    trains.start()
    trains.join(PATIENCE_S)
    assert not trains.is_alive(), "it waits for itself"
    assert frames.column("step") == [1, 2, 3, 4]
    assert states[-1]["step"] == 3


class Rings:
    """A bell; whoever rings it is interrupted."""

    is_awaited = True

    def __init__(self, happens):
        self.ring = happens


def test_an_exception_between_two_steps_has_none_told_twice(clock):
    recorder, frames = noting()
    one_step(recorder, clock)

    def interrupted():
        raise KeyboardInterrupt

    notes, bell = frames.notes, frames.notes.bell
    notes.bell = Rings(interrupted)
    with pytest.raises(KeyboardInterrupt):
        one_step(recorder, clock)
    notes.bell = bell
    one_step(recorder, clock)
    recorder.flush()
    assert frames.column("step") == [1, 2, 3]
    assert frames.column("forward_ms") == [4.0, 4.0, 4.0]


def test_a_checkpoint_between_two_steps_leaves_the_next_as_it_is(clock):
    found = []
    for asks in (False, True):
        clock.now = BEGAN
        recorder, frames = noting()
        one_step(recorder, clock)
        if asks:
            frames.notes.bell = Rings(recorder.state_dict)
        one_step(recorder, clock)
        frames.notes.bell = None
        one_step(recorder, clock)
        recorder.flush()
        found.append([str(row) for _, row in frames.taken])
    assert found[0] == found[1]


def test_a_norm_that_was_computed_since_backward_ended_took_that_time(clock):
    found = []
    for later in (False, True):
        clock.now = BEGAN
        recorder, frames = noting() if later else make()
        for _ in range(2):
            recorder.batch_came(clock(), (8, 0))
            clock.now += MS
            recorder.backward_begins()
            clock.now += MS
            recorder.backward_ends(1.0)
            clock.now += MS
            recorder.measured(2.0)
            recorder.optimizer_begins(clock(), None)
            recorder.optimizer_ends()
            recorder.end_step()
        recorder.flush()
        found.append(frames.column("hook_latency_ms"))
    assert found[0] == found[1] == [1.0, 1.0]


class OddGroup:
    """What stands for a group of parameters, and is no dictionary."""


def test_groups_that_nobody_can_read_cost_their_rates(clock):
    recorder, frames = noting()
    for _ in range(3):
        recorder.optimizer = Optimizer({"lr": 0.1, "momentum": 0.9})
        recorder.optimizer.param_groups[:] = [OddGroup()]
        recorder.batch_came(clock(), (8, 0))
        recorder.backward_begins()
        recorder.backward_ends(1.0)
        recorder.optimizer_begins(clock(), 1.0)
        recorder.end_step(recorder.optimizer_ends())
    recorder.flush()
    assert frames.column("step") == [1, 2, 3]


def test_whoever_takes_them_up_is_woken_before_there_are_too_many(clock):
    recorder, frames = noting()
    for _ in range(MANY_WAITING - 1):
        one_step(recorder, clock)
    assert frames.rung == 0
    one_step(recorder, clock)
    assert frames.rung == 1


def test_what_fails_costs_its_own_step(clock, caplog):
    recorder, frames = noting()
    for _ in range(4):
        one_step(recorder, clock)
    frames.notes.catch_up()
    original, sink = frames.frame, recorder._ordinary._frames
    sink.frame = lambda *row: 1 / 0
    one_step(recorder, clock)
    frames.notes.catch_up()
    sink.frame = original
    one_step(recorder, clock)
    recorder.flush()
    assert frames.column("step") == [1, 2, 3, 4, 6]
    assert set(frames.column("step_latency_ms")[1:]) == {13.5}
    assert len(caplog.records) == 1


def test_a_handler_that_ends_the_run_in_the_midst_does_not_wait_for_itself(clock):
    recorder, frames = noting()
    for _ in range(4):
        one_step(recorder, clock)
    original = frames.frame

    def handled(*frame):
        frames.frame = original
        recorder.flush()
        original(*frame)

    frames.frame = handled
    frames.notes.catch_up()
    assert sorted(frames.column("step")) == [1, 2, 3, 4]
