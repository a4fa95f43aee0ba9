"""Ports of this machine: free ones, and who is told when one is taken."""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"


def free(count: int) -> list[int]:
    """So many ports that nobody listened on a moment ago."""
    sockets = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def is_free(port: int) -> bool:
    """Whether one could listen there now."""
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError:
        return False
    return True
