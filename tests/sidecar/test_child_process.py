"""Child processes: their pipe, their end, and when one that died is started again."""

import os
import select
import signal
import subprocess
import sys

import pytest

from esper_tamiyo import child_process
from esper_tamiyo.child_process import (
    FIRST_WAIT_S,
    LEAST_TICK,
    LONGEST_WAIT_S,
    REPLACED_AFTER,
    SILENT_AFTER,
    STABLE_AFTER_S,
    START_TICKS,
    ChildProcess,
    Pulse,
    Restarts,
    Starvation,
    end,
)
from sidecar.running import is_alive, until
from testkit.patience import PATIENCE_S


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

    made = []

    def __init__(self):
        super().__init__("esper_tamiyo.serving.table_watch", 10.0, "table watch")
        self.made.append(self)

    def start(self):
        return self._launch(["default", "another version"])  # so it tells of the one it finds

    def reap(self):
        return self._reap()

    def hear(self):
        """Wait until it says something."""
        with select.epoll() as epoll:
            epoll.register(self.pipe, select.EPOLLIN)
            assert epoll.poll(PATIENCE_S)
        assert self.pipe.recv(100_000)
        self.pulse.heard()


@pytest.fixture(autouse=True)
def _no_child_is_left():
    """Also where a test fails, or the tests behind it fail of what it has left."""
    yield
    while TableWatch.made:
        TableWatch.made.pop().close()


def test_a_child_is_heard_through_its_pipe_and_ends_with_it():
    child = TableWatch()
    with select.epoll() as epoll:
        child.watch(epoll)
        assert (child.pipe, child.pid, child.restarts) == (None, None, 0)
        for start in range(2):
            pipe = child.start()
            ((fd, _),) = epoll.poll(PATIENCE_S)
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


def test_a_child_has_time_to_begin_and_less_to_be_silent_afterwards():
    pulse = Pulse()
    pulse.started()
    for _ in range(START_TICKS - 1):
        pulse.missed()
    assert (pulse.began, pulse.is_silent, pulse.is_lost) == (False, False, False)
    pulse.missed()
    assert pulse.is_lost
    pulse.started()
    pulse.heard()
    silent = []
    for _ in range(REPLACED_AFTER):
        pulse.missed()
        silent.append(pulse.is_silent)
    assert silent.index(True) == SILENT_AFTER - 1
    assert pulse.is_lost
    pulse.heard()
    assert (pulse.is_silent, pulse.is_lost) == (False, False)


@pytest.fixture
def idle_machine(monkeypatch):
    monkeypatch.setattr(child_process, "processor_use", lambda pid: (0, 0, False))


def test_a_child_that_hangs_is_told_killed_and_started_again(idle_machine, caplog):
    child = TableWatch()
    child.start()
    assert child.state == "starting"
    child.hear()
    assert child.state == "working"
    os.kill(child.pid, signal.SIGSTOP)
    hung = child.pid
    for _ in range(SILENT_AFTER):
        child.check_pulse()
    assert (child.state, child.pid) == ("silent", hung)
    assert "the table watch process does not respond" in caplog.text
    for _ in range(REPLACED_AFTER - SILENT_AFTER):
        child.check_pulse()
    assert (child.state, child.hung) == ("down", 1)
    assert child.due_in() is not None
    assert caplog.text.count("does not respond") == 2, "once when it is told, once at its end"
    until(lambda: not is_alive(hung))
    child.start()
    child.hear()
    assert (child.state, child.restarts) == ("working", 1)
    child.check_pulse()
    assert child._killed == [], "nobody is left a zombie"
    child.close()


def test_whoever_did_not_listen_for_long_has_missed_one_tick(idle_machine):
    """Asleep, or without a processor: a child that was asleep as well is not killed for it."""
    child = TableWatch()
    child.start()
    child.hear()
    os.kill(child.pid, signal.SIGSTOP)
    child.check_pulse()  # the first tick after an hour
    os.kill(child.pid, signal.SIGCONT)
    child.hear()
    for _ in range(SILENT_AFTER - 1):
        child.check_pulse()
    assert child.state == "working"
    child.close()


