"""When a process that died is started again."""

import signal
import subprocess
import sys

import pytest

from esper_tamiyo import restarts
from esper_tamiyo.restarts import FIRST_WAIT_S, LONGEST_WAIT_S, STABLE_AFTER_S, Restarts, end


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now[0])
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


def test_a_process_that_does_not_end_is_killed():
    script = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [15]); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", script])
    end(process, 0.05)
    assert process.returncode == -signal.SIGKILL
    end(process, 0.0)
    end(None, 0.0)
