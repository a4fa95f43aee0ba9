"""Where the OTLP receivers listen."""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple


class AddressError(ValueError):
    """Not an address the sidecar would listen at."""


class Address(NamedTuple):
    """A host and a port; port 0 leaves the choice to the system."""

    host: str
    port: int

    def __str__(self) -> str:
        """As it is written in an option or URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address in ``HOST:PORT``; raises :class:`AddressError`."""
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
            raise AddressError(f'expected HOST:PORT, got "{text}"')
        if host == "localhost":
            host = "127.0.0.1"
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise AddressError(f'expected an IP address or localhost, got "{host}"') from None
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.host).is_loopback


def bind_refusal(address: Address) -> str | None:
    """Why the system would not let us listen there, None when it would.

    gRPC only says that it failed; trying first gives the reason a person can act on.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            return (error.strerror or str(error)).lower()
    return None
