"""Recorder: trains a scenario and keeps what a sidecar would have heard of it."""

from __future__ import annotations

import os
import random
import warnings
from functools import partial

import numpy as np
import torch

from bench.scenarios import healthy, seeds, troubles
from bench.scenarios.ranks import Ranks, Straggler, in_ranks
from bench.scenarios.recordings import Columns, Recorded, Wish, ordered
from bench.scenarios.registry import workload_of
from bench.scenarios.suite import EXTENTS, HEALTHY, RIGHT, Scenario
from bench.scenarios.tape import Heard, Tape
from bench.scenarios.training import Course, SeveralSources, Training, train
from esper_otel.leyline.decisions import Proposal
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS

COURSES: dict[str, type[Course]] = {
    "plain": Course,
    "warmup": healthy.Warmup,
    "cosine": healthy.Cosine,
    "step_decay": healthy.StepDecay,
    "warm_restarts": healthy.WarmRestarts,
    "one_cycle": healthy.OneCycle,
    "evaluations": healthy.Evaluations,
    "checkpoints": healthy.Checkpoints,
    "batch_sizes": healthy.BatchSizes,
    "small_batches": healthy.SmallBatches,
    "micro_batches": healthy.MicroBatches,
    "fine_tuning": healthy.FineTuning,
    "sources": SeveralSources,
    "growing": seeds.Growing,
    "ranks": Ranks,
    "lr_times_50": troubles.RateTimes50,
    "lr_zero": troubles.RateZero,
    "momentum_0999": troubles.TooMuchMomentum,
    "nan_batch": troubles.NanBatch,
    "overflow": troubles.Overflow,
    "labels_shuffled": troubles.LabelsShuffled,
    "labels_rot": troubles.LabelsRot,
    "inputs_corrupted": troubles.InputsCorrupted,
    "gradients_scaled": troubles.GradientsScaled,
    "gradients_kept": troubles.GradientsKept,
    "gradients_vanish": troubles.GradientsVanish,
    "input_stall": troubles.InputStall,
    "step_slow": troubles.StepSlow,
    "hook_slow": troubles.HookSlow,
    "sources_conflict": troubles.SourcesConflict,
    "seed_leak": seeds.Leak,
    "seed_fallback": seeds.Fallback,
    "seed_slow": seeds.SlowKernel,
    "seed_conflict": seeds.InConflict,
    "seed_harm": seeds.Harm,
    "straggler": Straggler,
    "quiet": troubles.Quiet,
    "lr_times_10": troubles.RateTimes10,
    "betas_swapped": troubles.BetasSwapped,
    "loss_explodes": troubles.LossExplodes,
    "inputs_zero": troubles.InputsZero,
    "inputs_times_255": troubles.InputsTimes255,
    "constant_batch": troubles.ConstantBatch,
    "dead_parameters": troubles.DeadParameters,
    "time_leak": troubles.TimeLeak,
}


def record(scenario: Scenario) -> list[Recorded]:
    """Train ``scenario`` and return what was heard of each of its ranks.

    Raises ``RuntimeError`` when its trouble did not come about.
    """
    ranks = COURSES[scenario.kind].ranks
    if ranks == 1:
        return [record_rank(scenario, 0)]
    return in_ranks(ranks, partial(record_rank, scenario))


def record_rank(scenario: Scenario, rank: int) -> Recorded:
    """Train one rank of ``scenario``, in this process and on one thread."""
    for signal in ("METRICS", "TRACES", "LOGS"):
        os.environ[f"OTEL_{signal}_EXPORTER"] = "none"
    torch.set_num_threads(1)
    torch.manual_seed(100 * rank + scenario.seed)
    extent = EXTENTS[scenario.workload]
    peculiar = COURSES[scenario.kind]
    at, steps = None, extent.healthy // peculiar.ranks
    if scenario.troubled:
        # Not always at the same step, which might be the same moment of an epoch.
        at = extent.before + random.Random(scenario.name).randrange(extent.before // 3)
        steps = at + max(extent.tail, peculiar.lasts)
    work = workload_of(scenario)
    course = peculiar()
    before = os.getloadavg()[0]
    tape = Tape(scenario.name)
    with warnings.catch_warnings():
        # Of torch, about schedulers and what is called otherwise in its next release.
        warnings.simplefilter("ignore")
        course.prepare(work, steps)
        training = Training(work, steps, at, tape)
        train(training, course)
    if scenario.troubled and training.at is None:
        raise RuntimeError(f"{scenario.name}: the trouble did not come about")
    if len(tape.heard) != steps:
        raise RuntimeError(f"{scenario.name}: {len(tape.heard)} of {steps} steps were heard")
    load = before, os.getloadavg()[0]
    return told(scenario, tape.heard, training.at, load, rank, course.ranks)


def told(
    scenario: Scenario,
    heard: list[Heard],
    at: int | None,
    load: tuple[float, float],
    rank: int,
    world_size: int,
) -> Recorded:
    """What was heard, as columns."""
    ids: dict[str, int] = {}
    frames, numbers, seed_rows = [], [], []
    for place, ask in enumerate(heard):
        for seed_id, row in ask.seeds:
            frames.append(place)
            numbers.append(ids.setdefault(seed_id, len(ids)))
            seed_rows.append(row)
    return Recorded(
        scenario=scenario,
        rank=rank,
        world_size=world_size,
        at=at,
        load=(round(load[0], 2), round(load[1], 2)),
        times=np.array([ask.time_unix_nano for ask in heard], np.int64),
        steps=_columns(STEP_KEYS, [ask.row for ask in heard]),
        seed_ids=list(ids),
        seed_frames=np.array(frames, np.int64),
        seed_numbers=np.array(numbers, np.int64),
        seeds=_columns(SEED_KEYS, seed_rows),
        wishes=_wishes([ask.proposal for ask in heard]),
    )


def _columns(keys: tuple[str, ...], rows: list[list[float]]) -> Columns:
    if not rows:
        return {}
    table = np.array(rows, np.float64)
    table[~np.isfinite(table)] = np.nan  # as StepFrame does: what is not finite is absent
    return ordered({key: table[:, place].copy() for place, key in enumerate(keys)})


def _wishes(proposals: list[Proposal | None]) -> list[Wish]:
    wishes: list[Wish] = []
    first = 0
    for place in range(1, len(proposals) + 1):
        if place < len(proposals) and proposals[place] == proposals[first]:
            continue
        proposal = proposals[first]
        if proposal is not None:
            wishes.append(Wish(first, place, proposal))
        first = place
    return wishes


assert set(COURSES) == {*RIGHT, *HEALTHY}
