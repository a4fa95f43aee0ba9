"""The draining thread: it sleeps while nothing comes, and misses nothing that does."""

import time
from types import SimpleNamespace

import pytest

from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.endings import HowEnded, RunEnd
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import StepFrame, StepTimeline
from esper_otel.stream import drain as drain_module
from esper_otel.stream.destination import Signal
from esper_otel.stream.drain import MOST_TIMELINES, PATIENT_TICKS, Drain
from esper_otel.stream.ring import Doorbell
from esper_otel.stream.spool import Spool
from esper_otel.stream.spool_files import Keeper
from esper_otel.stream.stream import Stream
from testkit.patience import PATIENCE_S
from testkit.receiver import HttpReceiver


@pytest.fixture
def receiver():
    with HttpReceiver() as started:
        yield started


def until(happened, timeout_s=PATIENCE_S):
    """Wait for something that threads do."""
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_it_sleeps_while_nothing_comes_and_takes_what_does(receiver, open_stream, row):
    stream = open_stream(receiver.url)
    for step in range(3):
        until(lambda: stream._bell.is_awaited)
        assert stream.totals.steps == step  # what waits for more of its kind does not wait on
        stream.frame(time.time_ns(), row(step))
        until(lambda step=step: len(receiver.inbox.steps()) > step)
    until(lambda: stream._bell.is_awaited)
    stream.event(Event("e", time.time_ns(), Severity.NORMAL, "t", {}))
    until(lambda: receiver.inbox.attempts["/v1/logs"] > 0)
    until(lambda: stream._bell.is_awaited)
    stream.timeline(StepTimeline(1, 1, 9, []))
    until(lambda: receiver.inbox.spans())
    until(lambda: stream._bell.is_awaited)
    report = stream.close()
    assert report.metrics.delivered == report.metrics.produced > 0


def test_it_wakes_to_tell_of_hyper_parameters_behind_the_first_steps(
    receiver, open_stream, row
):
    stream = open_stream(receiver.url)
    told = receiver.inbox.attempts
    stream.configure({"rate": 0.1}, explicit=True)
    until(lambda: stream._bell.is_awaited)
    assert told["/v1/logs"] == 0
    stream.frame(time.time_ns(), row(0))
    until(lambda: told["/v1/logs"] == 1)
    until(lambda: stream._bell.is_awaited)
    stream.configure({"rate": 0.2}, explicit=True)
    until(lambda: told["/v1/logs"] == 2)


def test_the_end_tells_of_hyper_parameters_of_which_nobody_was_told(receiver, open_stream, row):
    stream = open_stream(receiver.url, stream_interval_ms=60_000.0)
    stream.configure({"rate": 0.1}, explicit=True)
    stream.frame(time.time_ns(), row(0))
    assert stream.close().logs.delivered == 1


def test_a_run_beside_another_wakes_the_thread_they_share(receiver, open_stream, settings, row):
    first = open_stream(receiver.url)
    second = Stream(settings(), run_id="other", instance_id="i", beside=first)
    second.start()
    until(lambda: first._bell.is_awaited)
    second.frame(time.time_ns(), row(7))
    until(lambda: receiver.inbox.steps()[7])
    until(lambda: first._bell.is_awaited)
    second.close()
    until(lambda: second.totals.complete)


def test_who_reads_the_sums_has_all_steps_that_were_sent(receiver, open_stream, row):
    stream = open_stream(receiver.url)
    for step in range(1, 5):
        stream.frame(time.time_ns(), row(step))
        until(lambda step=step: receiver.inbox.steps()[step])
        assert stream.totals.steps == step


@pytest.fixture
def made(open_stream, tmp_path):
    """A drain whose thread does not run, and its lane."""
    lane = open_stream("http://127.0.0.1:1", stream_interval_ms=60_000.0)._lane
    spool = Spool(1000)
    keeper, sent = Keeper(spool, tmp_path, "name"), frozenset(Signal)
    return (
        Drain(lane, spool=spool, keeper=keeper, sent=sent, interval_s=60.0, bell=Doorbell()),
        lane,
    )


