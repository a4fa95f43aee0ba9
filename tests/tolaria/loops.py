"""A training loop of the recorder's tests: its clock, its optimizer, and one step of it."""

from __future__ import annotations

from esper_otel.leyline.frames import NO_CUSTOM, present
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.tolaria import (
    asking,
    garden_calls,
    noted_steps,
    recorder,
    step,
    update_control,
)
from esper_otel.tolaria.recorder import Recorder
from esper_otel.tolaria.responses import RateFactor, Responses

MS = 1_000_000


class Clock:
    """perf_counter_ns of the tests: stands still unless told to go on."""

    def __init__(self):
        self.now = 10**12

    def __call__(self):
        return self.now

    def pass_ms(self, milliseconds):
        self.now += int(milliseconds * MS)


def stop_the_clock(monkeypatch):
    """The clock by which everything that a recorder does is measured from here on."""
    clock = Clock()
    for module in (recorder, step, noted_steps, asking, garden_calls, update_control):
        monkeypatch.setattr(module, "perf_counter_ns", clock)
    return clock


class Frames:
    """Keeps what a recorder gives away."""

    def __init__(self):
        self.taken, self.seeds, self.timelines, self.events = [], [], [], []
        self.customs = []

    def frame(self, time_unix_nano, row, seeds=(), custom=NO_CUSTOM):
        self.taken.append((time_unix_nano, present(STEP_KEYS, row)))
        self.customs.append(dict(custom))
        self.seeds.append({name: present(SEED_KEYS, values) for name, values in seeds})

    def timeline(self, timeline):
        self.timelines.append(timeline)

    def event(self, event):
        self.events.append(event)

    @property
    def rows(self):
        return [values for _, values in self.taken]

    def column(self, key):
        return [values.get(key) for values in self.rows]


class Optimizer:
    """Groups without parameters, unless they are given."""

    def __init__(self, *groups):
        self.param_groups = [{"params": [], **group} for group in groups]


class Late:
    """A value that a device has not delivered yet."""

    def __init__(self):
        self.number = None

    def ready(self):
        return self.number is not None

    def value(self):
        return self.number


made = []
"""Recorders of the test that runs now."""


def make(enforce=False, release_steps=10, minimum=0.01, frames=None, **options):
    """A recorder with an optimizer, and where its frames go."""
    frames = frames or Frames()
    rate = RateFactor(minimum=minimum, maximum=1.0, release_steps=release_steps)
    recorder = Recorder(frames, run="r", responses=Responses(rate, enforce=enforce), **options)
    recorder.optimizer = Optimizer({"lr": 0.1, "momentum": 0.9})
    made.append(recorder)
    return recorder, frames


def one_step(
    recorder,
    clock,
    *,
    loss=1.0,
    norm=2.0,
    wait=1.0,
    forward=4.0,
    backward=6.0,
    norm_ms=0.5,
    optimizer=2.0,
    samples=32,
):
    """One step; returns the learning rate that its update used."""
    asked_for = clock()
    clock.pass_ms(wait)
    recorder.batch_came(asked_for, (samples, 0))
    clock.pass_ms(forward)
    recorder.backward_begins()
    clock.pass_ms(backward)
    recorder.backward_ends(loss)
    hook_began = clock()
    clock.pass_ms(norm_ms)
    stepped = recorder.optimizer
    recorder.optimizer_begins(hook_began, norm, stepped)
    clock.pass_ms(optimizer)
    used = stepped.param_groups[0].get("lr")
    recorder.optimizer_ends(stepped)
    recorder.end_step()
    return used