def test_a_tick_counts_for_as_much_of_it_as_the_child_did_not_wait_for_a_processor():
    pulse = Pulse()
    pulse.started()
    pulse.heard()
    for _ in range(2 * SILENT_AFTER - 1):
        pulse.missed(starved=0.5)
    assert not pulse.is_silent
    pulse.missed(starved=0.5)
    assert pulse.is_silent, "it may turn in a circle"


def test_a_child_without_any_processor_is_told_of_after_a_minute_at_the_latest():
    pulse = Pulse()
    pulse.started()
    pulse.heard()
    ticks = round(SILENT_AFTER / LEAST_TICK)
    assert ticks > 60
    for _ in range(ticks - 1):
        pulse.missed(starved=1.0)
    assert not pulse.is_silent
    pulse.missed(starved=1.0)
    assert pulse.is_silent
    for _ in range(ticks * REPLACED_AFTER):
        pulse.missed(starved=1.0)
    assert not pulse.is_lost, "another one would have no processor either"
    for _ in range(REPLACED_AFTER):
        pulse.missed()
    assert pulse.is_lost


class Machine:
    """What a system says of a process that never says anything: second by second."""

    def __init__(self, monkeypatch, clock):
        self._clock, self._use = clock, (0, 0, False)
        monkeypatch.setattr(child_process, "processor_use", lambda pid: self._use)

    def second(self, ran=0.0, waited=0.0, wants=False, lasts=1.0):
        before = self._use
        self._use = (before[0] + int(ran * 1e9), before[1] + int(waited * 1e9), wants)
        self._clock[0] += lasts


@pytest.fixture
def machine(monkeypatch, clock):
    return Machine(monkeypatch, clock)


SECONDS = {
    "it waits for a disk, or for a lock": ({}, 0.0),
    "it turns in a circle on an idle machine": ({"ran": 1.0, "wants": True}, 0.0),
    "it turns in a circle beside another": ({"ran": 0.5, "waited": 0.5, "wants": True}, 0.5),
    "it waits for a processor": ({"ran": 0.02, "waited": 0.98, "wants": True}, 0.98),
    "it has not begun to run": ({"wants": True}, 1.0),
    "it waited for long, and then ran": ({"ran": 0.01, "waited": 4.0}, 1.0),
    "whoever asks was away as well": ({"ran": 0.1, "waited": 3.9, "lasts": 4.0}, 0.975),
}


@pytest.mark.parametrize("name", SECONDS)
def test_the_share_of_a_second_in_which_a_child_waited_for_a_processor(name, machine):
    second, share = SECONDS[name]
    starvation = Starvation()
    for _ in range(2):
        machine.second(**second)
        assert starvation.share(1) == pytest.approx(share)


@pytest.mark.parametrize("second", [{"waited": 0.9, "ran": 0.01}, {"wants": True}])
def test_a_child_that_waits_for_a_processor_is_not_taken_for_one_that_hangs(machine, second):
    child = TableWatch()
    child.start()
    child.hear()
    os.kill(child.pid, signal.SIGSTOP)
    for _ in range(3 * REPLACED_AFTER):
        machine.second(**second)
        child.check_pulse()
    assert child.state == "working"
    for _ in range(REPLACED_AFTER):
        machine.second()
        child.check_pulse()
    assert (child.state, child.hung) == ("down", 1)
    child.close()


def test_what_a_process_had_of_a_processor_is_what_the_system_says():
    ran, waited, wants = child_process.processor_use(os.getpid())
    after = child_process.processor_use(os.getpid())
    assert wants, "it runs, to read this"
    assert 0 < ran <= after[0]
    assert 0 <= waited <= after[1]
    assert child_process.processor_use(0) == (0, 0, False)


def test_a_stopped_process_wants_no_processor():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    try:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        first = child_process.processor_use(process.pid)
        assert child_process.processor_use(process.pid) == first
        assert not first[2]
    finally:
        process.kill()
        process.wait()
