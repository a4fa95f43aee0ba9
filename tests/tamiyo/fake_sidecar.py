"""A sidecar of the tests' own, which answers as it is told to."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from msgspec import structs

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import Action, Decision, Severity

Request = wire.Ask | wire.Check


def decision_about(ask: Request) -> Decision:
    return Decision(
        id=f"test/{ask.step}",
        run="test",
        step=ask.step,
        observed_step=ask.step,
        action=Action.OPTIMIZER,
        severity=Severity.HIGH,
        reason="a_rule",
        parameters={"lr_scale": 0.5},
    )


def all_is_well(ask: Request) -> list[bytes]:
    """What an ask is answered when there is nothing to decide."""
    told = structs.replace(
        decision_about(ask),
        action=Action.CONTINUE,
        severity=Severity.NORMAL,
        reason="nominal",
        parameters={},
    )
    return [wire.encode(wire.Answer(ask.request_id, told))]


def answer(ask: Request, guards: list[wire.Guard] | None = None) -> list[bytes]:
    return [wire.encode(wire.Answer(ask.request_id, decision_about(ask), guards))]


class FakeSidecar:
    """Serves connections, each on its thread; ``reply`` turns a request into what is sent.

    A reply of ``[b""]`` closes the connection. ``reply_to_run``, which also gets the Hello of
    the connection, is used instead where it is set.
    """

    def __init__(self, path: Path, reply: Callable[[Request], list[bytes]] = answer) -> None:
        self.reply = reply
        self.reply_to_run: Callable[[Request, wire.Hello], list[bytes]] | None = None
        self.asks: list[wire.Ask] = []
        self.asks_of: dict[str, list[wire.Ask]] = {}
        """Asks by the run of the connection."""
        self.checks: list[wire.Check] = []
        self.goodbyes: list[wire.Goodbye] = []
        self.takes_goodbyes = True
        self.hellos: list[wire.Hello] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(path))
        self._listener.listen(8)
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        for each in (*self._open, self._listener):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in (self._thread, *self._threads):
            thread.join(5)

    def __enter__(self) -> FakeSidecar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            thread = threading.Thread(target=self._serve_one, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve_one(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._talk(connection)
        connection.close()

    def _talk(self, connection: socket.socket) -> None:
        buffer = wire.MessageBuffer()
        hello: wire.Hello | None = None
        while data := connection.recv(65536):
            for body in buffer.feed(data):
                message = wire.decode_to_server(body)
                if isinstance(message, wire.Hello):
                    hello = message
                    self.hellos.append(message)
                    welcome = wire.Welcome(wire.PROTOCOL, "table 1", self.takes_goodbyes)
                    connection.sendall(wire.encode(welcome))
                elif isinstance(message, wire.Goodbye):
                    self.goodbyes.append(message)
                elif isinstance(message, Request):
                    (self.asks if isinstance(message, wire.Ask) else self.checks).append(
                        message
                    )
                    if hello is not None and isinstance(message, wire.Ask):
                        self.asks_of.setdefault(hello.run, []).append(message)
                    special = self.reply_to_run
                    if special is not None and hello is not None:
                        parts = special(message, hello)
                    else:
                        parts = self.reply(message)
                    for part in parts:
                        if not part:
                            return
                        connection.sendall(part)
