"""A real ``tamiyo serve`` for tests, and a client that says exactly what it is told."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS, STEP_SLOT
from esper_otel.leyline.wire import (
    PROTOCOL,
    Ask,
    Check,
    Hello,
    LatestRequest,
    MessageBuffer,
    StatusRequest,
    decode_to_client,
    encode,
)
from testkit.fork_server import tamiyo_server
from testkit.patience import PATIENCE_S

TAMIYO = str(Path(sys.executable).with_name("tamiyo"))
IS_MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ
"""Coverage is measured of processes that start, and of no forks."""


def until(condition, patience_s=PATIENCE_S):
    """Poll ``condition`` until it is true; fail when it does not become so."""
    began = time.monotonic()
    while True:
        found = condition()
        if found:
            return found
        waited = time.monotonic() - began
        assert waited < patience_s, "did not come true in time"
        # The longer it has taken, the less often: who is asked has other things to do.
        time.sleep(min(0.1, max(0.01, waited / 20)))


def is_alive(pid):
    """Whether that process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def tamiyo(*arguments):
    """Run the command to its end."""
    command = [TAMIYO, *map(str, arguments)]
    if IS_MEASURED:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    return tamiyo_server().run(command, timeout=PATIENCE_S)


def row_of(step, values):
    """A row in registry order."""
    row = step_row()
    for key, value in {"step": float(step), "nonfinite": 0.0, **values}.items():
        row[STEP_SLOT[key]] = value
    return row


class Client:
    """One connection of the decision socket, in blocking calls."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            # Without a time-out, with which a connection that has to wait is refused.
            self.socket.connect(os.fspath(path))
        except OSError:
            self.socket.close()
            raise
        self.socket.settimeout(PATIENCE_S)
        self._buffer = MessageBuffer()
        self._received = []

    def send(self, message):
        self.socket.sendall(encode(message))

    def receive(self):
        """The next message, None when the server has hung up."""
        while not self._received:
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._received += [decode_to_client(body) for body in self._buffer.feed(data)]
        return self._received.pop(0)

    def call(self, message):
        self.send(message)
        return self.receive()

    def hello(self, run="run", instance="one", rank=0, columns=STEP_KEYS, mode=""):
        return self.call(
            Hello(PROTOCOL, run, instance, rank, 1, list(columns), list(SEED_KEYS), mode)
        )

    def ask(self, step, **asked):
        """The decision about a step with these values."""
        return self.answer(step, **asked).decision

    def answer(self, step, request_id=None, proposal=None, seeds=(), **values):
        """The whole answer to the ask about a step."""
        request_id = step if request_id is None else request_id
        row = row_of(step, values)
        answer = self.call(Ask(request_id, step, step + 1, row, list(seeds), proposal))
        assert answer.request_id == request_id
        return answer

    def check(self, step, request_id=10_000, **values):
        """The decision about the update of a step of which this is known."""
        answer = self.call(Check(request_id, step, step + 1, row_of(step, values)))
        assert (answer.request_id, answer.guards) == (request_id, None)
        return answer.decision

    def status(self):
        return self.call(StatusRequest()).report

    def latest(self, run="", rank=0):
        return self.call(LatestRequest(run, rank)).decision

    def close(self):
        self.socket.close()


class Sidecar:
    """A running sidecar."""

    def __init__(self, process, words):
        self.process = process
        self.words = words
        self.socket = Path(words["socket"])

    @contextmanager
    def client(self):
        client = Client(self.socket)
        try:
            yield client
        finally:
            client.close()

    def status(self):
        with self.client() as client:
            return client.status()


def _started(command, stderr, is_forked):
    """A process, and what it writes to standard output."""
    if not is_forked:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        return process, process.stdout
    reading, writing = os.pipe()
    try:
        process = tamiyo_server().start(command, stdout=writing, stderr=stderr or 2)
    finally:
        os.close(writing)
    return process, os.fdopen(reading)


@contextmanager
def sidecar(path, *arguments, ingest=False, stderr=None, is_forked=True):
    """A sidecar at ``path``; its end is checked to be a clean one.

    It and its children begin with their modules loaded, unless not ``is_forked``, which is for
    tests of the processes themselves: how they start, their names, their memory.
    """
    receivers = (
        ("--otlp-grpc", "127.0.0.1:0", "--otlp-http", "127.0.0.1:0")
        if ingest
        else ("--no-ingest",)
    )
    command = [TAMIYO, "serve", "--socket", str(path), *receivers, *map(str, arguments)]
    process, output = _started(command, stderr, is_forked and not IS_MEASURED)
    try:
        with output:
            line = output.readline()
        assert line.startswith("tamiyo ready "), line
        words = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)
        yield Sidecar(process, words)
        if process.poll() is None:
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
            assert not path.exists()
    finally:
        process.kill()
        process.wait()
