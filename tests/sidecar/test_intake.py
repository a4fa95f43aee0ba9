"""What the receivers take, hold and refuse, whichever protocol brought it."""

import asyncio
import gzip

import msgspec
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceResponse,
)

from esper_tamiyo.receiving import intake as intake_module
from esper_tamiyo.receiving.credentials import BearerAuth
from esper_tamiyo.receiving.intake import (
    MAX_MEMBERS,
    MAX_REQUEST,
    BusyError,
    Intake,
    MalformedError,
    Place,
    TooLargeError,
    UnauthenticatedError,
    inflated,
)
from esper_tamiyo.receiving.pieces import PIECE
from esper_tamiyo.receiving.pipe import IngestCounts, Inlet, MessageKind
from esper_tamiyo.receiving.staleness import MAX_LATER_NS, StalenessFilter
from sidecar.frames_made import frame, otlp_of


class Pipe:
    """The pipe to a decide process that reads when it is told to."""

    def __init__(self):
        self.transport = self
        self.reads = asyncio.Event()
        self.reads.set()
        self.inlet = Inlet()
        self.messages = []

    def set_write_buffer_limits(self, high):
        assert high == intake_module.PIPE_BACKLOG

    async def drain(self):
        await self.reads.wait()

    def write(self, data):
        self.messages += self.inlet.feed(data)

    def writelines(self, parts):
        self.write(b"".join(parts))

    @property
    def steps(self):
        return [msgspec.msgpack.decode(body)[3] for kind, body in self.messages if kind == 0]

    def told(self, field):
        tallies = (
            msgspec.msgpack.decode(body, type=IngestCounts)
            for kind, body in self.messages
            if kind == MessageKind.COUNTS
        )
        return sum(getattr(tally, field) for tally in tallies)


def request(step):
    return otlp_of(frame(step, loss=1.0)).SerializeToString()


def taken(test, token_file=""):
    """Run ``test(intake, pipe)`` in a loop of its own."""

    async def run():
        pipe = Pipe()
        await test(Intake(pipe, BearerAuth(token_file)), pipe)

    asyncio.run(run())


def test_requests_are_taken_in_the_order_they_came():
    async def test(intake, pipe):
        pipe.reads.clear()
        waiting = [asyncio.create_task(intake.ingest(request(step))) for step in range(5)]
        await asyncio.sleep(0)
        assert pipe.steps == []
        pipe.reads.set()
        assert await asyncio.gather(*waiting) == [b""] * 5
        assert pipe.steps == list(range(5))
        assert pipe.told("requests") == 5

    taken(test)


def test_what_comes_while_too_much_waits_is_refused_and_afterwards_it_is_not(monkeypatch):
    monkeypatch.setattr(intake_module, "MAX_HELD", 2 * len(request(0)))

    async def test(intake, pipe):
        pipe.reads.clear()
        waiting = [asyncio.create_task(intake.ingest(request(step))) for step in range(3)]
        with pytest.raises(BusyError, match="more requests arrive than can be read"):
            await waiting.pop()
        pipe.reads.set()
        await asyncio.gather(*waiting)
        await intake.ingest(request(3))
        assert pipe.steps == [0, 1, 3]
        assert (pipe.told("requests"), pipe.told("turned_away_busy")) == (3, 1)

    taken(test)


def test_while_the_pipe_is_full_all_are_refused_at_once_not_one_after_the_other(monkeypatch):
    monkeypatch.setattr(intake_module, "PATIENCE_S", 0.5)

    async def test(intake, pipe):
        pipe.reads.clear()
        tasks = [intake.ingest(request(step)) for step in range(40)]
        refusals = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 15)
        assert {type(refusal) for refusal in refusals} == {BusyError}
        assert pipe.told("turned_away_busy") == 40
        pipe.reads.set()
        await intake.ingest(request(99))
        assert pipe.steps == [99], "nothing of what was refused"

    taken(test)


