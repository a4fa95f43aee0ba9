"""The suite: which scenarios there are, and what counts as a right answer to each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

RECORDINGS = Path(__file__).parent / "recordings"


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


class Extent(NamedTuple):
    """How much of a workload is trained.

    ``before`` steps at least come before a trouble, ``tail`` at least after its beginning;
    ``healthy`` is the length of a healthy run. ``seeds`` are recorded of each kind of
    trouble, ``healthy_seeds`` of each kind of healthy run.
    """

    before: int
    tail: int
    healthy: int
    seeds: int
    healthy_seeds: int


EXTENTS: dict[str, Extent] = {
    "digits": Extent(before=150, tail=120, healthy=800, seeds=10, healthy_seeds=14),
    "prose": Extent(before=110, tail=70, healthy=220, seeds=10, healthy_seeds=10),
    "restore": Extent(before=44, tail=26, healthy=72, seeds=4, healthy_seeds=4),
}

_LOSS = ("loss_spike", "loss_diverging", "loss_drift")
_SLOW = ("step_latency_high", "short_steps_slow", "step_latency_drift")
_DIVERGES = (*_LOSS, "gradient_explosion", "gradient_spike", "gradient_drift")

RIGHT: dict[str, tuple[str, ...]] = {
    "lr_times_50": (*_DIVERGES, "learning_rate_jump", "learning_rate_too_high"),
    "lr_zero": ("learning_rate_collapse", "optimizer_hint"),
    "momentum_0999": (*_DIVERGES, "momentum_jump"),
    "nan_batch": ("nonfinite_loss",),
    "overflow": ("nonfinite_loss",),
    "labels_shuffled": _DIVERGES,
    "labels_rot": _DIVERGES,
    "inputs_corrupted": _DIVERGES,
    "gradients_scaled": _DIVERGES,
    "gradients_kept": _DIVERGES,
    "gradients_vanish": ("gradient_vanishing",),
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
}
"""Kinds of trouble, and the rules of which one must answer."""

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


def scenarios() -> Iterator[Scenario]:
    """All of them; cheap workloads first, and every kind of a seed before the next seed."""
    for workload, extent in EXTENTS.items():
        for seed in range(max(extent.seeds, extent.healthy_seeds)):
            if seed < extent.healthy_seeds:
                yield from (Scenario(workload, kind, seed) for kind in HEALTHY)
            if seed < extent.seeds:
                yield from (Scenario(workload, kind, seed) for kind in RIGHT)


def path(scenario: Scenario, folder: Path = RECORDINGS) -> Path:
    """The file in which it is recorded, with all others of its workload and seed."""
    return folder / f"{scenario.workload}-{scenario.seed:02}.tapes"
