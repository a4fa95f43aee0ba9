"""default.yaml as it comes, on made-up runs of four scales: fast and slow, small and large.

Real trainings are judged in ``bench/scenarios``; here every rule of the default table has
a trouble that it names, soon, and a healthy run that it leaves alone.
"""

import math
import random

import pytest

from esper_otel.leyline.decisions import Action
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.peers import ARRIVAL_NS, HINDSIGHT_NS
from esper_tamiyo.language.table_file import load

TABLE = load("default")
SCALES = [(0.5, 0.01), (0.5, 11.0), (30_000.0, 0.01), (30_000.0, 11.0)]
TROUBLE = 200
"""The step at which trouble begins."""


def schedule(step, steps=2000):
    """Warm-up, then a cosine."""
    if step < 50:
        return 0.1 * (step + 1) / 50
    return 0.05 * (1 + math.cos(math.pi * step / steps))


class Made:
    """A run that goes as most runs go; ``change(step, values, seeds)`` may spoil a step."""

    def __init__(self, step_ms, level, change=lambda step, values, seeds: None, rank=0):
        self.step_ms, self.level, self.change, self.rank = step_ms, level, change, rank
        self.random = random.Random(rank)
        self.now_ms, self.before = 1e12, None
        self.mean = self.variance = None

    def frame(self, step):
        noise = self.random.gauss
        values = {
            "loss": self.level * math.exp(-step / 300) * (1 + noise(0, 0.05)),
            "gradient_norm": 3.0 * math.exp(-step / 500) * math.exp(noise(0, 0.3)),
            "step_latency_ms": self.step_ms * math.exp(abs(noise(0, 0.1))),
            "forward_ms": 0.4 * self.step_ms * math.exp(abs(noise(0, 0.1))),
            "input_wait_ms": 0.02 * self.step_ms,
            "hook_latency_ms": 0.2,
            "optimizer_lr": schedule(step),
            "optimizer_lr_base": 0.1,
            "lr_scale": 1.0,
            "optimizer_momentum": 0.9,
            "gpu_mem_free_gb": 70.0 - 40 * min(step, 15) / 15,
            "gpu_util_percent": 97.0,
            "cpu_util_percent": 99.0,
            "nonfinite": 0.0,
            "kasmina.isolation.violations": 0.0,
        }
        seeds = {
            name: {
                "kasmina.seed.stage": 4.0,
                "kasmina.seed.alpha": 0.5,
                "kasmina.seed.kernel_attached": 1.0,
                "kasmina.seed.last_kernel_latency_ms": 0.01 * self.step_ms,
                "kasmina.seed.fallback_used": 0.0,
                "kasmina.seed.isolation.dot": noise(0, 0.1),
                "kasmina.seed.isolation.host_norm": 1.0,
                "kasmina.seed.isolation.seed_norm": 1.0,
            }
            for name in ("a", "b")
        }
        self.change(step, values, seeds)
        self.add_statistics(values)
        self.now_ms += values["step_latency_ms"]
        frame = {**values, "step": float(step)}
        return StepFrame("made", "one", self.rank, step, int(self.now_ms * 1e6), frame, seeds)

    def add_statistics(self, values):
        loss = values.get("loss")
        if loss is None:
            return
        if self.before is not None:
            values["loss_delta"] = loss - self.before
        self.before = loss
        difference = loss - (loss if self.mean is None else self.mean)
        self.mean = (self.mean or 0.0) + 0.2 * difference if self.mean is not None else loss
        self.variance = 0.8 * ((self.variance or 0.0) + 0.2 * difference**2)
        values["loss_ewma"], values["loss_volatility"] = self.mean, math.sqrt(self.variance)


def told(run, steps, engine=None):
    """(step, rule, seed) of every finding."""
    engine = engine or Engine(TABLE)
    return [
        (step, finding.rule, finding.seed_id)
        for step in range(steps)
        for finding in engine.observe(run.frame(step)).findings
    ]


@pytest.mark.parametrize(("step_ms", "level"), SCALES)
def test_a_healthy_run_is_left_alone(step_ms, level):
    def evaluates(step, values, seeds):
        if step % 100 == 99:
            values["step_latency_ms"] *= 40

    assert told(Made(step_ms, level, evaluates), 700) == []


def times(factor, *keys):
    def change(step, values, seeds):
        if step >= TROUBLE:
            for key in keys:
                values[key] *= factor

    return change


def instead(since=TROUBLE, **new):
    def change(step, values, seeds):
        if step >= since:
            values.update({key.replace("__", "."): value for key, value in new.items()})

    return change


def of_seed(**new):
    def change(step, values, seeds):
        if step >= TROUBLE:
            seeds["b"].update(
                {f"kasmina.seed.{key.replace('__', '.')}": value for key, value in new.items()}
            )

    return change


def counts_violations(step, values, seeds):
    values["kasmina.isolation.violations"] = float(max(0, step - TROUBLE + 1))


def is_not_finite(step, values, seeds):
    if step == TROUBLE:
        values.pop("loss")
        values["nonfinite"] = 1.0


