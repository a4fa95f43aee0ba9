"""Requests as they were recorded, back to steps in the order in which they happened.

A Collector cuts requests where it likes, also inside a step, and writes one rank after
the other. So steps are held until the recording is :data:`HORIZON_NS` past them: by then
what belongs to a step has joined it, and the ranks can go in order of time, as they did
when each of them asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.receiving.otlp_frames import (
    Harvest,
    Identity,
    Moment,
    identity_of,
    moments_of,
)

HORIZON_NS = 10_000_000_000
"""More than senders and Collectors wait before they send what they have."""

FOREVER = 1 << 64

MAX_HELD = 100_000
"""Steps held at most, whatever their times say."""


class Assembly:
    """Takes requests, gives frames. ``tally`` counts the points of all requests."""

    def __init__(self, horizon_ns: int = HORIZON_NS) -> None:
        self.tally = Harvest([])
        self._horizon_ns = horizon_ns
        self._held: dict[Identity, dict[int, Moment]] = {}
        self._due: list[tuple[int, Identity]] = []
        self._past = 0

    def take(self, request: ExportMetricsServiceRequest) -> Iterator[StepFrame]:
        """The frames that are complete now, by their time."""
        times: list[int] = []
        for group in request.resource_metrics:
            whose = identity_of(group)
            held = self._held.setdefault(whose, {})
            for time_unix_nano, moment in moments_of(group, self.tally).items():
                times.append(time_unix_nano)
                known = held.get(time_unix_nano)
                if known is not None:
                    known.join(moment)
                    continue
                held[time_unix_nano] = moment
                heappush(self._due, (time_unix_nano, whose))
        if times:
            # The oldest and not the newest of them: a request may hold much of one rank.
            self._past = max(self._past, min(times) - self._horizon_ns)
        yield from self._until(self._past)

    def rest(self) -> Iterator[StepFrame]:
        """The frames that are left when no more requests come."""
        yield from self._until(FOREVER)

    def _until(self, time_unix_nano: int) -> Iterator[StepFrame]:
        due = self._due
        while due and (due[0][0] <= time_unix_nano or len(due) > MAX_HELD):
            time, whose = heappop(due)
            moment = self._held[whose].pop(time)
            frame = moment.frame(whose, time)
            if frame is None:
                self.tally.unusable += moment.points
                continue
            self.tally.used += moment.points
            yield frame
