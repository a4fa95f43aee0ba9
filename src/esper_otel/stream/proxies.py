"""Proxies: which one the environment names for a receiver, if any.

``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``, in either case, as Python's own
``urllib`` reads them, with two things that it does not know: what is on this machine is never
behind a proxy, and ``NO_PROXY`` may name networks (``10.0.0.0/8``).
"""

from __future__ import annotations

import ipaddress
import logging
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, getproxies_environment, proxy_bypass

from esper_otel.leyline.endpoints import shown_endpoint

log = logging.getLogger("esper_otel")

_told: set[str] = set()


def proxy_for(url: SplitResult) -> SplitResult | None:
    """The proxy on the way to ``url``; one whose address is none is told of and left out."""
    if needs_no_proxy(url.hostname or ""):
        return None
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(url.netloc.rpartition("@")[2]):
        return None
    try:
        found = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        is_usable = bool(found.hostname) and found.port != 0
    except ValueError:
        is_usable = False
    if is_usable and found.scheme in ("http", "https"):
        return found
    if proxy not in _told:
        _told.add(proxy)
        log.warning(
            "%s_PROXY: expected an address such as http://proxy:3128, got %r; telemetry is "
            "sent without a proxy",
            url.scheme.upper(),
            shown_endpoint(proxy),
        )
    return None


def needs_no_proxy(host: str) -> bool:
    """Whether ``host`` is this machine, or in a network that ``NO_PROXY`` names."""
    return is_loopback(host) or _is_in_network(host)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine, by its name or its address (RFC 6761, RFC 6890)."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and address.is_loopback


def _is_in_network(host: str) -> bool:
    """Whether ``NO_PROXY`` has a network that ``host``, an address, is in."""
    address = _address(host.strip("[]"))
    if address is None:
        return False
    for entry in getproxies_environment().get("no", "").split(","):
        try:
            network = ipaddress.ip_network(entry.strip(), strict=False)
        except ValueError:
            continue
        if address.version == network.version and address in network:
            return True
    return False


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
