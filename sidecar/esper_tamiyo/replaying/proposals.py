"""Seed operations that a garden proposed, as a run's log records tell them.

A trainer tells when what it proposes changes: the event of step S holds from S on, the
ask of S included, until the next such event of the same process. ``none`` withdraws.
"""

from __future__ import annotations

from bisect import bisect_right

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from esper_otel.leyline.decisions import Proposal, SeedOperation
from esper_otel.leyline.events import NO_OPERATION, PROPOSED, SEED_ID_ATTRIBUTE
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.receiving.otlp_frames import Identity, identity_of, text_of

OPERATION_ATTRIBUTE = "esper.operation"
STEP_ATTRIBUTE = "esper.step"


class Proposals:
    """What each trainer proposed, from which step on."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()
        """Operations that this version does not know; their steps count as unproposed."""
        self._told: dict[Identity, dict[int, Proposal | None]] = {}
        self._steps: dict[Identity, list[int]] = {}

    def take(self, request: ExportLogsServiceRequest) -> None:
        """Remember the proposals among the records of a request."""
        for group in request.resource_logs:
            for scope in group.scope_logs:
                for record in scope.log_records:
                    if record.event_name != PROPOSED:
                        continue
                    step = text_of(record.attributes, STEP_ATTRIBUTE)
                    if not (step.isascii() and step.isdecimal()):
                        continue
                    operation = text_of(record.attributes, OPERATION_ATTRIBUTE)
                    seed_id = text_of(record.attributes, SEED_ID_ATTRIBUTE)
                    told = self._told.setdefault(identity_of(group), {})
                    told[int(step)] = self._proposal(operation, seed_id)
        self._steps.clear()

    def at(self, frame: StepFrame) -> Proposal | None:
        """What went with the ask about ``frame``."""
        whose = Identity(frame.run, frame.rank, frame.instance)
        told = self._told.get(whose)
        if told is None:
            return None
        steps = self._steps.get(whose)
        if steps is None:
            steps = self._steps[whose] = sorted(told)
        place = bisect_right(steps, frame.step)
        return told[steps[place - 1]] if place else None

    def _proposal(self, operation: str, seed_id: str) -> Proposal | None:
        if operation == NO_OPERATION:
            return None
        try:
            return Proposal(seed_id, SeedOperation(operation))
        except ValueError:
            self.unknown.add(operation)
            return None
