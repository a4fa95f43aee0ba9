"""Environment: ``OTEL_*`` variables that OpenTelemetry's own code would raise about.

Some of its modules read variables while they are imported, and raise for a value that they
cannot use: a limit that is no number, a propagator that is set for a whole cluster and not
installed here. Then nothing could be recorded. So they are loaded within :func:`usable`, which
keeps such a value from them, and says so once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points

log = logging.getLogger("esper_otel")

_COUNTS = tuple(
    f"OTEL_{name}_LIMIT"
    for name in (
        "ATTRIBUTE_COUNT",
        "ATTRIBUTE_VALUE_LENGTH",
        "EVENT_ATTRIBUTE_COUNT",
        "LINK_ATTRIBUTE_COUNT",
        "SPAN_ATTRIBUTE_COUNT",
        "SPAN_ATTRIBUTE_VALUE_LENGTH",
        "SPAN_EVENT_COUNT",
        "SPAN_LINK_COUNT",
        "LOGRECORD_ATTRIBUTE_COUNT",
        "LOGRECORD_ATTRIBUTE_VALUE_LENGTH",
    )
)
"""Limits: whole numbers from 0, or nothing."""

_PLUGINS = {
    "OTEL_PROPAGATORS": "opentelemetry_propagator",
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "opentelemetry_resource_detector",
    "OTEL_PYTHON_CONTEXT": "opentelemetry_context",
}
"""Variables that name plugins, and the group of entry points where those are."""

_PROVIDERS = {
    "OTEL_PYTHON_TRACER_PROVIDER": "opentelemetry_tracer_provider",
    "OTEL_PYTHON_METER_PROVIDER": "opentelemetry_meter_provider",
    "OTEL_PYTHON_LOGGER_PROVIDER": "opentelemetry_logger_provider",
}
"""As :data:`_PLUGINS`: read whenever a provider is asked for, and again when there is none."""

_told: set[str] = set()


@contextmanager
def usable() -> Iterator[None]:
    """Within it, the environment of this process has no value that OpenTelemetry raises about.

    Afterwards it is as it was. For the thread that trains, before others of ours run.
    """
    replaced = _replaced(os.environ)
    held = {name: os.environ[name] for name in replaced}
    for name, value in replaced.items():
        if value:
            os.environ[name] = value
        else:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(held)


def can_have_provider(variable: str) -> bool:
    """Whether the API gives a provider where ``variable`` is set; told once if not."""
    return _has_provider(variable, os.environ.get(variable))


@cache
def _has_provider(variable: str, name: str | None) -> bool:
    if name is None or _missing(_PROVIDERS[variable], [name]) == []:
        return True
    _tell(
        variable, name, f"an installed one, and {name} is not installed", "the default is used"
    )
    return False


def _replaced(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that cannot be used, and what takes the place of each; "" for nothing."""
    found = {}
    for name in _COUNTS:
        value = environ.get(name)
        if value is None or _is_count(value):
            continue
        if value.strip():  # an empty one is none, says the specification
            _tell(name, value, "a whole number from 0", "the default is used")
        found[name] = ""
    for name, group in (_PLUGINS | _PROVIDERS).items():
        value = environ.get(name)
        if not value:
            continue
        words = [word.strip() for word in value.split(",") if word.strip()]
        missing = _missing(group, words)
        if missing:
            left = [word for word in words if word not in missing]
            instead = f"{', '.join(left) or 'the default'} is used"
            _tell(
                name,
                value,
                f"installed ones, and {', '.join(missing)} is not installed",
                instead,
            )
            found[name] = ",".join(left)
    return found


def _is_count(value: str) -> bool:
    text = value.strip().lower()
    return text == "unset" or (text.isascii() and text.isdigit())


def _missing(group: str, names: list[str]) -> list[str]:
    """Those of ``names`` that no plugin of ``group`` has."""
    there = {entry.name for entry in entry_points(group=group)} | {"none", "*"}
    return [name for name in names if name.lower() not in there and name not in there]


def _tell(variable: str, value: str, expected: str, instead: str) -> None:
    if variable not in _told:
        _told.add(variable)
        log.warning("%s=%r: expected %s; %s", variable, value, expected, instead)
