"""Destination: where OTLP goes, as the standard ``OTEL_*`` variables say.

The rules are those of the OpenTelemetry specification ("OTLP Exporter", "Environment
variables"). A value that cannot be used never stops a training run: it is warned about
with its name, its value and what was expected, and the default takes its place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import msgspec

from esper_otel.leyline.endpoints import shown_endpoint

log = logging.getLogger("esper_otel")

_T = TypeVar("_T")


class Signal(StrEnum):
    """What kind of telemetry; the value is its name in URLs and file names."""

    METRICS = "metrics"
    TRACES = "traces"
    LOGS = "logs"

    __hash__ = str.__hash__  # an enumeration's own is Python, called for each look-up


class OtlpProtocol(StrEnum):
    """How OTLP travels."""

    HTTP = "http/protobuf"
    GRPC = "grpc"


class Destination(msgspec.Struct, frozen=True, kw_only=True):
    """One receiver of one signal.

    ``endpoint`` is a whole URL for HTTP and a target (``host:port``) for gRPC, where
    ``secure`` says whether TLS is spoken. Certificates are paths of PEM files.
    """

    signal: Signal
    protocol: OtlpProtocol
    endpoint: str
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 10.0
    gzip: bool = False
    secure: bool = False
    certificate: str | None = None
    client_key: str | None = None
    client_certificate: str | None = None

    @property
    def shown(self) -> str:
        """The endpoint as a message may name it: without user, password and query."""
        return shown_endpoint(self.endpoint)


def is_disabled(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``OTEL_SDK_DISABLED`` asks for no telemetry at all."""
    environ = os.environ if environ is None else environ
    return environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def destinations(environ: Mapping[str, str] | None = None) -> dict[Signal, Destination]:
    """The receiver of each signal that is sent at all."""
    warned: set[str] = set()
    variables = {
        signal: _Variables(os.environ if environ is None else environ, signal, warned)
        for signal in Signal
    }
    return {
        signal: _destination(signal, its)
        for signal, its in variables.items()
        if its.is_exported()
    }


class _Variables:
    """``OTEL_EXPORTER_OTLP_*`` as one signal sees them: its own variable wins."""

    def __init__(self, environ: Mapping[str, str], signal: Signal, warned: set[str]) -> None:
        self._environ = environ
        self._signal = signal.upper()
        self._warned = warned

    def find(self, name: str) -> tuple[str, str]:
        """(variable, value) of the first that is set, else the general name and ""."""
        general = f"OTEL_EXPORTER_OTLP_{name}"
        own = f"OTEL_EXPORTER_OTLP_{self._signal}_{name}"
        for variable in (own, general):
            value = self._environ.get(variable, "").strip()
            if value:
                return variable, value
        return general, ""

    def choose(
        self, name: str, default: _T, expected: str, parse: Callable[[str], _T | None]
    ) -> _T:
        """The parsed value, or ``default`` with a warning where ``parse`` gives None."""
        variable, value = self.find(name)
        if not value:
            return default
        parsed = parse(value)
        if parsed is None:
            self.warn(variable, repr(value), expected, str(default))
            return default
        return parsed

    def warn(self, variable: str, value: str, expected: str, instead: str) -> None:
        """Say once that a value cannot be used and what is used in its place."""
        message = f"{variable}={value}: expected {expected}; using {instead}"
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)

    def is_exported(self) -> bool:
        """Whether ``OTEL_<SIGNAL>_EXPORTER`` has the signal sent.

        ``console`` prints metrics (:mod:`~esper_otel.stream.console`), and alone it sends none.
        """
        variable = f"OTEL_{self._signal}_EXPORTER"
        value = self._environ.get(variable, "").strip()
        names = {name.strip().lower() for name in value.split(",")} - {""}
        here = {"none", "console"} if self._signal == Signal.METRICS.upper() else {"none"}
        if names and names <= here:
            return False
        if names and "otlp" not in names:
            known = "otlp, console or none" if "console" in here else "otlp or none"
            self.warn(variable, repr(value), known, "otlp")
        return True


