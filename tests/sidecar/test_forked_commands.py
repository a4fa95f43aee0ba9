"""A command that a shell has a server of forks run: its streams, its signals and its end."""

import signal
import subprocess
import sys

import pytest

from sidecar.running import is_alive, until
from testkit.fork_server import tamiyo_server
from testkit.patience import PATIENCE_S

WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print(os.getpid(), flush=True)
time.sleep(1000)
"""


def forked(code, **streams):
    command = [*tamiyo_server().prefix, sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **streams)


def test_it_has_the_streams_of_who_asked_and_its_status_is_told():
    code = "import sys; print(sys.stdin.read().upper()); sys.exit(3)"
    with forked(code, stdin=subprocess.PIPE) as asks:
        output, _ = asks.communicate("words", timeout=PATIENCE_S)
    assert (output, asks.returncode) == ("WORDS\n", 3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_that_ends_it_ends_who_asked(number):
    with forked(f"import os; os.kill(os.getpid(), {int(number)})") as asks:
        assert asks.wait(PATIENCE_S) == -number


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 5), (signal.SIGKILL, -9)])
def test_it_does_not_outlive_who_asked(number, status):
    with forked(WAITS) as asks:
        pid = int(asks.stdout.readline())
        assert is_alive(pid)
        asks.send_signal(number)
        assert asks.wait(PATIENCE_S) == status
        until(lambda: not is_alive(pid))
