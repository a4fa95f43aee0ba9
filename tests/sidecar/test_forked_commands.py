"""A command that a shell has a server of forks run: its streams, its signals and its end."""

import signal
import subprocess
import sys

import pytest

from sidecar.running import is_alive, until
from testkit.fork_server import AS_IT_IS, OwnForkServer, tamiyo_server
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


BECOMES = """
import os, sys
if "esper_tamiyo.cli" in sys.modules:
    os.execv(sys.executable, [sys.executable, *sys.argv])
print("anew")
"""


def test_one_that_is_taken_as_it_is_can_become_another_program(tmp_path):
    (tmp_path / "becomes.py").write_text(BECOMES)
    words = [*tamiyo_server().prefix, AS_IT_IS, sys.executable, "-u", "-c"]
    code = f"import sys; sys.argv = [{str(tmp_path / 'becomes.py')!r}]; exec({BECOMES!r})"
    done = subprocess.run([*words, code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "anew\n"), done.stderr


def test_a_server_can_be_a_fork_of_another_and_ends_when_it_is_closed():
    names = "esper_tamiyo.cli", "colorsys"
    asks = [sys.executable, "-c", f"import sys; print([n in sys.modules for n in {names}])"]
    assert tamiyo_server().run(asks).stdout == "[True, False]\n"
    server = OwnForkServer("colorsys", keeps_ours=True, of=tamiyo_server())
    assert server.run(asks).stdout == "[True, True]\n"
    server.close()
    with pytest.raises(ConnectionRefusedError):
        server.run(asks)
