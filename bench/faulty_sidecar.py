"""A small stand-in for the sidecar that goes wrong when told, for :mod:`bench.sidecar_faults`.

    python -m bench.faulty_sidecar SOCKET LATE_MS

Prints a line when it listens, and one for each command it takes from stdin:
``well``, ``late``, ``garbage``, or ``die`` (in the middle of the next answer).
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import NOMINAL, unanswered

GARBAGE = struct.pack("<I", 32) + b"HTTP/1.1 400 Bad Request\r\n\r\n\xff\xff\xff\xff"


def serve(path: Path, late_s: float) -> None:
    """Answer every Ask with a nominal CONTINUE, in the way last told."""
    path.unlink(missing_ok=True)
    manner = "well"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ, "connect")
        selector.register(sys.stdin, selectors.EVENT_READ, "command")
        buffers: dict[socket.socket, wire.MessageBuffer] = {}
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.data == "command":
                    manner = sys.stdin.readline().strip()
                    if not manner:
                        return
                    print(manner, flush=True)
                elif key.data == "connect":
                    connection, _ = listener.accept()
                    buffers[connection] = wire.MessageBuffer()
                    selector.register(connection, selectors.EVENT_READ)
                else:
                    connection = key.fileobj  # type: ignore[assignment]
                    if not answered(connection, buffers[connection], manner, late_s):
                        selector.unregister(connection)
                        del buffers[connection]
                        connection.close()


def answered(
    connection: socket.socket, buffer: wire.MessageBuffer, manner: str, late_s: float
) -> bool:
    """Answer what has come in; False when the client has gone."""
    try:
        data = connection.recv(65536)
        for body in buffer.feed(data):
            message = wire.decode_to_server(body)
            if isinstance(message, wire.Ask):
                answer(connection, message, manner, late_s)
    except OSError:
        return False
    return bool(data)


def answer(connection: socket.socket, ask: wire.Ask, manner: str, late_s: float) -> None:
    reply = wire.encode(wire.Answer(ask.request_id, unanswered("bench", ask.step, NOMINAL)))
    if manner == "die":
        connection.sendall(reply[: len(reply) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    if manner == "late":
        time.sleep(late_s)
    connection.sendall(GARBAGE if manner == "garbage" else reply)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]) / 1e3)
