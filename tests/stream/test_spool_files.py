"""Spool files: what is unsent lies on disk, and nothing else, whatever the disk does."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_otel.stream import read_recording
from esper_otel.stream.destination import Signal
from esper_otel.stream.spool import OVERDUE_S, Batch, Spool
from esper_otel.stream.spool_files import (
    MOST_NAMED,
    Keeper,
    SpoolFiles,
    SpoolLock,
    lock_path_of,
    resend_words,
    spool_files_in,
)
from testkit.patience import PATIENCE_S

M, T = Signal.METRICS, Signal.TRACES


def batch(body: bytes, signal: Signal = M, number: int = 1) -> Batch:
    return Batch(signal, body, 1, number)


def contents(folder: Path) -> list[list[bytes]]:
    """The requests in each spool file, by name."""
    return [list(read_recording(path)) for path in spool_files_in(folder)]


@pytest.fixture
def keeper(tmp_path):
    """A keeper and its spool; ended."""
    spool = Spool(1000)
    keeper = Keeper(spool, tmp_path / "spool", "run-rank0-1")
    yield keeper, spool
    keeper.finish(spool.seal(), time.monotonic() + 5)


@pytest.fixture
def full_disk(monkeypatch):
    """Makes the disk take so many bytes and no more."""
    left = [1 << 40]
    write = os.write

    def writing(file: int, data) -> int:
        if file > 2:
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            data = bytes(data[: left[0]])
            left[0] -= len(data)
        return write(file, data)

    monkeypatch.setattr(os, "write", writing)

    def have(free: int) -> None:
        left[0] = free

    return have


# Which batches are to be written.


def test_nothing_is_kept_while_the_receiver_takes_what_comes():
    spool = Spool(100)
    for body in (b"1", b"2"):
        spool.put(M, body, 1)
        spool.look_for_overdue(time.monotonic())
        assert spool.unkept() == []
        spool.deliver(spool.next_group(M))
    assert not spool.away


def test_all_that_waits_is_kept_once_a_request_has_failed():
    spool = Spool(100)
    for body in (b"1", b"2"):
        spool.put(M, body, 1)
    spool.put(T, b"t", 1)
    spool.put_back(spool.next_group(M))
    spool.put(M, b"3", 1)
    assert [each.body for each in spool.unkept()] == [b"1", b"2", b"3"]


def test_what_is_on_its_way_for_too_long_is_kept_with_what_follows():
    spool = Spool(100)
    spool.put(M, b"1", 1)
    spool.next_group(M)
    spool.look_for_overdue(time.monotonic())
    assert not spool.away
    spool.look_for_overdue(time.monotonic() + OVERDUE_S)
    spool.put(M, b"2", 1)
    assert [each.body for each in spool.unkept()] == [b"1", b"2"]


def test_a_receiver_that_has_taken_all_is_there_again():
    spool = Spool(100)
    spool.put(M, b"1", 1)
    spool.put_back(spool.next_group(M))
    group = spool.next_group(M)
    spool.put(M, b"2", 1)
    spool.deliver(group)
    assert spool.away == {M}  # the next is still behind
    spool.deliver(spool.next_group(M))
    assert not spool.away


def test_a_line_without_receiver_is_not_kept():
    spool = Spool(100)
    spool.put(T, b"1", 1)
    spool.put_back(spool.next_group(T))
    spool.close_line(T)
    spool.look_for_overdue(time.monotonic() + 1)
    assert not spool.away


def test_what_lies_in_one_file_is_one_request(tmp_path):
    spool = Spool(1000)
    files = SpoolFiles(tmp_path, "run", 4)
    for body in (b"12", b"34", b"5"):
        spool.put(M, body, 1)
    spool.put_back(spool.next_group(M))
    for each in spool.unkept():
        files.write(each)
    spool.put(M, b"6", 1)
    assert [spool.next_group(M).body() for _ in range(3)] == [b"1234", b"5", b"6"]
    files.close()


# The files.


def test_files_hold_what_is_unsent_and_go_when_it_was_sent(tmp_path):
    files = SpoolFiles(tmp_path, "run-rank0-1", 10)
    batches = [batch(b"12345"), batch(b"67890"), batch(b"abc"), batch(b"t", T)]
    for each in batches:
        files.write(each)
    assert contents(tmp_path) == [[b"12345", b"67890"], [b"t"], [b"abc"]]
    batches[0].settled = True
    files.trim([batches[0].segment])
    assert contents(tmp_path) == [[b"67890"], [b"t"], [b"abc"]]
    files.write(batch(b"more"))
    batches[1].settled = batches[3].settled = True
    files.remove_settled()
    assert contents(tmp_path) == [[b"abc", b"more"]]
    files.close()
    assert contents(tmp_path) == [[b"abc", b"more"]]
    assert len(list(tmp_path.iterdir())) == 1  # the lock is gone


def test_after_a_part_of_the_newest_file_has_gone_it_is_written_on(tmp_path):
    files = SpoolFiles(tmp_path, "run", 100)
    first, second = batch(b"1"), batch(b"2")
    for each in (first, second):
        files.write(each)
    first.settled = True
    files.trim([first.segment])
    files.write(batch(b"3"))
    assert contents(tmp_path) == [[b"2", b"3"]]
    files.close()


def test_a_batch_larger_than_a_file_has_one_of_its_own(tmp_path):
    files = SpoolFiles(tmp_path, "run", 3)
    for body in (b"1", b"larger", b"2"):
        files.write(batch(body))
    assert contents(tmp_path) == [[b"1"], [b"larger"], [b"2"]]
    files.close()


@given(st.lists(st.tuples(st.sampled_from(["write", "send", "drop"]), st.integers(0, 30))))
@settings(max_examples=50, deadline=None)
def test_whatever_happens_the_files_are_what_is_unsent(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("spool")
    files = SpoolFiles(folder, "run", 20)
    waiting: list[Batch] = []
    for number, (what, size) in enumerate(steps):
        if what == "write":
            waiting.append(batch(bytes([number % 256]) * (size + 1)))
            files.write(waiting[-1])
        elif waiting:
            gone = waiting.pop(0)
            gone.settled = True
            if what == "send":
                files.trim([gone.segment])
            files.remove_settled()
    files.close()
    there = [body for each in contents(folder) for body in each]
    assert there == [each.body for each in waiting]


def test_no_two_processes_share_a_file(tmp_path):
    # As after a restart in a container, where both have the number 1.
    for body in (b"1", b"2"):
        files = SpoolFiles(tmp_path, "run-rank0-1", 100)
        files.write(batch(body))
        files.close()
    assert sorted(contents(tmp_path)) == [[b"1"], [b"2"]]


# A disk that fails.


@pytest.mark.parametrize("free", range(14))
def test_on_a_full_disk_there_are_whole_requests_and_no_empty_file(tmp_path, full_disk, free):
    files = SpoolFiles(tmp_path, "run", 100)
    full_disk(free)
    written = []
    for body in (b"123", b"456"):
        each = batch(body)
        try:
            files.write(each)
        except OSError:
            assert each.segment is None
            break
        written.append(body)
    full_disk(1 << 40)
    files.close()
    assert len(written) == min(free // 7, 2)
    assert contents(tmp_path) == ([written] if written else [])


def test_what_has_no_room_waits_in_memory_and_that_is_said_once(keeper, full_disk, caplog):
    keeper, spool = keeper
    full_disk(10)
    for body in (b"1234", b"5678"):
        spool.put(M, body, 3)
    spool.put(T, b"t", 2)
    spool.put_back(spool.next_group(M))
    spool.put_back(spool.next_group(T))
    keeper._write(spool.unkept())
    keeper._write(spool.unkept())
    assert caplog.text.count("cannot be kept in") == 1
    assert "No space left on device" in caplog.text
    full_disk(1 << 40)
    batches = spool.seal()
    left = keeper.finish(batches, time.monotonic() + 5)
    assert [each.segment is None for each in batches] == [False] * 3
    assert [list(read_recording(path)) for path in left] == [[b"1234", b"5678"], [b"t"]]


def test_a_disk_that_failed_is_left_alone_for_a_while(keeper, full_disk, monkeypatch):
    keeper, spool = keeper
    full_disk(0)
    spool.put(M, b"1", 1)
    spool.put_back(spool.next_group(M))
    keeper._write(spool.unkept())
    keeper.look()
    assert keeper._thread is None


def test_a_folder_that_cannot_be_made_is_said_and_hurts_nobody(tmp_path, caplog):
    (tmp_path / "taken").touch()
    spool = Spool(100)
    keeper = Keeper(spool, tmp_path / "taken" / "spool", "run")
    spool.put(M, b"1", 1)
    batches = spool.seal()
    assert keeper.finish(batches, time.monotonic()) == ()
    assert batches[0].segment is None
    assert "cannot be kept in" in caplog.text


def test_a_full_disk_at_the_end_keeps_what_has_room_and_counts_the_rest(
    open_stream, row, full_disk, wait_until, caplog
):
    stream = open_stream("http://127.0.0.1:1", {"OTEL_TRACES_EXPORTER": "none"})
    for step in range(3):
        stream.frame(step + 1, row(step))
        wait_until(lambda made=2 * (step + 1): stream.snapshot().metrics.produced == made)
    wait_until(lambda: not stream._spool.unkept())
    full_disk(0)
    stream.frame(9, row(9))
    report = stream.close()
    assert (report.metrics.spooled, report.metrics.dropped) == (6, 2)
    (left,) = report.files
    assert left.stat().st_size > 0
    assert "unsent metrics are lost: 2 " in caplog.text
    assert f"esper-otel resend {left}" in caplog.text
    assert len(list(left.parent.iterdir())) == 1


def test_a_disk_that_hangs_holds_up_nobody(keeper, monkeypatch):
    keeper, spool = keeper
    spool.put(M, b"1", 1)
    spool.put_back(spool.next_group(M))
    goes_on, hangs = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        goes_on.wait(30)

    monkeypatch.setattr(SpoolFiles, "write", hang)
    monkeypatch.setattr("esper_otel.stream.spool_files.PATIENCE_S", 0.05)
    keeper.look()
    assert hangs.wait(PATIENCE_S)
    spool.put(M, b"2", 1)
    group = spool.next_group(M)
    spool.deliver(group)
    keeper.settled(group.batches)
    batches = spool.seal()
    assert keeper.finish(batches, time.monotonic()) == ()
    goes_on.set()


# The thread.


def test_the_thread_begins_with_the_first_outage_and_writes_at_once(
    keeper, wait_until, tmp_path
):
    keeper, spool = keeper
    spool.put(M, b"1", 1)
    keeper.look()
    assert keeper._thread is None
    spool.put_back(spool.next_group(M))
    keeper.look()
    wait_until(lambda: not spool.unkept())
    assert contents(tmp_path / "spool") == [[b"1"]]
    spool.put(M, b"2", 1)
    keeper.look()
    wait_until(lambda: not spool.unkept())
    assert contents(tmp_path / "spool") == [[b"1", b"2"]]
    group = spool.next_group(M)
    spool.deliver(group)
    keeper.settled(group.batches)
    assert contents(tmp_path / "spool") == []


def test_what_is_delivered_while_it_is_written_does_not_stay(keeper, tmp_path, monkeypatch):
    keeper, spool = keeper
    spool.put(M, b"1", 1)
    spool.put(M, b"2", 1)
    spool.put_back(spool.next_group(M))
    group = spool.next_group(M)
    write = SpoolFiles.write

    def writing_and(files: SpoolFiles, each: Batch) -> None:
        write(files, each)
        if each.number == 1:
            spool.deliver(group)
            keeper._at_work.release()  # the sender comes before the writer is done
            keeper.settled(group.batches[1:])
            keeper._at_work.acquire()

    monkeypatch.setattr(SpoolFiles, "write", writing_and)
    with keeper._at_work:
        keeper._write(spool.unkept())
    assert contents(tmp_path / "spool") == []


def test_a_recovery_leaves_no_file(open_stream, row, wait_until, tmp_path):
    from testkit.receiver import HttpReceiver

    with HttpReceiver() as receiver:
        pass
    stream = open_stream(receiver.url)
    for step in range(20):
        stream.frame(step + 1, row(step))
    wait_until(lambda: list((tmp_path / "spool").glob("*.otlp")))
    with HttpReceiver(receiver.port) as receiver:
        wait_until(lambda: stream.snapshot().metrics.delivered == 40)
        wait_until(lambda: not spool_files_in(tmp_path / "spool"))
        report = stream.close()
        assert receiver.inbox.steps() == dict.fromkeys(range(20), 1)
    assert report.files == ()
    assert list((tmp_path / "spool").iterdir()) == []


# Locks and names.


def test_a_lock_is_held_by_one_and_free_once_given_back(tmp_path):
    path = tmp_path / "a.lock"
    lock = SpoolLock.take(path)
    assert SpoolLock.take(path) is None
    code = f"""
