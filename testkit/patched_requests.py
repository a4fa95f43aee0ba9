"""Requests that are made once, and sent again and again with other times and values.

Benches of receivers share their processors with what sends to them. To serialise a step costs
as much as to receive it, to write sixteen bytes of each of its points next to nothing: what the
receiver gets is the same, and what is measured is its own work.

As a program, many ranks of a run that send each step in a request, over a connection of their
own. It prints a line when it is ready, begins when it reads one, and prints what became of the
steps, as JSON.

    python -m testkit.patched_requests URL --ranks 64 --steps 300
"""

from __future__ import annotations

import argparse
import re
import selectors
import socket
import sys
import time
from collections import deque
from struct import pack
from urllib.parse import urlsplit

import msgspec
import numpy as np
import numpy.typing as npt

from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import SEED_KEYS
from esper_otel.stream.encoding import FrameEncoder
from esper_otel.stream.providers import serialised_resource, trainer_resource
from esper_otel.stream.ring import FrameRing

MARK = 0x1111111111111111
"""The time of a point whose place is to be found."""

END_S = 20.0
"""Longest that the last answers are waited for."""


class PatchedRequest:
    """An OTLP request whose points all have the time :data:`MARK` and a double."""

    def __init__(self, body: bytes) -> None:
        found = [match.start() for match in re.finditer(re.escape(pack("<Q", MARK)), body)]
        self._bytes = np.frombuffer(bytearray(body), np.uint8)
        self._times = np.add.outer(np.array(found), np.arange(8))
        self._values = self._times + 9  # behind the time and the key of the value
        self.values: npt.NDArray[np.float64] = (
            self._bytes[self._values].copy().view("<f8")[:, 0]
        )
        """Of each point, in order; to be changed in place."""

    def request(self, times_unix_nano: npt.NDArray[np.int64] | int) -> bytes:
        """The request with its values at these times, one for each point or one for all."""
        times = np.empty(len(self.values), "<i8")
        times[:] = times_unix_nano
        self._bytes[self._times] = times.view(np.uint8).reshape(-1, 8)
        self._bytes[self._values] = self.values.view(np.uint8).reshape(-1, 8)
        return self._bytes.tobytes()


class PatchedRank:
    """A rank whose steps are of one shape, as the real stream encodes them."""

    def __init__(self, run: str, rank: int, world_size: int, metrics: int, seeds: int) -> None:
        row = step_row()
        row[:metrics] = [column / 100 for column in range(metrics)]
        grown = [
            (f"slot{number}-1", [number + column / 100 for column in range(len(SEED_KEYS))])
            for number in range(seeds)
        ]
        ring = FrameRing(max(seeds, 1) + 1)
        ring.put(MARK, row, grown)
        frames = ring.drain()
        assert frames is not None
        resource = trainer_resource(run, f"{run}-{rank}", rank, world_size)
        (encoded,) = FrameEncoder(serialised_resource(resource)).encode(frames)
        self._request = PatchedRequest(encoded.body)
        self._of_step = self._request.values[:metrics]
        self._first = self._of_step.copy()
        if len(self._request.values) != encoded.points:
            raise AssertionError("a point without the mark")

    def request(self, step: int) -> bytes:
        """A step that ended just now."""
        self._of_step[:] = self._first + step
        return self._request.request(time.time_ns())


class Fates(msgspec.Struct):
    """What became of steps: each is ``delivered`` or ``unanswered`` at the end. ``refused``
    counts answers other than 200, after which a step is sent again."""

    delivered: int = 0
    refused: int = 0
    unanswered: int = 0


class Connection:
    """A rank's connection: one request at a time, the next when that was answered."""

    def __init__(self, address: tuple[str, int], fates: Fates) -> None:
        self._address = address
        self._fates = fates
        self._waiting: deque[bytes] = deque()
        self._answer = b""
        self._is_under_way = False
        self.socket = socket.create_connection(address)

    @property
    def unanswered(self) -> int:
        """Steps that nobody has taken yet."""
        return len(self._waiting)

    def send(self, body: bytes) -> None:
        """Send a step, now or behind those that wait."""
        self._waiting.append(body)
        self._send_next()

    def receive(self) -> None:
        """Take in some of an answer."""
        data = self.socket.recv(65536)
        if not data:
            raise SystemExit("the receiver has hung up")
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if not end or len(body) < (int(length[1]) if length else 0):
            return
        self._answer, self._is_under_way = b"", False
        if head.split(None, 2)[1] == b"200":
            self._waiting.popleft()
            self._fates.delivered += 1
            self._send_next()
        else:
            self._fates.refused += 1  # and sent again with the next step

    def _send_next(self) -> None:
        if self._waiting and not self._is_under_way:
            self._is_under_way = True
            body = self._waiting[0]
            self.socket.sendall(
                b"POST /v1/metrics HTTP/1.1\r\nHost: bench\r\n"
                b"Content-Type: application/x-protobuf\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body
            )


def main() -> None:
    """Several ranks in this process, for a while; prints what became of their steps."""
    parser = argparse.ArgumentParser(prog="python -m testkit.patched_requests")
    parser.add_argument("endpoint")
    parser.add_argument("--run", default="load")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--metrics", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--steps-per-s", type=float, default=10)
    options = parser.parse_args()
    url = urlsplit(options.endpoint)
    fates = Fates()
    selector = selectors.DefaultSelector()
    ranks = []
    for number in range(options.ranks):
        rank = PatchedRank(options.run, number, options.ranks, options.metrics, options.seeds)
        connection = Connection((str(url.hostname), url.port or 4318), fates)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        ranks.append((rank, connection))

    def receive_until(due: float) -> None:
        while True:
            left = due - time.monotonic()
            for key, _ in selector.select(max(left, 0)):
                key.data.receive()
            if left <= 0:
                return

    print("ready", flush=True)
    sys.stdin.readline()
    # Ranks end their steps one after the other and not all at once.
    gap_s = 1 / options.steps_per_s / options.ranks
    due = time.monotonic()
    for step in range(options.steps):
        for rank, connection in ranks:
            receive_until(due)
            connection.send(rank.request(step))
            due += gap_s
    end = time.monotonic() + END_S
    while any(connection.unanswered for _, connection in ranks) and time.monotonic() < end:
        receive_until(time.monotonic() + 0.1)
    fates.unanswered = sum(connection.unanswered for _, connection in ranks)
    print(msgspec.json.encode(fates).decode(), flush=True)


if __name__ == "__main__":
    main()
