"""What the receivers take, hold and refuse, whichever protocol brought it."""

import asyncio

import msgspec
import pytest

from esper_tamiyo.receiving import intake as intake_module
from esper_tamiyo.receiving.credentials import BearerAuth
from esper_tamiyo.receiving.intake import (
    BusyError,
    Intake,
    MalformedError,
    TooLargeError,
    UnauthenticatedError,
)
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
        with pytest.raises(BusyError, match="more requests come in than can be read"):
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