def slows_down(step, values, seeds):
    slower = 1 + max(0, step - TROUBLE) / 100
    values["step_latency_ms"] *= slower
    values["samples_per_s"] = 64e3 / values["step_latency_ms"]


def diverges(step, values, seeds):
    """Once above all that it ever was, which was at the beginning."""
    if step >= TROUBLE:
        values["loss"] *= 1 + (step - TROUBLE + 1) / 2


def climbs(step, values, seeds):
    """Not as far as where it began."""
    if step >= TROUBLE:
        values["loss"] *= 1 + min(step - TROUBLE, 8) / 10


def shifts(step, values, seeds):
    """Another phase, which nobody has named."""
    if step >= TROUBLE:
        values["loss"] *= 1.6


def leaks(step, values, seeds):
    values["gpu_mem_free_gb"] -= 0.1 * max(0, step - TROUBLE)


def waits(step, values, seeds):
    if step >= TROUBLE:
        wait = values["step_latency_ms"]
        values["input_wait_ms"] += 2 * wait
        values["step_latency_ms"] += 2 * wait


def explodes(step, values, seeds):
    if step >= TROUBLE:
        values["gradient_norm"] *= 30
        values["loss"] *= 1.6 + (step - TROUBLE) / 20


def has_no_gradients(step, values, seeds):
    if step >= TROUBLE:
        del values["gradient_norm"]


def spikes(step, values, seeds):
    if step == TROUBLE:
        values["gradient_norm"] *= 1e4


def too_high(step, values, seeds):
    if step >= TROUBLE:
        values["optimizer_lr"] *= 6
        values["loss"] *= 1.6


def calls_slowly(step, values, seeds):
    if step >= TROUBLE:
        took = 0.6 * values["step_latency_ms"]
        seeds["b"]["kasmina.seed.last_kernel_latency_ms"] = took


TROUBLES = [
    # rule, what happens, within how many steps it is named
    ("step_latency_drift", slows_down, 165),
    ("slow_input", waits, 18),
    ("loss_spike", times(6, "loss"), 8),
    ("loss_diverging", diverges, 6),
    ("loss_climbing", climbs, 10),
    ("loss_shift", shifts, 12),
    ("loss_stuck", instead(loss=1e-6), 15),
    ("loss_fell", times(0.1, "loss"), 8),
    ("gradient_explosion", explodes, 10),
    ("gradient_spike", spikes, 1),
    ("gradient_drift", times(8, "gradient_norm"), 16),
    ("gradient_pileup", times(90, "gradient_norm"), 5),
    ("gradient_vanishing", times(1e-4, "gradient_norm"), 6),
    ("gradient_missing", has_no_gradients, 20),
    ("gradients_kept", instead(gradients_kept=1.0), 2),
    ("learning_rate_jump", times(6, "optimizer_lr"), 1),
    ("learning_rate_leap", times(50, "optimizer_lr"), 1),
    ("learning_rate_too_high", too_high, 2),
    ("momentum_jump", instead(optimizer_momentum=0.999), 1),
    ("learning_rate_collapse", times(0, "optimizer_lr"), 5),
    ("nonfinite_loss", is_not_finite, 1),
    ("weights_lost", instead(nonfinite=1.0), 3),
    ("isolation_violations", counts_violations, 1),
    ("seed_fallback", of_seed(fallback_used=1.0), 2),
    ("seed_kernel_slow", calls_slowly, 9),
    ("seed_conflict", of_seed(isolation__dot=-0.8), 3),
    ("gpu_memory_running_out", leaks, 150),
    ("device_pressure_high", instead(gpu_mem_free_gb=0.1), 3),
]


@pytest.mark.parametrize(("step_ms", "level"), SCALES)
@pytest.mark.parametrize(
    ("rule", "change", "within"), TROUBLES, ids=[trouble[0] for trouble in TROUBLES]
)
def test_trouble_is_named(rule, change, within, step_ms, level):
    found = told(Made(step_ms, level, change), TROUBLE + within)
    assert [step for step, _, _ in found if step < TROUBLE] == []
    named = [(step, seed) for step, name, seed in found if name == rule]
    assert named, f"found {found}"
    assert named[0][1] == ("b" if rule.startswith("seed_") else None)


@pytest.mark.parametrize(
    ("step_ms", "rule", "within"),
    [(0.5, "short_steps_slow", 15), (30_000.0, "step_latency_high", 5)],
)
def test_steps_that_take_long_are_named_sooner_when_they_are_long_for_anybody(
    step_ms, rule, within
):
    found = told(Made(step_ms, 1.0, times(6, "step_latency_ms")), TROUBLE + within)
    assert found == [(TROUBLE + within - 1, rule, None)]


def asked(run, steps):
    """(step, reason) of every decision that asks for anything."""
    engine = Engine(TABLE)
    decisions = (engine.observe(run.frame(step)) for step in range(steps))
    return [(one.step, one.reason) for one in decisions if one.action is not Action.CONTINUE]


