"""A driven run that is recorded, whose statistics its decisions depend on."""

from unittest.mock import patch

from kasmina.driven import QUICK, AtOnce, Driven

from esper_otel.kasmina.garden import Garden
from esper_otel.leyline.frames import present
from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.settings import EsperSettings
from esper_otel.tolaria.recorder import Recorder
from esper_otel.tolaria.responses import RateFactor, Responses


class Recorded(Driven):
    def __init__(self):
        super().__init__(garden=False, momentum=0.9)
        self.rows = []
        rate = RateFactor(minimum=0.01, maximum=1.0, release_steps=200)
        self.recorder = Recorder(self, run="r", responses=Responses(rate, enforce=False))
        settings = EsperSettings().changed(
            **{**QUICK, "growth": "autonomous", "plateau_steps": 6, "loss_rise_max": 0.5}
        )
        with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
            self.garden = Garden(
                self.host, ["1", "3"], settings=settings, recorder=self.recorder
            )
        self.recorder.attach_garden(self.garden)

    def frame(self, time_unix_nano, row, seeds=()):
        values = present(STEP_KEYS, row)
        self.rows.append(
            {k: v for k, v in values.items() if "_ms" not in k and "per_s" not in k}
        )

    def timeline(self, timeline):
        pass

    def event(self, event):
        self.events.append(event)

    def step(self, decide=None, enforced=True):
        self.recorder.backward_begins()
        self.train()
        self.recorder.backward_ends(self.losses[-1])
        self.recorder.clipped(1.0 + self.losses[-1])
        self.recorder.optimizer_ends()
        self.recorder.optimizer = self.optimizer
        self.recorder.end_step()
