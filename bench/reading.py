"""What it costs the receiver to turn OTLP bytes into frames: read by shape against parsed.

64 trainers send 25 steps of 24 metrics each, again and again, as :mod:`bench.fleet` does; half
of the requests are read with what earlier ones have taught, half as if nothing were known,
which is parsing by the official classes. From the bytes of a request to frames packed for the
pipe, in CPU time of the thread, in turn in one process; both give the same frames.

    python -m bench.reading [--json PATH]
"""

from __future__ import annotations

import time

from bench.figures import Figure, alternate, median, run
from bench.roundtrip_peers import FRAME, Trainer
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.receiving import otlp_frames
from esper_tamiyo.receiving.harvest import Harvest
from esper_tamiyo.receiving.otlp_frames import Known
from esper_tamiyo.receiving.pipe import Inlet, frame, pack
from esper_tamiyo.receiving.shapes import KnownShapes
from esper_tamiyo.receiving.staleness import StalenessFilter

BENCH = "reading"
TRAINERS, STEPS, BLOCKS = 64, 25, 15
POINTS = STEPS * len(FRAME)
BAR = 500_000


def records(packed: list[bytes]) -> list[StepFrame]:
    """What the decide process has of it."""
    return [frame(body) for message in packed for _, body in Inlet().feed(message)]


class NothingKnown(KnownShapes):
    """Learns nothing: each part has to be parsed."""

    def read(self, data: bytes, begin: int, end: int) -> None:
        """None."""


def figures() -> list[Figure]:
    """All rows of this bench."""
    trainers = [Trainer("fleet", rank, STEPS) for rank in range(TRAINERS)]
    known, unknown = Known(), Known()
    unknown.shapes = NothingKnown()

    def taken(by: Known, requests: list[bytes], is_old: StalenessFilter) -> list[bytes]:
        packed = []
        for data in requests:
            harvest = Harvest.of_request()
            for _ in otlp_frames.gather(data, harvest, is_old.is_old, by):
                pass
            packed += [pack(one) for one in harvest.frames]
        return packed

    def points_per_s(by: Known, is_old: StalenessFilter) -> float:
        requests = [trainer.request() for trainer in trainers]
        began = time.thread_time()
        taken(by, requests, is_old)
        return len(requests) * POINTS / (time.thread_time() - began)

    requests = [trainer.request() for trainer in trainers]
    for _ in range(2):
        once = taken(known, requests, StalenessFilter())
    again = taken(unknown, requests, StalenessFilter())
    if records(once) != records(again):
        raise AssertionError("the two ways read different frames")
    filters = StalenessFilter(), StalenessFilter()
    by_shape, parsed = alternate(
        lambda: points_per_s(known, filters[0]),
        lambda: points_per_s(unknown, filters[1]),
        BLOCKS,
    )
    fastest = median(by_shape)
    return [
        Figure.report(
            BENCH, "points read per second of CPU, over parsing", fastest, "/s", median(parsed)
        ),
        Figure.at_most(BENCH, f"CPU for {BAR:,} points", BAR / fastest, "s", bar=1.0),
    ]


if __name__ == "__main__":
    raise SystemExit(run(figures))
