"""Tool requests: the tools' side of the decision socket, one request and one reply."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from esper_otel.leyline.folders import check_socket_path
from esper_otel.leyline.wire import (
    LatestRequest,
    MessageBuffer,
    RecentRequest,
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

ToolRequest = LatestRequest | RecentRequest | StatusRequest | SilenceRequest


class NoAnswerError(Exception):
    """Nobody answered at the socket; the text says which one and why."""


def reply_to(request: ToolRequest, path: Path, patience_s: float = PATIENCE_S) -> ToClient:
    """What the sidecar at ``path`` replies, which is waited for; or :class:`NoAnswerError`."""
    try:
        check_socket_path(path)
    except ValueError as error:
        raise NoAnswerError(str(error)) from None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(patience_s)
        try:
            connection.connect(os.fspath(path))
            if not may_steer(uid := peer_uid(connection)):  # it could make up any answer
                raise NoAnswerError(f"{path}: listened on by another user ({uid})")
            connection.sendall(encode(request))
            return _one_message(connection)
        except TimeoutError:
            raise NoAnswerError(f"{path}: no answer within {patience_s:g} s") from None
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
