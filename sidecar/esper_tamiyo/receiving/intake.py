"""Intake: OTLP requests of either protocol, to step records down the pipe.

A request is taken whole or not at all, one at a time and in the order they came. What is still
coming in or waits has a bound in bytes; beyond it producers are told to come again, first the
one that has been at its request for the longest.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections import Counter
from collections.abc import Callable

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)

from esper_otel.leyline.frames import MAX_NAME, MAX_SEEDS_PER_FRAME
from esper_otel.leyline.protobuf import FieldError
from esper_tamiyo.receiving.credentials import BearerAuth
from esper_tamiyo.receiving.harvest import (
    AMOUNT,
    MAX_STEPS,
    NAME,
    NO_STEP,
    SEEDS,
    TIME,
    Harvest,
    TooMuchError,
)
from esper_tamiyo.receiving.otlp_frames import Known, gather
from esper_tamiyo.receiving.pipe import IngestCounts, pack
from esper_tamiyo.receiving.staleness import StalenessFilter

log = logging.getLogger("tamiyo")

MAX_REQUEST = 4 << 20
"""Largest request after decompression, in bytes."""

MAX_PACKED = 8 << 20
"""Most bytes that one request becomes in the pipe: each step carries the names of its run."""

PIPE_BACKLOG = 1 << 20
"""Bytes that may wait for the decide process before producers are told to wait."""

MAX_HELD = 16 << 20
"""Bytes of requests that may be coming in or wait for their turn."""

PATIENCE_S = 1.0
"""Longest that a request waits for its turn and the pipe before it is turned away."""

REQUEST_S = 10.0
"""Longest that a request may take to come in."""

RETRY_AFTER_S = 1
"""When a producer that was turned away may come again."""

MAX_MEMBERS = 1024
"""Most members that a gzip body may have."""

_GZIP_SLICE = 16 * 1024
_PACKED_AT_ONCE = 256

_REASONS = {
    NO_STEP: "without a number, a seed_id, or a tolaria.step of the same resource and time",
    NAME: f"of a run, instance or seed whose name has more than {MAX_NAME} characters, "
    "or of a rank that is no rank",
    TIME: "of a time or step that is out of range",
    SEEDS: f"of more than {MAX_SEEDS_PER_FRAME} seeds in one step",
    AMOUNT: f"of more than {MAX_STEPS} steps, or too many seeds, in one request",
}


class MalformedError(Exception):
    """The request is not OTLP."""


class TooLargeError(Exception):
    """The request has more than :data:`MAX_REQUEST` bytes, or more parts than are looked at."""


class BusyError(Exception):
    """More comes in than can be taken; the producer should come again later."""


class SlowError(Exception):
    """The request did not come in within :data:`REQUEST_S`."""


class UnauthenticatedError(Exception):
    """The request does not carry the token."""


class Place:
    """Bytes of one request, as they come in, and its part of :data:`MAX_HELD`.

    It is held within the ``with`` block. ``evict`` is called when others need the room; then
    ``data`` is gone and ``evicted`` true.
    """

    __slots__ = ("_evict", "_intake", "data", "evicted", "held")

    def __init__(self, intake: Intake, evict: Callable[[], object]) -> None:
        self._intake = intake
        self._evict = evict
        self.data = bytearray()
        self.held = 0
        self.evicted = False

    def __enter__(self) -> Place:
        self._intake.expect(self)
        return self

    def __exit__(self, *raised: object) -> None:
        self._intake.settle(self)

    def extend(self, chunk: bytes) -> None:
        """Take in what came; raises :class:`TooLargeError` and :class:`BusyError`."""
        if self.evicted:
            raise self._intake.busy("others needed the room")
        if len(self.data) + len(chunk) > MAX_REQUEST:
            raise self._intake.too_large()
        self._intake.reserve(self, len(chunk))
        self.data += chunk

    def vacate(self) -> None:
        """Give the room back at once, and tell whoever is filling it."""
        self.evicted = True
        self.data.clear()
        self._evict()


class Intake:
    """Takes requests in whole or not at all, whichever protocol brought them."""

    def __init__(self, pipe: asyncio.StreamWriter, auth: BearerAuth) -> None:
        self._pipe = pipe
        pipe.transport.set_write_buffer_limits(high=PIPE_BACKLOG)
        self._auth = auth
        self._turn = asyncio.Lock()
        self._held = 0
        self._coming: dict[Place, None] = {}
        self._staleness = StalenessFilter()
        self._known = Known()
        self._failures: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Bytes of requests that are coming in or wait."""
        return self._held

    def admit(self, authorization: str | bytes | None) -> None:
        """Raise :class:`UnauthenticatedError` for a request without the token.

        Where there is no token to carry, none is asked for.
        """
        if not self._auth.admits(authorization):
            self.count(IngestCounts(unauthorized=1))
            raise UnauthenticatedError(
                "expected the header `Authorization: Bearer` and the token"
            )

    def expect(self, place: Place) -> None:
        """A request is coming in."""
        self._coming[place] = None

    def settle(self, place: Place) -> None:
        """It is done with."""
        self._coming.pop(place, None)
        self._held -= place.held

    def reserve(self, place: Place, size: int) -> None:
        """Hold ``size`` bytes more for a place, in the room of older ones if need be.

        Raises :class:`BusyError` when there is none.
        """
        while self._held + size > MAX_HELD:
            oldest = next((other for other in self._coming if other.held), None)
            if oldest is None or oldest is place:
                raise self.busy("more requests arrive than can be read")
            del self._coming[oldest]
            self._held -= oldest.held
            oldest.held = 0
            oldest.vacate()
        self._held += size
        place.held += size

    async def ingest(self, data: bytes) -> bytes:
        """Hand the frames of a request on; returns the bytes of the OTLP response."""
        with Place(self, _nothing) as place:
            place.extend(data)
            return await self.finish(place)

    async def finish(self, place: Place, compressed: bool = False) -> bytes:
        """As :meth:`ingest`, of a request that has come in, by gzip if ``compressed``."""
        self._coming.pop(place, None)  # it is nobody's fault if it has to wait from here on
        data, place.data = bytes(place.data), bytearray()
        await self._wait_for_turn()
        try:
            return await self._hand_on(self._inflated(data) if compressed else data)
        finally:
            self._turn.release()

    def count(self, counts: IngestCounts) -> None:
        """Tell the decide process what came in."""
        self._pipe.write(pack(counts))

    def busy(self, why: str) -> BusyError:
        """Count a request that is turned away; the error to raise."""
        self.count(IngestCounts(turned_away_busy=1))
        return BusyError(f"{why}; come again later")

    def slow(self) -> SlowError:
        """Count a request that does not come in; the error to raise."""
        self.count(IngestCounts(timed_out=1))
        return SlowError(f"the request did not arrive within {REQUEST_S:g} s")

    def too_large(self, why: str = "") -> TooLargeError:
        """Count a request that has too much; the error to raise."""
        self.count(IngestCounts(too_large=1))
        why = why or f"a request may have {MAX_REQUEST} bytes after decompression"
        return TooLargeError(why)

    def malformed(self, why: str) -> MalformedError:
        """Count a request that is none; the error to raise."""
        self.count(IngestCounts(malformed=1))
        return MalformedError(why)

    def failed(self, error: BaseException) -> None:
        """Count what nobody expected; each kind is logged once, without its traceback."""
        self.count(IngestCounts(failed=1))
        kind = type(error).__name__
        self._failures[kind] += 1
        if self._failures[kind] == 1:
            log.error(
                "a request failed in the receiver (%s); it was refused, and others like it "
                "are only counted: %.200r",
                kind,
                error,
            )

    async def _wait_for_turn(self) -> None:
        """The turn is ours when this returns; raises :class:`BusyError`."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._turn.acquire()
                try:
                    await self._pipe.drain()
                except BaseException:
                    self._turn.release()
                    raise
        except TimeoutError:
            raise self.busy("the decide process does not keep up") from None

    def _inflated(self, body: bytes) -> bytes:
        try:
            return inflated(body)
        except MalformedError as error:
            raise self.malformed(str(error)) from None
        except TooLargeError:
            raise self.too_large() from None

    async def _hand_on(self, data: bytes) -> bytes:
        """Others have the loop between the pieces of a request: most of all the heartbeat."""
        harvest = Harvest.of_request()
        try:
            for _ in gather(data, harvest, self._staleness.is_old, self._known):
                await asyncio.sleep(0)
        except (DecodeError, FieldError) as error:
            raise self.malformed(f"not an ExportMetricsServiceRequest: {error}") from None
        except TooMuchError as error:
            raise self.too_large(str(error)) from None
        messages = await self._packed(harvest)
        reasons = {f"unusable_{why}": points for why, points in harvest.reasons.items()}
        counts = IngestCounts(
            requests=1,
            points_used=harvest.used,
            points_foreign=harvest.foreign,
            points_unusable=harvest.unusable,
            points_old=harvest.old,
            **reasons,
        )
        messages.append(pack(counts))
        # Not writelines(): that of Python 3.12.0 to 3.13.1 pauses nobody (CVE-2024-12254), and
        # the pipe would have no bound.
        self._pipe.write(b"".join(messages))
        return success(harvest)

    async def _packed(self, harvest: Harvest) -> list[bytes]:
        """The frames as they go down the pipe; raises :class:`TooLargeError`."""
        packed = []
        size = 0
        for place, frame in enumerate(harvest.frames, 1):
            packed.append(pack(frame))
            size += len(packed[-1])
            if size > MAX_PACKED:
                raise self.too_large(
                    f"the steps of a request, each with the names of its run, may have "
                    f"{MAX_PACKED} bytes"
                )
            if place % _PACKED_AT_ONCE == 0:
                await asyncio.sleep(0)
        return packed


def _nothing() -> None:
    """A request that is there in whole need not be told that it has to go."""


def success(harvest: Harvest) -> bytes:
    """An ``ExportMetricsServiceResponse`` that tells of points we could not use."""
    if not harvest.unusable:
        return b""
    parts = "; ".join(
        f"{points} {_REASONS[reason]}" for reason, points in harvest.reasons.items()
    )
    partial = ExportMetricsPartialSuccess(
        rejected_data_points=harvest.unusable,
        error_message=f"unusable points of Tolaria or Kasmina: {parts}",
    )
    return ExportMetricsServiceResponse(partial_success=partial).SerializeToString()


def refusal(code: int, message: str, retry: bool = False) -> bytes:
    """A ``google.rpc.Status``; with ``retry`` it says when to come again."""
    status = Status(code=code, message=message)
    if retry:
        detail = AnyMessage()
        detail.Pack(RetryInfo(retry_delay=Duration(seconds=RETRY_AFTER_S)))
        status.details.append(detail)
    encoded: bytes = status.SerializeToString()
    return encoded


def inflated(body: bytes) -> bytes:
    """``body`` unzipped, all its members, but never much beyond the limit.

    Raises :class:`MalformedError` and :class:`TooLargeError`. It goes by small slices, since
    what is behind a member is copied with every one of them.
    """
    data = bytearray()
    members, unzip = 1, zlib.decompressobj(wbits=31)
    for start in range(0, len(body), _GZIP_SLICE):
        rest = body[start : start + _GZIP_SLICE]
        while rest:
            if unzip.eof:
                members, unzip = members + 1, zlib.decompressobj(wbits=31)
            if members > MAX_MEMBERS:
                raise MalformedError(f"not gzip: it has more than {MAX_MEMBERS} members")
            try:
                data += unzip.decompress(rest, MAX_REQUEST + 1 - len(data))
            except zlib.error as error:
                raise MalformedError(f"not gzip: {error}") from None
            if len(data) > MAX_REQUEST:
                raise TooLargeError
            rest = unzip.unused_data
    if not unzip.eof:
        raise MalformedError("not gzip: it ends too early")
    return bytes(data)