@pytest.mark.parametrize(
    ("data", "error", "field"),
    [
        (b"\xff\xff", MalformedError, "malformed"),
        (bytes(intake_module.MAX_REQUEST + 1), TooLargeError, "too_large"),
    ],
)
def test_what_cannot_be_taken_is_counted_and_holds_nobody_up(data, error, field):
    async def test(intake, pipe):
        with pytest.raises(error):
            await intake.ingest(data)
        await intake.ingest(request(1))
        assert (pipe.told(field), pipe.steps) == (1, [1])

    taken(test)


def test_a_producer_that_hangs_up_while_it_waits_leaves_its_place():
    async def test(intake, pipe):
        pipe.reads.clear()
        gone = asyncio.create_task(intake.ingest(request(1)))
        stays = asyncio.create_task(intake.ingest(request(2)))
        await asyncio.sleep(0)
        gone.cancel()
        pipe.reads.set()
        await stays
        assert pipe.steps == [2]

    taken(test)


def test_what_came_too_late_to_be_decided_on_is_dropped_and_counted(monkeypatch):
    now = 0
    monkeypatch.setattr(intake_module, "StalenessFilter", lambda: StalenessFilter(lambda: now))

    async def test(intake, pipe):
        nonlocal now
        for step in range(2):
            assert await intake.ingest(request(step)) == b""
            now += MAX_LATER_NS + 10
        assert pipe.steps == [0]
        assert (pipe.told("requests"), pipe.told("points_used")) == (2, 2)
        assert pipe.told("points_old") == 2

    taken(test)


