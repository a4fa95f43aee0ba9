"""Seed: the data of one small network, from germination to its end."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from math import nan

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_otel.kasmina.blending import AlphaSchedule
from esper_otel.kasmina.isolation import Statistics
from esper_otel.leyline.frames import ABSENT, Value, delivered, seed_row
from esper_otel.leyline.metrics import SEED_SLOT
from esper_otel.leyline.stages import Stage

_STAGE = SEED_SLOT["kasmina.seed.stage"]
_ALPHA = SEED_SLOT["kasmina.seed.alpha"]
_ALPHA_STEPS = SEED_SLOT["kasmina.seed.alpha_steps"]
_ATTACHED = SEED_SLOT["kasmina.seed.kernel_attached"]
_LATENCY = SEED_SLOT["kasmina.seed.last_kernel_latency_ms"]
_VIOLATIONS = SEED_SLOT["kasmina.seed.isolation_violations"]
_FALLBACK = SEED_SLOT["kasmina.seed.fallback_used"]
_DOT = SEED_SLOT["kasmina.seed.isolation.dot"]
_HOST_NORM = SEED_SLOT["kasmina.seed.isolation.host_norm"]
_SEED_NORM = SEED_SLOT["kasmina.seed.isolation.seed_norm"]
_STATISTICS = (_DOT, _HOST_NORM, _SEED_NORM)


MAX_PENDING = 8
"""Steps of which a device may still have something to say; beyond it the oldest are let go."""

Read = Callable[[Tensor], Value]
"""Begins to read a 0-d tensor, without waiting for a device."""


class Seed:
    """What a garden knows of one seed; the slot has its module.

    ``rng_seed`` is the number its parameters are made from, so that the same run makes the
    same seeds.
    """

    __slots__ = (
        "_finite_checks",
        "_measuring",
        "_norm",
        "_pending",
        "_row",
        "alpha_schedule",
        "alpha_steps",
        "attempts",
        "blueprint",
        "faults_in_a_row",
        "gates",
        "harmful_steps",
        "id",
        "kernel_ms",
        "loss_before",
        "optimizer",
        "params_finite",
        "rng_seed",
        "shut_steps",
        "step_ms_before",
        "train_steps",
        "trouble",
        "violations",
        "violations_in_a_row",
    )

    def __init__(self, seed_id: str, blueprint: str, rng_seed: int) -> None:
        self.id = seed_id
        self.blueprint = blueprint
        self.rng_seed = rng_seed
        self.optimizer: Optimizer | None = None
        self.attempts = 1
        """Times its kernel was asked for."""
        self.alpha_schedule: AlphaSchedule | None = None
        """How its alpha rises, from when it begins to blend."""
        self.alpha_steps = 0
        self.violations = 0
        self.violations_in_a_row = 0
        self.faults_in_a_row = 0
        """Steps in a row in which identity took the place of its kernel."""
        self.params_finite: Value = nan
        """1.0 when all its parameters were finite as they came, 0.0 when they were not."""
        self.trouble = ""
        """Why its kernel never came; empty when it did or still may."""
        self.kernel_ms = nan
        self._norm = nan
        self._measuring: Value | None = None
        self.loss_before = nan
        self.step_ms_before = nan
        self.gates: dict[str, str] = {}
        """Gate → why it is shut, empty when open; as last reported."""
        self.train_steps = 0
        """Steps of its optimizer so far."""
        self.harmful_steps = 0
        """Steps in a row in which the loss was higher than a joining seed may make it."""
        self.shut_steps = 0
        """Steps in a row in which a gate has kept it from going on."""
        self._pending: deque[list[Value]] = deque(maxlen=MAX_PENDING)
        self._finite_checks: deque[Value] = deque(maxlen=MAX_PENDING)
        self._row = seed_row()

    @property
    def norm(self) -> float:
        """L2 norm of its gradients, the newest that has arrived; NaN before the first."""
        self._take_norm()
        return self._norm

    @norm.setter
    def norm(self, norm: float) -> None:
        self._norm, self._measuring = norm, None

    def step_optimizer(self, measure: Read | None, *, hold: bool) -> None:
        """One step of its optimizer, unless it is on ``hold``; its gradients go.

        With ``measure`` the gradient norm is read first, unless one is still on its way:
        a new one at each step would let none of them arrive.
        """
        optimizer = self.optimizer
        if optimizer is None:
            return
        if measure is not None:
            gradients = [
                parameter.grad
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            ]
            if not gradients:
                self.norm = 0.0
            elif self._take_norm():
                self._measuring = measure(norm_of(gradients))
        if not hold:
            optimizer.step()
            self.train_steps += 1
        optimizer.zero_grad(set_to_none=True)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What its optimizer trains."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"]]

    @property
    def is_fully_blended(self) -> bool:
        """Whether its alpha has come to the end of its schedule, or has none."""
        schedule = self.alpha_schedule
        return schedule is None or self.alpha_steps >= schedule.steps

    def next_alpha(self) -> float | None:
        """Go one step on in its schedule; returns the new alpha, None at the end."""
        schedule = self.alpha_schedule
        if schedule is None or self.is_fully_blended:
            return None
        self.alpha_steps += 1
        return schedule.alpha(self.alpha_steps)

    def add_statistics(self, statistics: Statistics, read: Read) -> None:
        """Begin to read the isolation statistics of the step."""
        self._pending.append([read(each) for each in statistics])

    def add_finite_check(self, finite: Value) -> None:
        """Note whether its outputs of this step were finite, which a device may have to say."""
        self._finite_checks.append(finite)

    def saw_nonfinite(self) -> bool | None:
        """Whether an output that a device has judged by now was not finite.

        None when nothing has arrived since last asked. Waits for nothing, so on a device
        it tells of a step before this one.
        """
        found: bool | None = None
        while self._finite_checks and (number := delivered(self._finite_checks[0])) is not None:
            self._finite_checks.popleft()
            if number == number:
                found = bool(found) or number == 0.0
        return found

    def row(self, stage: Stage, alpha: float, attached: bool, fell_back: bool) -> list[float]:
        """Its values at the end of a step, in registry order; a list of its own."""
        row = self._row
        row[_STAGE] = float(stage)
        row[_ALPHA] = alpha
        row[_ALPHA_STEPS] = float(self.alpha_steps) if stage is Stage.BLENDING else ABSENT
        row[_ATTACHED] = float(attached)
        row[_LATENCY] = self.kernel_ms if self.kernel_ms == self.kernel_ms else 0.0
        row[_VIOLATIONS] = float(self.violations)
        row[_FALLBACK] = float(fell_back)
        if self._pending:
            self._put_statistics(row)
            reported = row[:]
            row[_DOT] = row[_HOST_NORM] = row[_SEED_NORM] = ABSENT
            return reported
        return row[:]

    def _take_norm(self) -> bool:
        """Take the norm if it has arrived; whether none is on its way now."""
        if self._measuring is not None:
            number = delivered(self._measuring)
            if number is None:
                return False
            self._norm, self._measuring = number, None
        return True

    def _put_statistics(self, row: list[float]) -> None:
        """All three of the newest step that have arrived, and once only."""
        while self._pending:
            numbers = [delivered(value) for value in self._pending[0]]
            if None in numbers:
                return
            self._pending.popleft()
            for slot, number in zip(_STATISTICS, numbers, strict=True):
                row[slot] = ABSENT if number is None else number


def read_cpu(tensor: Tensor) -> Value:
    """Reads what lies on the CPU; what a device holds stays unknown."""
    return float(tensor.detach()) if tensor.device.type == "cpu" else nan


def norm_of(gradients: list[Tensor]) -> Tensor:
    """L2 norm over all elements of all ``gradients``, 0-d, on the device of the first."""
    with torch.no_grad():
        norms = torch.stack([torch.linalg.vector_norm(each.float()) for each in gradients])
        norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def rng_seed_of(seed_id: str, rng_root: int) -> int:
    """A number for a seed, the same in every run whose garden has the same ``rng_root``."""
    return (zlib.crc32(seed_id.encode()) ^ rng_root) & 0x7FFF_FFFF


def all_finite(parameters: list[nn.Parameter]) -> Tensor:
    """Whether all elements of all ``parameters`` are finite, 0-d, on their device."""
    with torch.no_grad():
        return torch.stack([torch.isfinite(each).all() for each in parameters]).all()
