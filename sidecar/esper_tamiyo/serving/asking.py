"""The tools' side of the decision socket: one request, one reply, in blocking calls."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from esper_otel.leyline.folders import check_socket_path
from esper_otel.leyline.wire import (
    LatestRequest,
    MessageBuffer,
    SilenceRequest,
    StatusRequest,
    ToClient,
    WireError,
    decode_to_client,
    encode,
    may_steer,
    peer_uid,
)

PATIENCE_S = 2.0

ToolRequest = LatestRequest | StatusRequest | SilenceRequest


class NoAnswerError(Exception):
    """Nobody answered at the socket; the text says which one and why."""


def reply_to(request: ToolRequest, path: Path) -> ToClient:
    """What the sidecar at ``path`` replies; raises :class:`NoAnswerError`."""
    try:
        check_socket_path(path)
    except ValueError as error:
        raise NoAnswerError(str(error)) from None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE_S)
        try:
            connection.connect(os.fspath(path))
            if not may_steer(uid := peer_uid(connection)):  # it could make up any answer
                raise NoAnswerError(f"{path}: listened on by another user ({uid})")
            connection.sendall(encode(request))
            return _one_message(connection)
        except TimeoutError:
            raise NoAnswerError(f"{path}: no answer within {PATIENCE_S:g} s") from None
        except (FileNotFoundError, ConnectionRefusedError):
            message = f"{path}: no sidecar listens there; start one with `tamiyo serve`"
            raise NoAnswerError(message) from None
        except (OSError, WireError) as error:
            raise NoAnswerError(f"{path}: {error}") from None


def _one_message(connection: socket.socket) -> ToClient:
    buffer = MessageBuffer()
    while True:
        data = connection.recv(64 * 1024)
        if not data:
            raise WireError("the connection ended before an answer")
        for body in buffer.feed(data):
            return decode_to_client(body)
