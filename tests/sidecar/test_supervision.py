"""A supervisor is told that the sidecar is ready, alive and about to end."""

import socket

import pytest

from esper_tamiyo.serving.server import ALIVE, READY, STOPPING, notify
from sidecar.running import PATIENCE_S, sidecar


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def test_the_sidecar_says_when_it_is_ready_and_that_its_loop_turns(tmp_path, supervisor):
    with sidecar(tmp_path / "t.sock", is_forked=False):
        said = {supervisor.recv(100).decode() for _ in range(3)}
        assert said == {READY, ALIVE}
    last = ""
    while last != STOPPING:
        last = supervisor.recv(100).decode()


@pytest.mark.parametrize(
    "address", ["", "nonsense", "/no/such/socket", "@no-such-name", "/" * 200]
)
def test_where_nobody_listens_nothing_happens(monkeypatch, address):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify(READY)
