"""Where the decision socket may be, and who may talk through it."""

import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from esper_otel.leyline import tool_requests
from esper_otel.leyline.wire import may_steer, peer_uid
from esper_tamiyo.serving import listening
from esper_tamiyo.serving.listening import DecisionSocket, SocketError
from sidecar.running import sidecar, tamiyo

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")


def refusal(path):
    with pytest.raises(SocketError) as caught:
        DecisionSocket(path)
    return str(caught.value)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_socket_and_every_new_folder_are_private_whatever_the_umask(tmp_path):
    path = tmp_path / "run" / "esper" / "t.sock"
    before = os.umask(0)
    try:
        listener = DecisionSocket(path)
    finally:
        os.umask(before)
    assert mode_of(path) == 0o600
    assert mode_of(path.parent) == mode_of(path.parent.parent) == 0o700
    listener.close()
    assert not path.exists()


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o755, 0o777, 0o1777])
def test_a_folder_that_others_may_enter_is_refused(tmp_path, mode):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    assert refusal(folder / "t.sock") == (
        f"{folder}: others may enter it (mode {mode:04o}); expected mode 0700, or a "
        "--socket in a folder that is still to be made"
    )
    DecisionSocket(folder / "made" / "t.sock").close()


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    else:
        monkeypatch.setattr(listening.os, "geteuid", lambda: 4242)
    owner = folder.stat().st_uid
    assert refusal(folder / "t.sock") == (
        f"{folder}: belongs to user {owner}, and we are user {listening.os.geteuid()}; "
        "choose a --socket in a folder of our own, or one that is still to be made"
    )


def test_a_symbolic_link_in_the_folder_s_place_is_refused(tmp_path):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(real)
    assert refusal(link / "t.sock") == f"{link}: is a symbolic link; expected a folder"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    assert refusal(dangling / "t.sock") == f"{dangling}: is a symbolic link; expected a folder"
    assert not (tmp_path / "nowhere").exists()
    DecisionSocket(link / "made" / "t.sock").close()  # links above it are the system's business


def test_a_symbolic_link_in_the_socket_s_place_is_refused(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    path = tmp_path / "t.sock"
    path.symlink_to(precious)
    assert refusal(path) == f"{path}: exists and is not a socket; choose another --socket"
    assert precious.read_text() == "mine"


def test_other_places_a_socket_cannot_be(tmp_path):
    assert "a Unix socket's path may have 107 bytes" in refusal(tmp_path / ("x" * 120))
    plain = tmp_path / "file"
    plain.write_text("mine")
    assert refusal(plain) == f"{plain}: exists and is not a socket; choose another --socket"
    assert refusal(plain / "t.sock") == f"{plain}: is not a folder"
    assert refusal(plain / "a" / "t.sock").endswith(": Not a directory")


@pytest.mark.parametrize("decoy", [False, True])
def test_a_folder_exchanged_between_check_and_bind_is_noticed(tmp_path, monkeypatch, decoy):
    folder = tmp_path / "esper"
    bound = listening._bound

    def exchange_first(path):
        folder.rename(tmp_path / "moved")
        if decoy:
            (tmp_path / "moved" / path.name).write_text("in the folder that was checked")
        folder.mkdir(mode=0o700)
        return bound(path)

    monkeypatch.setattr(listening, "_bound", exchange_first)
    message = f"{folder}: was replaced by another folder meanwhile"
    assert refusal(folder / "t.sock") == message


def test_a_path_that_was_taken_over_is_left_to_its_new_owner(tmp_path):
    path = tmp_path / "t.sock"
    listener = DecisionSocket(path)
    path.rename(tmp_path / "moved.sock")
    path.write_text("not ours")
    listener.close()
    assert path.read_text() == "not ours"


def test_the_peer_is_known_by_the_kernel():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_uid(ours) == os.geteuid()
    assert may_steer(os.geteuid())
    assert may_steer(0)
    assert not may_steer(os.geteuid() + 12345)


def test_tools_believe_no_sidecar_of_another_user(tmp_path, monkeypatch):
    listener = DecisionSocket(tmp_path / "t.sock")
    monkeypatch.setattr(tool_requests, "may_steer", lambda uid: False)
    with pytest.raises(tool_requests.NoAnswerError, match="listened on by another user"):
        tool_requests.reply_to(tool_requests.StatusRequest(), tmp_path / "t.sock")
    listener.close()


def knock(path, user):
    """What that user hears at the socket."""
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(user, user, user)
            with socket.socket(socket.AF_UNIX) as knocking:
                knocking.settimeout(10)
                knocking.connect(os.fspath(path))
                os.write(tell, b"heard %r" % knocking.recv(100))
        except OSError as error:
            os.write(tell, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(tell)
    os.waitpid(child, 0)
    with os.fdopen(hear) as heard:
        return heard.read()


@pytest.fixture
def reachable():
    """A folder that other users could get to, were what is in it not private."""
    folder = Path(tempfile.mkdtemp(prefix="esper-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@as_root
def test_another_user_cannot_even_connect(reachable):
    with sidecar(reachable / "own" / "t.sock") as running:
        assert knock(running.socket, NOBODY) == "PermissionError"


@as_root
def test_another_user_is_hung_up_on_where_the_fences_were_loosened(reachable):
    with sidecar(reachable / "own" / "t.sock") as running:
        running.socket.parent.chmod(0o755)
        running.socket.chmod(0o666)
        assert knock(running.socket, NOBODY) in ("heard b''", "ConnectionResetError")
        assert running.status()["connections"]["turned_away"] == 1


def test_the_command_says_it_in_one_line(tmp_path):
    tmp_path.chmod(0o755)
    ended = tamiyo("serve", "--no-ingest", "--socket", tmp_path / "t.sock")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"tamiyo: {tmp_path}: others may enter it (mode 0755); ")
    assert ended.stderr.count("\n") == 1
