"""Child processes: their pipe, their end, and when one that died is started again."""

import select
import signal
import subprocess
import sys

import pytest

from esper_tamiyo import child_process
from esper_tamiyo.child_process import (
    FIRST_WAIT_S,
    LONGEST_WAIT_S,
    STABLE_AFTER_S,
    ChildProcess,
    Restarts,
    end,
)
from sidecar.running import is_alive, until


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(child_process.time, "monotonic", lambda: now[0])
    return now


def test_a_process_that_keeps_dying_is_started_ever_later(clock):
    process = Restarts()
    assert process.count == 0
    waits = []
    for _ in range(10):
        process.started()
        assert process.due_in() is None
        waits.append(process.ended())
        assert process.due_in() == pytest.approx(waits[-1])
        clock[0] += waits[-1]
        assert process.due_in() == 0.0
    assert waits[:3] == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S]
    assert waits[-1] == LONGEST_WAIT_S
    assert process.count == 9


def test_one_that_lived_for_a_while_is_started_soon_again(clock):
    process = Restarts()
    for _ in range(5):
        process.started()
        process.ended()
    process.started()
    clock[0] += STABLE_AFTER_S
    assert process.ended() == FIRST_WAIT_S


def test_a_start_that_fails_is_tried_ever_later_though_the_last_process_lived_long(clock):
    process = Restarts()
    process.started()
    clock[0] += STABLE_AFTER_S
    assert [process.ended() for _ in range(3)] == [
        FIRST_WAIT_S,
        2 * FIRST_WAIT_S,
        4 * FIRST_WAIT_S,
    ]


class TableWatch(ChildProcess):
    """The process that watches a table's file."""

    def __init__(self):
        super().__init__("esper_tamiyo.serving.table_watch", end_patience_s=10.0)

    def start(self):
        return self._launch(["default", "another version"])  # so it tells of the one it finds

    def reap(self):
        return self._reap()


def test_a_child_is_heard_through_its_pipe_and_ends_with_it():
    child = TableWatch()
    with select.epoll() as epoll:
        child.watch(epoll)
        assert (child.pipe, child.pid, child.restarts) == (None, None, 0)
        for start in range(2):
            pipe = child.start()
            ((fd, _),) = epoll.poll(15.0)
            assert child.has_pipe(fd)
            assert pipe.recv(100)
            assert (child.restarts, child.due_in()) == (start, None)
            pid = child.pid
            if start == 0:
                assert child.reap() == FIRST_WAIT_S
                assert child.due_in() > 0.0
            else:
                child.close()
            assert (child.pipe, child.pid) == (None, None)
            assert not child.has_pipe(fd)
            until(lambda pid=pid: not is_alive(pid))
            assert epoll.poll(0.0) == []


def test_a_child_that_cannot_be_started_leaves_no_pipe(monkeypatch):
    def refused(*arguments, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(child_process.subprocess, "Popen", refused)
    child = TableWatch()
    with pytest.raises(BlockingIOError):
        child.start()
    assert (child.pipe, child.pid, child.restarts) == (None, None, 0)
    assert child.reap() == FIRST_WAIT_S


def test_a_process_that_does_not_end_is_killed():
    script = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [15]); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", script])
    end(process, 0.05)
    assert process.returncode == -signal.SIGKILL
    end(process, 0.0)
    end(None, 0.0)