class LastBell(Doorbell):
    """At its fourth ringing the end comes, and that one was heard."""

    rung, drain = 0, None

    def sleep(self, timeout_s):
        self.rung += 1
        if self.rung == PATIENT_TICKS + 1:
            self.drain._stopping = True

    def sleep_while(self, is_idle):
        assert not is_idle(), "nobody will ring any more"


def test_it_does_not_sleep_past_the_end(open_stream, tmp_path):
    lane = open_stream("http://127.0.0.1:1", stream_interval_ms=60_000.0)._lane
    spool, bell = Spool(1000), LastBell()
    keeper = Keeper(spool, tmp_path, "name")
    drain = Drain(lane, spool=spool, keeper=keeper, sent=frozenset(), interval_s=1.0, bell=bell)
    bell.drain = drain
    drain._run()
    assert bell.rung == PATIENT_TICKS + 1
    assert drain.lanes == []


@pytest.fixture
def put_at(made, monkeypatch):
    """A drain, its lane, how many items it has put each time, and its clock, at 5.9 ms."""
    drain, lane = made
    put = []
    monkeypatch.setattr(drain, "_put", lambda lane, signal, body, items: put.append(items))
    now = SimpleNamespace(monotonic=time.monotonic, time_ns=lambda: 5_900_000)
    monkeypatch.setattr(drain_module, "time", now)
    return drain, lane, put, now


def test_an_end_waits_for_the_frames_that_wait(put_at, row):
    drain, lane, put, now = put_at
    lane.ring.put(5_100_000, row(1), ())
    lane.ends.append(StepFrame("r", "i", 0, 1, 5_200_000, {}, ended=RunEnd(HowEnded.DONE)))
    drain._drain()
    assert put == []
    now.time_ns = lambda: 6_000_000
    drain._drain()
    assert len(put) == 2
    assert put[-1] == 1  # the end's


class NotesOfAFastLoop:
    """Steps end while others are taken up, which takes a while."""

    def __init__(self, ring, row, now):
        self.waiting = [(5_100_000, row(1)), (5_200_000, row(2))]
        self._came = [(5_300_000, row(3))]
        self._ring, self._now = ring, now

    def catch_up(self):
        waiting, self.waiting = self.waiting, self._came
        self._came = []
        for at, row in waiting:
            self._ring.put(at, row, ())
        self._now.time_ns = lambda: 6_100_000


def test_a_millisecond_is_sent_in_one_piece_where_steps_are_only_noted(put_at, row):
    drain, lane, put, now = put_at
    lane.ring.notes = NotesOfAFastLoop(lane.ring, row, now)
    drain._drain()
    assert put == []
    drain._drain()
    assert put == [6]


def test_frames_are_looked_at_though_timelines_come_all_the_time(made, monkeypatch):
    drain, lane = made
    told = []

    def emit(timeline, tracers):
        told.append(timeline)
        assert len(told) <= 10 * MOST_TIMELINES, "no end of it"
        lane.timelines.append(timeline)

    monkeypatch.setattr(drain_module, "emit_spans", emit)
    monkeypatch.setattr(drain, "_is_wanted", lambda lane, signal: True)
    lane.timelines.extend([StepTimeline(1, 1, 9, [])] * (MOST_TIMELINES + 3))
    drain._drain()
    assert len(told) == MOST_TIMELINES


def test_a_bell_that_was_rung_ends_the_next_sleep():
    bell = Doorbell()
    bell.ring()
    bell.ring()
    bell.sleep(1e6)
    bell.sleep_while(lambda: False)
    bell.sleep(0.0)

    def rung_meanwhile():
        bell.ring()
        return True

    bell.sleep_while(rung_meanwhile)
    assert not bell.is_awaited
