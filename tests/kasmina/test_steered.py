"""A garden, a recorder and the real rules of a sidecar, in one process."""

from unittest.mock import patch

from kasmina.driven import QUICK, AtOnce, Driven

from esper_otel.kasmina.garden import Garden
from esper_otel.leyline.decisions import Action
from esper_otel.leyline.frames import StepFrame, present
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings
from esper_otel.tolaria.recorder import Recorder
from esper_otel.tolaria.responses import RateFactor, Responses
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import load


class InProcess:
    """Asks an engine as the socket would, without the socket."""

    def __init__(self, engine):
        self.engine = engine
        self.answers = []

    guards = None

    def send(self, step, time_unix_nano, row, seeds=(), proposal=None):
        frame = StepFrame(
            run="r",
            instance="i",
            rank=0,
            step=step,
            time_unix_nano=time_unix_nano,
            values=present(STEP_KEYS, row),
            seeds={seed_id: present(SEED_KEYS, values) for seed_id, values in seeds},
        )
        decision = self.engine.observe(frame, proposal)
        self.answers.append((proposal, decision))

    def collect(self):
        return self.answers[-1][1]


class Frames:
    def __init__(self):
        self.seeds, self.events = [], []

    def frame(self, time_unix_nano, row, seeds=()):
        self.seeds.append({seed_id: present(SEED_KEYS, values) for seed_id, values in seeds})

    def timeline(self, timeline):
        pass

    def event(self, event):
        self.events.append(event)


class Steered(Driven):
    def __init__(self, mode="enforce"):
        super().__init__(garden=False)
        self.sidecar = InProcess(Engine(load("default")))
        self.frames = Frames()
        rate = RateFactor(minimum=0.01, maximum=1.0, release_steps=200)
        self.recorder = Recorder(
            self.frames,
            run="r",
            responses=Responses(rate, enforce=mode == "enforce"),
            client=self.sidecar,
        )
        with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
            self.garden = Garden(self.host, ["1"], settings=EsperSettings().changed(**QUICK))
        self.recorder.attach_garden(self.garden)

    def step(self, loss=1.0):
        self.recorder.backward_begins()
        self.train()
        self.recorder.backward_ends(loss)
        self.recorder.optimizer_begins(0, 1.0, self.optimizer)
        self.recorder.optimizer_ends()
        self.recorder.optimizer = self.optimizer
        self.recorder.end_step()


def test_with_the_default_table_a_seed_grows_by_consent():
    steered = Steered()
    for _ in range(60):
        steered.step()
    assert steered.garden.slots == {"1": Stage.FOSSILIZED}
    consents = [d for p, d in steered.sidecar.answers if p is not None]
    assert {decision.action for decision in consents} == {Action.SEED}
    assert len({decision.id for decision in consents}) == 6
    stages = [seeds["1-1"]["kasmina.seed.stage"] for seeds in steered.frames.seeds if seeds]
    assert stages == sorted(stages)


def test_a_spike_pauses_growth_and_calm_lets_it_go_on():
    steered = Steered()
    for _ in range(60):  # the table needs a record
        steered.step(loss=1.0)
    while not steered.garden.stages:
        steered.step()
    at = len(steered.frames.seeds)
    for _ in range(8):  # hard batches alone are no spike
        steered.step(loss=50.0)
    _, decision = steered.sidecar.answers[-1]
    assert (decision.action, decision.conservative) == (Action.CONTINUE, True)
    for _ in range(30):
        steered.step()
    key = "kasmina.seed.stage"
    held = {seeds["1-1"][key] for seeds in steered.frames.seeds[at + 8 :]}
    assert len(held) == 1  # conservative mode: not one stage further
    for _ in range(100):
        steered.step()
    assert steered.garden.slots == {"1": Stage.FOSSILIZED}


def test_advice_is_not_consent():
    steered = Steered("advise")
    for _ in range(60):
        steered.step()
    assert steered.garden.stages == {}
    assert any(d.action is Action.SEED for _, d in steered.sidecar.answers)
