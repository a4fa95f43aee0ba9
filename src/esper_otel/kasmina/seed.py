"""A seed: one small network from germination to its end, and what it tells of itself."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from math import nan
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_otel.kasmina.isolation import Statistics
from esper_otel.kasmina.schedules import Course
from esper_otel.leyline.frames import ABSENT, seed_row
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


class Reading(Protocol):
    """A number that a device still has to deliver."""

    def ready(self) -> bool:
        """Whether it has arrived; never waits for it."""

    def value(self) -> float | None:
        """The number; None when it has been lost or is not here yet."""


MOST_WATCHED = 8
"""Steps of which a device may still have something to say; beyond it the oldest are let go."""

Value = float | Reading
Read = Callable[[Tensor], Value]
"""Begins to read a 0-d tensor, without waiting for a device."""


class Seed:
    """What a garden knows of one seed; the slot has its module.

    ``origin`` is the number its parameters are made from, so that the same run makes the
    same seeds.
    """

    __slots__ = (
        "_measuring",
        "_norm",
        "_pending",
        "_row",
        "_watched",
        "alpha_steps",
        "attempts",
        "blueprint",
        "course",
        "faults_in_a_row",
        "gates",
        "harmful_steps",
        "id",
        "kernel_ms",
        "lessons",
        "loss_before",
        "optimizer",
        "origin",
        "sane",
        "shut_steps",
        "step_ms_before",
        "trouble",
        "violations",
        "violations_in_a_row",
    )

    def __init__(self, seed_id: str, blueprint: str, origin: int) -> None:
        self.id = seed_id
        self.blueprint = blueprint
        self.origin = origin
        self.optimizer: Optimizer | None = None
        self.attempts = 1
        """Times its kernel was asked for."""
        self.course: Course | None = None
        """How its alpha rises, from when it begins to blend."""
        self.alpha_steps = 0
        self.violations = 0
        self.violations_in_a_row = 0
        self.faults_in_a_row = 0
        """Steps in a row in which identity took the place of its kernel."""
        self.sane: Value = nan
        """1.0 when all its parameters were finite as they came, 0.0 when they were not."""
        self.trouble = ""
        """Why its kernel never came; empty when it did or still may."""
        self.kernel_ms = nan
        self._norm = nan
        self._measuring: Value | None = None
        self.loss_before = nan
        self.step_ms_before = nan
        self.gates: dict[str, str] = {}
        """Gate → why it is shut, empty when open; as last told."""
        self.lessons = 0
        """Steps of its optimizer so far."""
        self.harmful_steps = 0
        """Steps in a row in which the loss was higher than a joining seed may make it."""
        self.shut_steps = 0
        """Steps in a row in which a gate has kept it from going on."""
        self._pending: deque[list[Value]] = deque(maxlen=MOST_WATCHED)
        self._watched: deque[Value] = deque(maxlen=MOST_WATCHED)
        self._row = seed_row()

    @property
    def norm(self) -> float:
        """L2 norm of its gradients, the newest that has arrived; NaN before the first."""
        self._take_norm()
        return self._norm

    @norm.setter
    def norm(self, norm: float) -> None:
        self._norm, self._measuring = norm, None

    def learn(self, measure: Read | None, *, hold: bool) -> None:
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
            self.lessons += 1
        optimizer.zero_grad(set_to_none=True)

    def told(self, statistics: Statistics, read: Read) -> None:
        """Begin to read the isolation statistics of the step."""
        self._pending.append([read(each) for each in statistics])

    def watch(self, finite: Value) -> None:
        """Whether its outputs of this step were finite is known to a device only, so far."""
        self._watched.append(finite)

    def was_unsound(self) -> bool | None:
        """Whether an output that a device has judged by now was not finite.

        None when nothing has arrived since last asked. Waits for nothing, so on a device
        it tells of a step before this one.
        """
        found: bool | None = None
        while self._watched and (number := _number(self._watched[0])) is not None:
            self._watched.popleft()
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
            told = row[:]
            row[_DOT] = row[_HOST_NORM] = row[_SEED_NORM] = ABSENT
            return told
        return row[:]

    def _take_norm(self) -> bool:
        """Take the norm if it has arrived; whether none is on its way now."""
        if self._measuring is not None:
            number = _number(self._measuring)
            if number is None:
                return False
            self._norm, self._measuring = number, None
        return True

    def _put_statistics(self, row: list[float]) -> None:
        """All three of the newest step that have arrived, and once only."""
        while self._pending:
            numbers = [_number(value) for value in self._pending[0]]
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


def origin_of(seed_id: str, root: int) -> int:
    """A number for a seed, the same in every run whose garden has the same ``root``."""
    return (zlib.crc32(seed_id.encode()) ^ root) & 0x7FFF_FFFF


def finite(parameters: list[nn.Parameter]) -> Tensor:
    """Whether all elements of all ``parameters`` are finite, 0-d, on their device."""
    with torch.no_grad():
        return torch.stack([torch.isfinite(each).all() for each in parameters]).all()


def known(value: Value) -> float:
    """A number, NaN while a device has not delivered it or has lost it."""
    if isinstance(value, float):
        return value
    number = value.value()
    return nan if number is None else number


def _number(value: Value) -> float | None:
    """The number; NaN where it was lost, None while it is on its way."""
    if isinstance(value, float):
        return value
    if not value.ready():
        return None
    number = value.value()
    return nan if number is None else number
