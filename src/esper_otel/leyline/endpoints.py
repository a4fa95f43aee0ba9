"""Endpoints and their secrets: the printable part of ``OTEL_EXPORTER_OTLP_*``.

A URL can carry a user and a password, or a key in its query, and headers carry tokens. None of
that belongs into a message, a log, a status or a span.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from urllib.parse import unquote

HIDDEN = "***"


def shown_endpoint(endpoint: str) -> str:
    """``endpoint``, a URL or a gRPC target, without user, password, query and fragment.

    An ``@`` in a path takes what is before it along: a password may hold any sign, and a URL
    that is none must not show it.
    """
    scheme, slashes, rest = endpoint.partition("://")
    if not slashes:
        scheme, rest = "", endpoint
    shown = rest.rpartition("@")[2]
    for sign in "?#":
        shown = shown.partition(sign)[0]
    return f"{scheme}{slashes}{shown}" if slashes else shown


def secrets_in(environ: Mapping[str, str]) -> list[str]:
    """The parts of ``OTEL_EXPORTER_OTLP_*`` that must not be shown, longest first."""
    found: set[str] = set()
    for name, value in environ.items():
        if not name.startswith("OTEL_EXPORTER_OTLP_"):
            continue
        if name.endswith("ENDPOINT"):
            found.update(_secrets_of_url(value))
        elif name.endswith("HEADERS"):
            for pair in value.split(","):
                found.update((pair.strip(), pair.partition("=")[2].strip()))
    found |= {unquote(secret) for secret in found}
    # One or two signs would blacken whatever text they are in.
    return sorted((each for each in found if len(each) > 2), key=len, reverse=True)


def hiding(environ: Mapping[str, str]) -> Callable[[logging.LogRecord], bool]:
    """A filter for log handlers: no line that passes it shows a secret of ``environ``.

    Libraries write what they were given into their warnings.
    """
    secrets = secrets_in(environ)

    def cleaned(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        return text

    def hide(record: logging.LogRecord) -> bool:
        if secrets:
            record.msg, record.args = cleaned(record.getMessage()), ()
            if record.exc_info:
                record.exc_text = cleaned(logging.Formatter().formatException(record.exc_info))
        return True

    return hide


def _secrets_of_url(url: str) -> set[str]:
    rest = url.partition("://")[2] or url
    user, at, _ = rest.rpartition("@")
    found = {user, user.partition(":")[2] or user} if at else set()
    found.add(rest.partition("?")[2])
    return found
