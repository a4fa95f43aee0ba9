"""Garden calls: the recorder's side of a garden, and the response to its failures.

A garden grows seeds inside the model (:mod:`esper_otel.kasmina`). Whatever it raises stays
here: the step is then recorded as if no garden had been planted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import nan
from time import perf_counter_ns
from typing import Any

from esper_otel.leyline.decisions import Decision
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import GardenFrame
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.tolaria.ports import GardenPort
from esper_otel.tolaria.step import StepUnderWay

log = logging.getLogger("esper_otel")

_VIOLATIONS = STEP_SLOT["kasmina.isolation.violations"]
_FETCH = STEP_SLOT["kasmina.kernel_fetch_ms"]
_LIVE = STEP_SLOT["kasmina.seeds_live"]

BARE = GardenFrame([], nan, nan, nan)
"""What a garden that failed has to say."""


class SafeGarden:
    """Calls a garden at its moments, within a step of the training thread."""

    __slots__ = ("_garden", "_told")

    def __init__(self, garden: GardenPort) -> None:
        self._garden = garden
        self._told = False

    @property
    def garden(self) -> GardenPort:
        """Whose garden it is."""
        return self._garden

    @property
    def over(self) -> bool:
        """Whether the garden was uprooted."""
        return not self._garden.planted

    def train_seeds(self, optimizer: Any, step: StepUnderWay) -> None:
        """Let the seeds' optimizers step, as a part of ``step``."""
        began = perf_counter_ns()
        try:
            self._garden.learn(optimizer)
        except Exception:
            self._trouble()
        ended = perf_counter_ns()
        step.optimizer_ns += ended - began
        step.phases.append(("train.seeds", began, ended))

    def finalize(self, step: int, latest: Sequence[float]) -> GardenFrame:
        """The garden's frame of ``step``."""
        try:
            return self._garden.finalize(step, latest)
        except Exception:
            self._trouble()
            return BARE

    def put_frame(
        self, row: list[float], number: int, latest: Sequence[float], step: StepUnderWay
    ) -> tuple[GardenFrame, float]:
        """Put what the garden says of step ``number`` into ``row``, as a part of ``step``.

        Returns the garden's frame, and how many milliseconds it took.
        """
        began = perf_counter_ns()
        frame = self.finalize(number, latest)
        row[_VIOLATIONS] = frame.violations
        row[_LIVE] = frame.live
        row[_FETCH] = frame.fetch_ms
        finalized = perf_counter_ns()
        step.phases.append(("kasmina.finalize", began, finalized))
        return frame, (finalized - began) / 1e6

    def proposal_sent(self, step: int) -> None:
        """The garden's proposal went with the ask about ``step``."""
        try:
            self._garden.proposal_sent(step)
        except Exception:
            self._trouble()

    def act_on(self, decision: Decision, *, enforced: bool) -> bool:
        """Whether the garden did something about the decision."""
        try:
            return self._garden.apply(decision, enforced=enforced)
        except Exception:
            self._trouble()
            return False

    def events(self, step: int, offset: int) -> list[Event]:
        """What happened in ``step``, its marks made Unix times by adding ``offset``.

        An event that says itself which step it is about is left to it.
        """
        try:
            events = self._garden.take_events()
        except Exception:
            self._trouble()
            return []
        return [
            event._replace(
                mark=event.mark + offset, attributes={"esper.step": step, **event.attributes}
            )
            for event in events
        ]

    def _trouble(self) -> None:
        if not self._told:
            self._told = True
            log.exception("the garden failed at a step; the run continues")