def _destination(signal: Signal, variables: _Variables) -> Destination:
    protocol = variables.choose(
        "PROTOCOL", OtlpProtocol.HTTP, "http/protobuf or grpc", _protocol
    )
    endpoint, secure = (
        _grpc_target(variables)
        if protocol is OtlpProtocol.GRPC
        else (_http_url(signal, variables), False)
    )
    return Destination(
        signal=signal,
        protocol=protocol,
        endpoint=endpoint,
        secure=secure,
        headers=_headers(variables),
        # The specification says milliseconds, the Python SDK reads seconds. Whoever sets
        # the variable in a Python process means what the SDK makes of it.
        timeout_s=variables.choose("TIMEOUT", 10.0, "a number of seconds above 0", _seconds),
        gzip=variables.choose("COMPRESSION", "none", "gzip or none", _compression) == "gzip",
        certificate=_file("CERTIFICATE", variables),
        client_key=_file("CLIENT_KEY", variables),
        client_certificate=_file("CLIENT_CERTIFICATE", variables),
    )


def _protocol(value: str) -> OtlpProtocol | None:
    return OtlpProtocol(value.lower()) if value.lower() in list(OtlpProtocol) else None


def _seconds(value: str) -> float | None:
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 < seconds < float("inf") else None


def _compression(value: str) -> str | None:
    return value.lower() if value.lower() in ("gzip", "none") else None


def _http_url(signal: Signal, variables: _Variables) -> str:
    """The signal's own endpoint as it is, or the general one with the signal's path."""
    variable, value = variables.find("ENDPOINT")
    default = "http://localhost:4318"
    if value and not _is_http(value):
        shown = repr(shown_endpoint(value))
        variables.warn(variable, shown, "an http:// or https:// URL", default)
        value = ""
    if value and variable != "OTEL_EXPORTER_OTLP_ENDPOINT":
        return value
    return f"{(value or default).rstrip('/')}/v1/{signal}"


def _is_http(value: str) -> bool:
    try:
        url = urlsplit(value)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def _grpc_target(variables: _Variables) -> tuple[str, bool]:
    """(target, whether TLS): the scheme decides, ``INSECURE`` where there is none."""
    variable, value = variables.find("ENDPOINT")
    if not value:
        return "localhost:4317", False
    if value.startswith(("http://", "https://")):
        if _is_http(value):
            url = urlsplit(value)
            return url.netloc.rpartition("@")[2], url.scheme == "https"
        expected = "a URL or a gRPC target such as host:4317"
        shown = repr(shown_endpoint(value))
        variables.warn(variable, shown, expected, "http://localhost:4317")
        return "localhost:4317", False
    insecure = variables.choose("INSECURE", False, "true or false", _boolean)
    if not value.startswith("unix"):
        value = value.rpartition("@")[2]  # a target has no user, and errors of gRPC show it
    return value, not insecure


def _boolean(value: str) -> bool | None:
    return {"true": True, "false": False}.get(value.lower())


def _headers(variables: _Variables) -> tuple[tuple[str, str], ...]:
    """``key=value`` pairs, values percent-decoded; a pair that is none is left out.

    The warning shows neither key nor value: headers carry credentials.
    """
    variable, text = variables.find("HEADERS")
    headers: dict[str, str] = {}
    for number, pair in enumerate(text.split(","), 1):
        if not pair.strip():
            continue
        key, equals, value = pair.partition("=")
        key, value = unquote(key).strip().lower(), unquote(value).strip()
        if not equals or not _is_token(key) or not (value.isascii() and value.isprintable()):
            variables.warn(
                variable,
                "(hidden)",
                f"entry {number} to be key=value in printable ASCII",
                "the others",
            )
            continue
        headers[key] = value
    return tuple(headers.items())


_TOKEN = "abcdefghijklmnopqrstuvwxyz0123456789-_."


def _is_token(key: str) -> bool:
    """Whether both HTTP and gRPC take ``key`` as the name of a header."""
    return bool(key) and not key.strip(_TOKEN)


def _file(name: str, variables: _Variables) -> str | None:
    return variables.choose(name, None, "a readable file", _readable)


def _readable(path: str) -> str | None:
    return path if os.access(path, os.R_OK) else None
