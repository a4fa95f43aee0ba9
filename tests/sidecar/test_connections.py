"""Connections of the receivers: which of them goes when, and who reads while others wait."""

import asyncio
import errno
import socket

import pytest

from esper_tamiyo.receiving import grpc_receiver
from esper_tamiyo.receiving.addresses import Address
from esper_tamiyo.receiving.connections import (
    ANSWER_S,
    FIRST_S,
    IDLE_S,
    MAX_CONNECTIONS,
    Acceptor,
    Connections,
)
from esper_tamiyo.receiving.grpc_receiver import ReadingPlaces
from esper_tamiyo.receiving.ingest import connection_limits
from testkit.patience import PATIENCE_S


class Peer:
    def __init__(self):
        self.open = True

    def abort(self):
        self.open = False


class Watched:
    """Connections with a clock of their own, and what they counted."""

    def __init__(self, limit=3):
        self.now = 0.0
        self.counted = []
        self.all = Connections(limit, self.counted.append, lambda: self.now)

    def told(self, field):
        return sum(getattr(counts, field) for counts in self.counted)

    def peer(self):
        peer = Peer()
        self.all.make_room()
        self.all.waits(peer, FIRST_S)
        return peer


def test_who_is_late_is_closed_and_who_is_not_stays():
    watched = Watched()
    late, idle, answered = watched.peer(), watched.peer(), watched.peer()
    watched.now = FIRST_S - 1
    watched.all.waits(idle, IDLE_S)
    watched.all.answers(answered)
    watched.now = FIRST_S
    watched.all.sweep()
    assert (late.open, idle.open, answered.open) == (False, True, True)
    assert (len(watched.all), watched.told("connections_timed_out")) == (2, 1)
    watched.now += ANSWER_S
    watched.all.sweep()
    assert (idle.open, answered.open) == (True, False)
    watched.now += IDLE_S
    watched.all.sweep()
    assert (len(watched.all), watched.told("connections_timed_out")) == (0, 3)


def test_the_one_that_has_waited_for_the_longest_makes_room():
    watched = Watched(limit=3)
    silent, honest, busy = watched.peer(), watched.peer(), watched.peer()
    watched.all.answers(busy)
    watched.all.waits(silent, FIRST_S)  # it sent something just now
    fresh = watched.peer()
    assert (honest.open, silent.open, busy.open, fresh.open) == (False, True, True, True)
    assert watched.told("connections_evicted") == 1
    watched.peer()
    assert (silent.open, busy.open) == (False, True)
    watched.all.forget(fresh)
    assert len(watched.all) == 2


def test_whose_request_is_whole_is_not_closed_for_others():
    watched = Watched(limit=2)
    peers = [watched.peer(), watched.peer()]
    for peer in peers:
        watched.all.answers(peer)
    watched.all.make_room()
    assert all(peer.open for peer in peers)
    assert not watched.all.evict()


@pytest.mark.parametrize(
    ("descriptors", "http", "grpc"),
    [(1024, 696, 232), (8192, MAX_CONNECTIONS, grpc_receiver.MAX_CHANNELS), (64, 6, 2)],
)
def test_there_are_descriptors_for_all_connections(descriptors, http, grpc):
    assert connection_limits(descriptors) == (http, grpc)


def test_without_descriptors_it_waits_and_is_told_once(monkeypatch, caplog):
    watched = Watched(limit=10)

    async def run():
        opened = asyncio.Event()

        class Greeted(asyncio.Protocol):
            def connection_made(self, transport):
                opened.set()
                transport.close()

        acceptor = Acceptor(watched.all, Greeted, None, watched.counted.append)
        port = acceptor.start(Address("127.0.0.1", 0))
        listening = acceptor._listening

        class Exhausted:
            def accept(self):
                raise OSError(errno.EMFILE, "Too many open files")

            def fileno(self):
                return listening.fileno()

            def close(self):
                listening.close()

        silent = watched.peer()
        acceptor._listening = Exhausted()
        with socket.create_connection(("127.0.0.1", port)):
            acceptor._accept()
            acceptor._accept()
            assert not silent.open, "the silent one goes for it"
            assert watched.told("accepts_failed") == 2
            acceptor._listening = listening
            await asyncio.wait_for(opened.wait(), PATIENCE_S)
        acceptor.stop()

    asyncio.run(run())
    assert caplog.text.count("Too many open files") == 1


def test_a_call_that_does_not_end_makes_room_for_one_that_waits():
    async def run():
        places = ReadingPlaces(2)
        first, second = await places.occupy(), await places.occupy()
        waiting = asyncio.create_task(places.occupy())
        await asyncio.wait_for(first, PATIENCE_S)
        assert not waiting.done()
        places.free(first)
        third = await asyncio.wait_for(waiting, PATIENCE_S)
        places.free(second)
        places.free(third)
        await asyncio.wait_for(places.occupy(), PATIENCE_S)

    asyncio.run(run())


def test_who_finds_no_place_in_time_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(grpc_receiver, "PATIENCE_S", 0.01)
    monkeypatch.setattr(grpc_receiver, "UNDISTURBED_S", 60.0)

    async def run():
        places = ReadingPlaces(1)
        reader = await places.occupy()
        with pytest.raises(TimeoutError):
            await places.occupy()
        places.free(reader)
        await asyncio.wait_for(places.occupy(), PATIENCE_S)

    asyncio.run(run())