@pytest.mark.parametrize("rank", range(3))
def test_batches_that_are_out_and_back_are_left_alone(rank):
    """Heavy tails: the rank is the seed of the noise."""
    source = random.Random(rank)

    def has_outliers(step, values, seeds):
        tail = max(source.random(), 1e-3) ** -0.7
        values["loss"] *= tail
        values["gradient_norm"] *= tail

    assert asked(Made(20.0, 1.0, has_outliers, rank), 2000) == []


@pytest.mark.parametrize("factor", [1.5, 3.0, 10.0])
def test_a_change_that_is_meant_is_told_and_not_acted_on(factor):
    """As to other data, or longer sequences: from there the loss falls as before."""

    def changes(step, values, seeds):
        if step >= TROUBLE:
            values["loss"] *= factor
            values["gradient_norm"] *= factor**0.5

    run = Made(20.0, 1.0, changes)
    assert asked(run, 900) == []
    rules = [rule for _, rule, _ in told(Made(20.0, 1.0, changes), 900)]
    assert rules.count("loss_shift") <= 1
    assert {*rules} <= {"loss_spike", "loss_shift"}


def test_a_loss_that_is_nearly_zero_is_compared_with_its_own_scatter():
    """A hundred times next to nothing is next to nothing, where the run does that."""
    source = random.Random(1)

    def has_fitted(step, values, seeds):
        if step >= TROUBLE:
            values["loss"] = 0.001 * math.exp(source.gauss(0, 1.5))

    assert asked(Made(20.0, 1.0, has_fitted), 1500) == []


@pytest.mark.parametrize("shift", [-60.0, -1000.0])
def test_a_loss_below_zero_is_judged_as_any_other(shift):
    """As of a log-likelihood."""

    def likelihood(step, values, seeds):
        values["loss"] += shift

    def diverges_below_zero(step, values, seeds):
        diverges(step, values, seeds)
        values["loss"] += shift

    assert told(Made(20.0, 11.0, likelihood), 1000) == []
    found = told(Made(20.0, 11.0, diverges_below_zero), TROUBLE + 9)
    assert "loss_diverging" in {rule for _, rule, _ in found}
    assert min(step for step, _, _ in found) >= TROUBLE


@pytest.mark.parametrize("step_ms", [0.5, 30_000.0])
def test_a_hook_that_takes_long_is_named_when_it_is_long_for_anybody(step_ms):
    assert told(Made(step_ms, 1.0, times(20, "hook_latency_ms")), TROUBLE + 9) == []
    found = told(Made(step_ms, 1.0, times(100, "hook_latency_ms")), TROUBLE + 6)
    assert found == [(TROUBLE + 5, "hook_budget", None)]


def test_a_seed_that_stays_in_its_stage_is_named():
    found = told(Made(10.0, 1.0), 2010)
    assert found == [(1999, "seed_stalled", "a"), (2000, "seed_stalled", "b")]


def test_a_fossil_may_stay():
    def fossilizes(step, values, seeds):
        for seed in seeds.values():
            seed["kasmina.seed.stage"] = 7.0

    assert told(Made(10.0, 1.0, fossilizes), 2010) == []


@pytest.mark.parametrize("step_ms", [0.5, 30_000.0])
@pytest.mark.parametrize("key", ["step_latency_ms", "forward_ms"])
def test_a_straggler_is_named_and_no_other_rank(step_ms, key):
    engine = Engine(TABLE)
    ranks = [
        Made(step_ms, 1.0, times(3, key) if rank == 2 else times(1, key), rank=rank)
        for rank in range(4)
    ]
    named = set()
    back = math.ceil((ARRIVAL_NS + HINDSIGHT_NS) / (step_ms * 1e6))
    for step in range(TROUBLE + 8 + back):
        for run in ranks:
            for finding in engine.observe(run.frame(step)).findings:
                # Steps of 0.5 ms have other trouble before they are old enough to compare.
                if step < TROUBLE + 8 or finding.rule == "straggler_rank":
                    named.add((run.rank, finding.rule, step >= TROUBLE + 6))
    assert named == {(2, "straggler_rank", True)}


@pytest.mark.parametrize(("step_ms", "patience_s"), [(0.5, 11), (30_000.0, 2000)])
def test_silence_is_named(step_ms, patience_s):
    engine = Engine(TABLE)
    run = Made(step_ms, 1.0)
    told(run, 100, engine)
    last = int(run.now_ms * 1e6)
    engine.tick(last + patience_s * 250_000_000)
    assert engine.latest("made").reason == "nominal"
    engine.tick(last + patience_s * 1_000_000_000)
    quiet = engine.latest("made")
    assert (quiet.action, quiet.reason) == (Action.CONTINUE, "telemetry_quiet")


def test_every_rule_that_is_not_the_prototype_s_is_tried_here():
    tried = {rule for rule, _, _ in TROUBLES}
    tried |= {"seed_stalled", "straggler_rank", "telemetry_quiet", "hook_budget"}
    tried |= {"short_steps_slow", "step_latency_high"}
    new = {rule.id for rule in TABLE.rules} - {rule.id for rule in load("prototype").rules}
    assert new <= tried