from pathlib import Path
from esper_otel.stream.spool_files import SpoolLock
print(SpoolLock.take(Path({str(path)!r})) is None)
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"
    lock.close()
    assert not path.exists()
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"
    again = SpoolLock.take(path)  # the process that held it has ended
    assert again is not None
    again.close()


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    files = SpoolFiles(tmp_path, "run", 100)
    files.write(batch(b"1"))
    files.close()
    assert contents(tmp_path) == [[b"1"]]


@pytest.mark.parametrize(
    ("name", "lock"),
    [
        ("run-rank0-77-ab12.000001.metrics.otlp", "run-rank0-77-ab12.lock"),
        ("a.b-rank0-77-ab12.1000001.logs.otlp", "a.b-rank0-77-ab12.lock"),
        ("run-rank0.metrics.otlp", None),
        ("run-rank0-77-ab12.000001.metrics.otlp.part", None),
        ("run-rank0-77-ab12.000001.other.otlp", None),
    ],
)
def test_the_lock_of_a_file_follows_from_its_name(tmp_path, name, lock):
    assert lock_path_of(tmp_path / name) == (None if lock is None else tmp_path / lock)


def test_a_run_finds_its_own_files_and_no_others(tmp_path):
    mine = "run-rank1-77-ab12.000001.metrics.otlp"
    others = ["run-rank10-77-ab12", "run-rank1-2-rank1-77-ab12", "other-rank1-77-ab12", "run"]
    for name in (mine, *(f"{other}.000001.metrics.otlp" for other in others)):
        (tmp_path / name).touch()
    assert spool_files_in(tmp_path, "run-rank1") == [tmp_path / mine]


def test_many_files_are_named_by_their_folder():
    files = [Path(f"/spool/{number}") for number in range(MOST_NAMED + 1)]
    assert resend_words(files) == "/spool"
    assert resend_words(files[:2]) == "/spool/0 /spool/1"


def test_nothing_is_logged_where_nothing_happened(keeper, caplog):
    keeper, spool = keeper
    caplog.set_level(logging.INFO)
    assert keeper.finish(spool.seal(), time.monotonic()) == ()
    assert caplog.records == []
