"""The end of a step: six stages, and what raises in one takes nothing from the others."""

import logging

import pytest
from tolaria.loops import Late, make, one_step
from tolaria.sidecars import Sidecar, decided

from esper_otel.leyline.decisions import Action, Severity
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import GardenFrame, seed_row
from esper_otel.tolaria.garden_calls import SafeGarden
from esper_otel.tolaria.step import StepUnderWay
from esper_otel.tolaria.timelines import Timelines

BAD = 4
"""The step at whose end something raises."""
STEPS = 8


class Garden:
    planted = True

    def __init__(self):
        self.applied, self.asked_about, self.finalized = [], [], []

    def learn(self, optimizer):
        pass

    def finalize(self, step, latest):
        self.finalized.append(step)
        return GardenFrame([("s", seed_row())], 2.0, 0.5, 1.0)

    def proposal_sent(self, step):
        self.asked_about.append(step)

    def apply(self, decision, *, enforced):
        self.applied.append(decision.step)
        return False

    def take_events(self):
        return [Event("e", 0, Severity.NORMAL, "t", {})]


class Run:
    """A loop in which ``fault`` raises at the end of one step."""

    def __init__(self, clock, monkeypatch, *, waits=False):
        self.clock, self.monkeypatch = clock, monkeypatch
        self.sidecar = Sidecar(clock)
        self.garden = Garden()
        self.probes = {"cpu_util_percent": 5.0}
        self.recorder, self.frames = make(
            True,
            client=self.sidecar,
            span_every=1,
            waits=waits,
            device_values=lambda: self.probes,
        )
        self.recorder.attach_garden(self.garden)
        self.now = False

    def break_(self, owner, name):
        """``owner.name`` raises at the end of the bad step."""
        original = getattr(owner, name)

        def broken(*args, **kwargs):
            if self.now:
                raise RuntimeError(f"{name} is broken")
            return original(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, broken)

    def steps(self):
        end_step = self.recorder.end_step

        def ends():
            # A batch that is fetched ahead, before the step is over.
            self.recorder.batch_came(self.clock(), (8, 0))
            self.now = self.recorder.step == BAD - 1
            end_step()
            self.now = False

        self.recorder.end_step = ends
        self.used = [
            one_step(self.recorder, self.clock, loss=float(step)) for step in range(STEPS)
        ]
        self.recorder.flush()
        return self


ALL = list(range(1, STEPS + 1))
OTHERS = [step for step in ALL if step != BAD]

STAGES = {
    "seeds": lambda run: run.break_(SafeGarden, "act_on"),
    "seal, at its beginning": lambda run: run.break_(StepUnderWay, "charge_fetches"),
    "seal": lambda run: run.break_(SafeGarden, "finalize"),
    "seal, at its end": lambda run: run.break_(run.recorder, "_device_values"),
    "stream": lambda run: run.break_(run.frames, "frame"),
    "ask": lambda run: run.break_(run.sidecar, "send"),
    "spans": lambda run: run.break_(Timelines, "on_update"),
    "spans, at their beginning": lambda run: run.break_(run.frames, "event"),
}


@pytest.fixture(params=STAGES)
def broken(request, clock, monkeypatch):
    """A run of which one stage raised at the end of one step; and which stage."""
    run = Run(clock, monkeypatch)
    STAGES[request.param](run)
    run.sealed = request.param == "seal, at its end"
    return request.param.split(",")[0], run.steps()


def test_it_is_told_once(broken, caplog):
    stage, _ = broken
    (record,) = caplog.get_records("setup")
    assert record.levelno == logging.ERROR
    assert f"'_{stage}'" in record.getMessage()
    assert "the run continues" in record.getMessage()


def test_every_step_is_streamed(broken):
    stage, run = broken
    assert len(run.frames.taken) == (STEPS - 1 if stage == "stream" else STEPS)
    if stage != "seal":
        assert run.frames.column("step") == (OTHERS if stage == "stream" else ALL)
    steps = [step for step, _, _ in run.sidecar.asked]
    if stage != "seal":
        assert steps == (OTHERS if stage == "ask" else ALL)


def test_no_value_of_one_step_is_in_another(broken):
    stage, run = broken
    losses = run.frames.column("loss")
    assert losses == [step - 1.0 for step in (OTHERS if stage == "stream" else ALL)]
    one_step(run.recorder, run.clock, loss=None, norm=None)
    assert "loss" not in run.frames.rows[-1]
    assert "gradient_norm" not in run.frames.rows[-1]


