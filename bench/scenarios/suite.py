"""The suite: which scenarios there are, and what counts as a right answer to each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

RECORDINGS = Path(__file__).parent / "recordings"
BEFORE = Path(__file__).parent / "before.yaml"
"""The default table before the one of now."""


class Scenario(msgspec.Struct, frozen=True, array_like=True):
    """One training: a workload, what is peculiar about it, and the seed of all randomness."""

    workload: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Also the id of its run."""
        return f"{self.workload}-{self.kind}-{self.seed:02}"

    @property
    def troubled(self) -> bool:
        """Whether something goes wrong in it."""
        return self.kind in RIGHT

    @property
    def held_out(self) -> bool:
        """Whether it must not be looked at while a table is tuned: every odd seed."""
        return self.seed % 2 == 1


_LOSS = ("loss_spike", "loss_diverging", "loss_climbing", "loss_drift", "loss_shift")
_SLOW = ("step_latency_high", "short_steps_slow", "step_latency_drift")
_DIVERGES = (
    *_LOSS,
    "gradient_explosion",
    "gradient_spike",
    "gradient_pileup",
    "gradient_drift",
    "nonfinite_loss",
)
_STANDS_STILL = ("gradient_vanishing", "gradient_missing", "loss_fell", "loss_stuck")

RIGHT: dict[str, tuple[str, ...]] = {
    "lr_times_50": (
        *_DIVERGES,
        "learning_rate_jump",
        "learning_rate_leap",
        "learning_rate_too_high",
    ),
    "lr_zero": ("learning_rate_collapse", "optimizer_hint", "loss_stuck"),
    "momentum_0999": (*_DIVERGES, "momentum_jump"),
    "nan_batch": ("nonfinite_loss",),
    "overflow": ("nonfinite_loss",),
    "labels_shuffled": _DIVERGES,
    "labels_rot": _DIVERGES,
    "inputs_corrupted": _DIVERGES,
    "gradients_scaled": _DIVERGES,
    "gradients_kept": _DIVERGES,
    "gradients_vanish": _STANDS_STILL,
    "input_stall": ("slow_input", *_SLOW),
    "step_slow": _SLOW,
    "hook_slow": ("hook_budget",),
    "sources_conflict": ("grad_conflict_high",),
    "seed_leak": ("isolation_violations",),
    "seed_fallback": ("seed_fallback",),
    "seed_slow": ("seed_kernel_slow",),
    "seed_conflict": ("seed_conflict",),
    "seed_harm": (*_DIVERGES, "seed_conflict"),
    "straggler": ("straggler_rank",),
    "quiet": ("telemetry_quiet",),
    "lr_times_10": (
        *_DIVERGES,
        "learning_rate_jump",
        "learning_rate_leap",
        "learning_rate_too_high",
    ),
    "betas_swapped": (*_DIVERGES, "momentum_jump"),
    "loss_explodes": _DIVERGES,
    "inputs_zero": (*_DIVERGES, *_STANDS_STILL),
    "inputs_times_255": _DIVERGES,
    "constant_batch": (*_DIVERGES, *_STANDS_STILL),
    "dead_parameters": _STANDS_STILL,
    "time_leak": _SLOW,
}
"""Kinds of trouble, and the rules of which one must answer.

A table need not have all of them: those that it has are the right ones.
"""

HARMFUL = frozenset(
    {
        "lr_times_10",
        "lr_times_50",
        "momentum_0999",
        "betas_swapped",
        "gradients_scaled",
        "gradients_kept",
        "nan_batch",
        "overflow",
        "loss_explodes",
    }
)
"""Kinds of trouble that ruin the weights, and that something done to the update can help."""

HEALTHY = (
    "plain",
    "warmup",
    "cosine",
    "step_decay",
    "warm_restarts",
    "one_cycle",
    "evaluations",
    "checkpoints",
    "batch_sizes",
    "small_batches",
    "micro_batches",
    "fine_tuning",
    "sources",
    "growing",
    "ranks",
)
"""Kinds of healthy runs."""


_FIRST = tuple(RIGHT)[: list(RIGHT).index("lr_times_10")]
"""Kinds of trouble of the first three workloads."""

_OF_UPDATES = (
    "lr_times_10",
    "lr_times_50",
    "lr_zero",
    "momentum_0999",
    "nan_batch",
    "overflow",
    "gradients_scaled",
    "gradients_kept",
    "gradients_vanish",
    "dead_parameters",
    "loss_explodes",
)
_OF_INPUTS = ("inputs_zero", "inputs_corrupted")
_OF_TIMES = ("step_slow", "time_leak")


