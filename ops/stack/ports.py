"""Ports of this machine: free ones, and who is told when one is taken."""

from __future__ import annotations

import secrets
import socket

LOOPBACK = "127.0.0.1"
LOWEST, HIGHEST = 20_000, 32_000
PATIENCE = 10_000
"""How many ports are tried."""


def free(count: int) -> list[int]:
    """So many ports that nobody listens on.

    From below the range that the system gives to connections and to whoever asks for port
    0: one of those could be taken again before its program has come up.
    """
    found: list[int] = []
    for _ in range(PATIENCE):
        port = LOWEST + secrets.randbelow(HIGHEST - LOWEST)
        if port not in found and is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"{len(found)} of {count} ports could be had on {LOOPBACK}")


def is_free(port: int) -> bool:
    """Whether one could listen there now."""
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError:
        return False
    return True