def test_times_are_right_after_it(broken):
    _, run = broken
    latencies = run.frames.column("step_latency_ms")
    assert latencies[0] is None
    assert latencies[-(STEPS - BAD) :] == [13.5] * (STEPS - BAD)
    for key, milliseconds in (("forward_ms", 4.0), ("backward_ms", 6.0), ("optimizer_ms", 2.0)):
        assert set(run.frames.column(key)[-(STEPS - BAD) :]) == {milliseconds}


def test_every_other_stage_did_its_work(broken):
    stage, run = broken
    assert (
        run.garden.finalized == [step for step in ALL if not (stage == "seal" and step == BAD)]
        or run.garden.finalized == ALL
    )
    assert run.garden.asked_about[-1] == STEPS
    expected = [step for step in ALL[:-1] if not (stage == "ask" and step == BAD)]
    if stage == "seeds":  # that of the step before was being told
        expected.remove(BAD - 1)
    assert run.garden.applied == expected
    told = [each.step for each in run.frames.timelines]
    missing = {"spans": 1}.get(stage, 0)
    assert len(told) >= STEPS - missing
    assert told == sorted(set(told))
    for timeline in run.frames.timelines:
        if timeline.decision is not None:
            assert timeline.decision.step == timeline.step


@pytest.mark.parametrize("waits", [True, False])
def test_a_decision_that_cannot_be_taken_takes_nothing_from_the_next(
    clock, monkeypatch, caplog, waits
):
    run = Run(clock, monkeypatch, waits=waits)
    run.sidecar.decisions = {2: decided(2, lr_scale=0.5), 6: decided(6, lr_scale=0.5)}
    apply_rate = run.recorder._responses.apply_rate

    def broken(decision):
        if decision.step == BAD:
            raise RuntimeError("no")
        return apply_rate(decision)

    monkeypatch.setattr(run.recorder._responses, "apply_rate", broken)
    run.steps()
    assert len(caplog.records) == 1
    # The factor in force stays in force, at the step of the fault as well.
    assert run.used == pytest.approx([0.1, 0.1, *[0.05] * 4, *[0.025] * 2])
    assert run.frames.column("optimizer_lr") == pytest.approx(run.used)
    assert run.frames.column("step_latency_ms")[1:] == [13.5] * (STEPS - 1)


def test_a_check_that_raises_leaves_the_factor_in_force(clock, monkeypatch, caplog):
    run = Run(clock, monkeypatch)
    run.sidecar.decisions[1] = decided(1, lr_scale=0.5)

    class Crossed:
        looks_at_rate = skips_nonfinite = False

        def crossed(self, *values):
            raise RuntimeError("no")

    run.sidecar.guards = Crossed()
    run.steps()
    assert run.used == pytest.approx([0.1, *[0.05] * (STEPS - 1)])
    assert len(caplog.records) == 1


def test_a_callback_of_the_users_that_raises_takes_nothing_from_the_rest(
    clock, monkeypatch, caplog
):
    run = Run(clock, monkeypatch)
    run.sidecar.decisions[2] = pause = decided(2, Action.PAUSE)
    seen = []
    run.recorder._responses.on_pause(lambda decision: 1 / 0)
    run.recorder._responses.on_pause(seen.append)
    run.steps()
    assert seen == [pause]
    assert 2 in run.garden.applied
    assert [each.step for each in run.frames.timelines if each.applied] == [2]
    assert len(caplog.records) == 1


def test_what_goes_on_raising_is_told_once_for_each_stage(clock, monkeypatch, caplog):
    run = Run(clock, monkeypatch)
    for name in ("seal", "stream"):
        STAGES[name](run)
    run.break_(run.garden, "proposal_sent")
    run.break_(Timelines, "on_update")
    end_step = run.recorder.end_step
    run.now = True
    for _ in range(5):
        end_step()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == 4, said


def test_while_frames_wait_for_a_device_a_fault_costs_one_of_them_at_most(
    clock, monkeypatch, caplog
):
    run = Run(clock, monkeypatch)
    run.break_(run.frames, "frame")
    late = [Late() for _ in range(STEPS)]
    for number, loss in enumerate(late):
        if number >= 2:
            late[number - 2].number = float(number)
        run.now = number == BAD
        one_step(run.recorder, run.clock, loss=loss)
    run.now = False
    run.recorder.flush()
    steps = run.frames.column("step")
    assert steps == sorted(set(steps))
    assert len(steps) == STEPS - 1
