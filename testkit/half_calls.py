"""gRPC calls that are never finished: HTTP/2 by hand, as far as that takes."""

from __future__ import annotations

import socket
import struct

from testkit.patience import PATIENCE_S

EXPORT = b"/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
DATA, HEADERS, SETTINGS, PING, WINDOW = 0, 1, 4, 6, 8
END_HEADERS = 4
ACK = 1
WINDOW_BYTES = 65_535
FRAME_BYTES = 16_384


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    head = len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + body


def _headers() -> bytes:
    pairs = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", EXPORT),
        (b":authority", b"test"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    )
    return b"".join(
        b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value
        for name, value in pairs
    )


class HalfCalls:
    """One connection with calls whose requests lack their last byte."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0))
        self._received = b""
        self._windows = {0: WINDOW_BYTES}
        self._stream = 1

    def begin(self, size: int) -> int:
        """A call with a request of so many bytes; returns how many of them are taken now.

        Raises ``OSError`` when the connection is closed.
        """
        stream, self._stream = self._stream, self._stream + 2
        self._windows[stream] = WINDOW_BYTES
        self._socket.sendall(_frame(HEADERS, END_HEADERS, stream, _headers()))
        body = b"\0" + struct.pack(">I", size) + bytes(size - 1)
        sent = 0
        while sent < len(body):
            room = min(self._windows[stream], self._windows[0], FRAME_BYTES)
            if room <= 0:
                if not self._read():
                    break
                continue
            part = body[sent : sent + room]
            self._socket.sendall(_frame(DATA, 0, stream, part))
            self._windows[stream] -= len(part)
            self._windows[0] -= len(part)
            sent += len(part)
        return sent

    def close(self) -> None:
        """End the connection, and with it all of its calls."""
        self._socket.close()

    def _read(self) -> bool:
        """Heed what the server says; False when it says nothing for a moment."""
        self._socket.settimeout(0.05)
        try:
            received = self._socket.recv(65536)
        except TimeoutError:
            return False
        finally:
            self._socket.settimeout(PATIENCE_S)
        if not received:
            return False
        self._received += received
        while len(self._received) >= 9:
            length = int.from_bytes(self._received[:3], "big")
            if len(self._received) < 9 + length:
                break
            kind, flags = self._received[3], self._received[4]
            stream = int.from_bytes(self._received[5:9], "big")
            body, self._received = self._received[9 : 9 + length], self._received[9 + length :]
            if kind == WINDOW:
                more = int.from_bytes(body, "big")
                self._windows[stream] = self._windows.get(stream, WINDOW_BYTES) + more
            elif kind in (SETTINGS, PING) and not flags & ACK:
                self._socket.sendall(_frame(kind, ACK, 0, body if kind == PING else b""))
        return True