def test_strangers_are_counted(tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")

    async def test(intake, pipe):
        intake.admit("Bearer 0123456789abcdef")
        with pytest.raises(UnauthenticatedError, match="Authorization: Bearer"):
            intake.admit("Bearer guess")
        assert pipe.told("unauthorized") == 1

    taken(test, str(token))


def test_who_is_at_its_request_for_the_longest_makes_room_for_others(monkeypatch):
    monkeypatch.setattr(intake_module, "MAX_HELD", 1000)

    async def test(intake, pipe):
        gone = []
        with (
            Place(intake, lambda: gone.append("first")) as first,
            Place(intake, lambda: gone.append("second")) as second,
        ):
            first.extend(bytes(600))
            second.extend(bytes(300))
            assert intake.held == 900
            second.extend(bytes(300))
            assert (gone, first.evicted, intake.held) == (["first"], True, 600)
            assert not first.data, "what it had is gone at once"
            with pytest.raises(BusyError, match="others needed the room"):
                first.extend(b"more")
            with pytest.raises(BusyError, match="more requests arrive"):
                second.extend(bytes(500))  # nobody is left who could make room
        assert (intake.held, pipe.told("turned_away_busy")) == (0, 2)

    taken(test)


def test_a_request_that_is_whole_keeps_its_room_while_it_waits(monkeypatch):
    monkeypatch.setattr(intake_module, "MAX_HELD", len(request(1)) + 10)

    async def test(intake, pipe):
        pipe.reads.clear()
        waits = asyncio.create_task(intake.ingest(request(1)))
        await asyncio.sleep(0)
        with Place(intake, lambda: None) as place, pytest.raises(BusyError):
            place.extend(bytes(100))
        pipe.reads.set()
        await waits
        assert pipe.steps == [1]

    taken(test)


def test_a_request_may_not_grow_beyond_the_limit_while_it_comes_in():
    async def test(intake, pipe):
        with Place(intake, lambda: None) as place:
            for _ in range(4):
                place.extend(bytes(MAX_REQUEST // 4))
            with pytest.raises(TooLargeError):
                place.extend(b"x")
        assert (intake.held, pipe.told("too_large")) == (0, 1)

    taken(test)


def test_a_long_request_leaves_the_loop_to_others_between_its_pieces():
    values = dict.fromkeys(("loss", "accuracy", "grad_var", "loss_ewma"), 1.0)
    data = otlp_of(*(frame(step, **values) for step in range(600))).SerializeToString()

    async def test(intake, pipe):
        beats = 0

        async def beat():
            nonlocal beats
            while True:
                await asyncio.sleep(0)
                beats += 1

        beating = asyncio.create_task(beat())
        await asyncio.sleep(0)
        before = beats
        await intake.ingest(data)
        beating.cancel()
        assert beats - before > len(data) / PIECE - 1
        assert pipe.steps == list(range(600)), "and yet it is handed on as one"

    taken(test)


def test_the_names_of_a_run_do_not_make_much_of_little(monkeypatch):
    monkeypatch.setattr(intake_module, "MAX_PACKED", 20_000)
    name = "é" * 256

    async def test(intake, pipe):
        steps = [frame(step, run=name, instance=name) for step in range(30)]
        with pytest.raises(TooLargeError, match="each with the names of its run"):
            await intake.ingest(otlp_of(*steps).SerializeToString())
        assert (pipe.steps, pipe.told("too_large")) == ([], 1)

    taken(test)


def test_why_points_are_of_no_use_is_told_to_the_producer_and_to_decide():
    request = otlp_of(frame(0, run="x" * 300, loss=1.0))
    request.MergeFrom(otlp_of(frame(1, loss=1.0)))

    async def test(intake, pipe):
        answer = ExportMetricsServiceResponse.FromString(
            await intake.ingest(request.SerializeToString())
        )
        assert answer.partial_success.rejected_data_points == 2
        assert "2 of a run, instance or seed whose name" in answer.partial_success.error_message
        assert (pipe.told("points_unusable"), pipe.told("unusable_name")) == (2, 2)
        assert pipe.told("points_used") == 2

    taken(test)


def test_reasons_of_points_have_a_count_each():
    reasons = {f"unusable_{reason}" for reason in intake_module._REASONS}
    assert reasons <= set(IngestCounts.__struct_fields__)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_all_members_of_a_gzip_body_are_read(cut):
    data = bytes(range(256)) * 300
    size = len(data) // cut + 1
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    assert inflated(b"".join(gzip.compress(part) for part in parts)) == data


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x1f\x8b",
        gzip.compress(b"abc", mtime=0)[:-1],
        gzip.compress(b"abc", mtime=0) + b"rubbish",
        gzip.compress(b"abc", mtime=0) + bytes(20),
        gzip.compress(b"abc", mtime=0) + gzip.compress(b"def", mtime=0)[:-3],
        gzip.compress(b"", mtime=0) * (MAX_MEMBERS + 1),
    ],
)
def test_what_is_not_gzip_to_its_end_is_malformed(body):
    with pytest.raises(MalformedError, match="not gzip"):
        inflated(body)


def test_a_bomb_is_not_unfolded():
    part = gzip.compress(bytes(MAX_REQUEST // 2 + 1))
    with pytest.raises(TooLargeError):
        inflated(part + part)


def test_gzip_that_is_none_is_counted():
    async def test(intake, pipe):
        with Place(intake, lambda: None) as place:
            place.extend(b"no gzip")
            with pytest.raises(MalformedError):
                await intake.finish(place, compressed=True)
        assert pipe.told("malformed") == 1

    taken(test)


@pytest.mark.parametrize(
    "header",
    [b"Bearer \xff\xfe", "Bearer \udcff", "Bearer тайна-тайна-тайна", "\udcff", b"", None],
)
def test_a_header_of_any_bytes_is_not_the_token(tmp_path, header):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")

    async def test(intake, pipe):
        with pytest.raises(UnauthenticatedError):
            intake.admit(header)
        assert pipe.told("unauthorized") == 1

    taken(test, str(token))


def test_what_nobody_expected_is_counted_and_logged_once_for_each_kind(caplog):
    async def test(intake, pipe):
        for _ in range(3):
            intake.failed(ValueError("odd"))
        intake.failed(KeyError("other"))
        assert pipe.told("failed") == 4

    taken(test)
    assert len(caplog.records) == 2
    assert "Traceback" not in caplog.text
