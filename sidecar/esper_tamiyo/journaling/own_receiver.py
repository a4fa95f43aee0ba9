"""Whether an endpoint is one of this sidecar's own receivers."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address

LOOPBACK = (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))


def is_ours(endpoint: str, receivers: Iterable[str]) -> bool:
    """Whether what is sent to ``endpoint`` arrives at one of ``receivers``, each an IP
    address with its port.

    A name other than localhost is not looked up, as that may wait on a network.
    """
    host, port = _host_and_port(endpoint)
    if port is None:
        return False
    return any(
        own_port == port and any(_arrives(address, own) for address in _addresses(host))
        for own, own_port in map(_host_and_port, receivers)
    )


def _host_and_port(place: str) -> tuple[str, int | None]:
    """Those of a URL, or of an address without a scheme; port None when it has none."""
    parts = urlsplit(place if "//" in place else f"//{place}")
    try:
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None


def _addresses(host: str) -> Sequence[Ip]:
    """Where a connection to ``host`` may go, as far as its name tells."""
    if host == "localhost":
        return LOOPBACK
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ()
    return LOOPBACK if address.is_unspecified else (address,)


def _arrives(address: Ip, own: str) -> bool:
    """Whether who listens at ``own`` is reached at ``address``."""
    listening = ipaddress.ip_address(own)
    if not listening.is_unspecified:
        return address == listening
    # The wildcard of IPv6 takes IPv4 as well.
    return address.version <= listening.version and _is_of_this_machine(address)


def _is_of_this_machine(address: Ip) -> bool:
    """Whether one could listen there: the system only lets an address of its own be bound."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