class Extent(NamedTuple):
    """How much of a workload is trained.

    ``before`` steps at least come before a trouble, ``tail`` at least after its beginning;
    ``healthy`` is the length of a healthy run. ``seeds`` are recorded of each of the kinds of
    trouble ``troubled_by``, ``healthy_seeds`` of each of the kinds ``healthy_kinds``.
    """

    before: int
    tail: int
    healthy: int
    seeds: int
    healthy_seeds: int
    healthy_kinds: tuple[str, ...] = HEALTHY
    troubled_by: tuple[str, ...] = _FIRST


def _varied(
    healthy_kinds: tuple[str, ...],
    *more: str,
    without: tuple[str, ...] = (),
    seeds: int = 4,
    healthy_seeds: int = 6,
) -> Extent:
    """Of a workload of short steps: its healthy kinds, troubles that not all have, and those
    of all ``without`` which it does."""
    kinds = (*_OF_UPDATES, *_OF_INPUTS, *_OF_TIMES, *more)
    return Extent(
        before=150,
        tail=80,
        healthy=1000,
        seeds=seeds,
        healthy_seeds=healthy_seeds,
        healthy_kinds=healthy_kinds,
        troubled_by=tuple(kind for kind in kinds if kind not in without),
    )


EXTENTS: dict[str, Extent] = {
    "digits": Extent(before=150, tail=120, healthy=800, seeds=10, healthy_seeds=14),
    "prose": Extent(before=110, tail=70, healthy=220, seeds=10, healthy_seeds=10),
    "restore": Extent(before=44, tail=26, healthy=72, seeds=4, healthy_seeds=4),
    "heavytail": _varied(
        ("plain", "cosine", "batch_sizes", "small_batches"),
        "inputs_times_255",
        "input_stall",
        "constant_batch",
        # Such noise hides what its inputs say: these show in no metric.
        without=_OF_INPUTS,
    ),
    "curriculum": _varied(
        ("plain", "warmup", "batch_sizes"),
        "betas_swapped",
        "labels_shuffled",
        "input_stall",
        "constant_batch",
        # Clipped at every step, gradients that are kept are no more than momentum.
        without=("gradients_kept",),
        seeds=2,
        healthy_seeds=4,
    ),
    "alternating": _varied(
        ("plain", "step_decay", "batch_sizes", "micro_batches"),
        "betas_swapped",
        "labels_shuffled",
        "inputs_times_255",
        "constant_batch",
    ),
    "policy": _varied(
        ("plain", "warmup", "cosine"),
        "betas_swapped",
        "inputs_times_255",
        "constant_batch",
        seeds=2,
        healthy_seeds=4,
    ),
    "gan": _varied(
        ("plain", "cosine", "batch_sizes"),
        "betas_swapped",
        "inputs_times_255",
        seeds=2,
        healthy_seeds=4,
    ),
    "dqn": _varied(
        ("plain", "cosine", "warm_restarts"),
        "betas_swapped",
        "inputs_times_255",
        "constant_batch",
    ),
    "finetune": _varied(
        ("plain", "warmup", "warm_restarts"),
        "labels_shuffled",
        "inputs_times_255",
        "constant_batch",
    ),
    "triplet": _varied(
        ("plain", "cosine", "small_batches"),
        "betas_swapped",
        "inputs_times_255",
        "constant_batch",
    ),
    "vae": _varied(
        ("plain", "batch_sizes", "warm_restarts"), "betas_swapped", "constant_batch"
    ),
    "embedding": _varied(
        ("plain", "cosine", "batch_sizes"), "labels_shuffled", "constant_batch"
    ),
}


def scenarios() -> Iterator[Scenario]:
    """All of them; cheap workloads first, and every kind of a seed before the next seed."""
    for workload, extent in EXTENTS.items():
        for seed in range(max(extent.seeds, extent.healthy_seeds)):
            if seed < extent.healthy_seeds:
                yield from (Scenario(workload, kind, seed) for kind in extent.healthy_kinds)
            if seed < extent.seeds:
                yield from (Scenario(workload, kind, seed) for kind in extent.troubled_by)


def path(scenario: Scenario, folder: Path = RECORDINGS) -> Path:
    """The file in which it is recorded, with all others of its workload and seed."""
    return folder / f"{scenario.workload}-{scenario.seed:02}.tapes"
