"""Settings of a trainer, read from the environment.

Where telemetry goes is not here: the exporter listens to the standard ``OTEL_*``
variables (:mod:`esper_otel.stream.destination`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import msgspec

log = logging.getLogger("esper_otel")


class Mode(StrEnum):
    """What happens to Tamiyo's decisions."""

    OFF = "off"
    """Nobody is asked."""

    ADVISE = "advise"
    """Decisions are recorded and reported, never applied."""

    ENFORCE = "enforce"
    """Decisions are applied to the run."""


class SettingsError(ValueError):
    """A setting that cannot be used: its name, its value and what was expected."""


class EsperSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How this process records, streams and answers.

    Every field can be set by an environment variable: ``ESPER_`` + its name in capitals
    (``tolaria_step_enrichment_enabled``: without the prefix). :meth:`from_environment`
    reads them. ``rank`` and ``world_size`` fall back to ``RANK`` and ``WORLD_SIZE``,
    which torchrun sets.
    """

    tolaria_step_enrichment_enabled: bool = True
    """False removes every gated metric and stops the device probes."""

    run_id: str = ""
    """Name of the run; empty: one is made from the time and random bytes."""

    rank: int = 0
    world_size: int = 1

    mode: Mode = Mode.ADVISE

    tamiyo_socket: str = ""
    """Where the sidecar listens; empty: :func:`leyline.wire.default_socket_path`."""

    tamiyo_deadline_ms: float = 5.0
    """Longest wait for one decision."""

    stream_interval_ms: float = 100.0
    """How often frames are turned into OTLP and sent."""

    ring_steps: int = 8192
    """Step frames, and seed frames, that may wait to be turned into OTLP."""

    spool_mb: float = 64.0
    """Unsent OTLP held in memory; beyond it the oldest is dropped, and counted."""

    spool_dir: str = ""
    """Where unsent OTLP is left at exit; empty: ``$XDG_STATE_HOME/esper/spool``."""

    recording_dir: str = ""
    """When set, all OTLP of the run is also written to files below it."""

    flush_timeout_s: float = 2.0
    """Longest that the end of the process waits for unsent telemetry."""

    span_every: int = 50
    """Every n-th step gets spans (0: none by count); slow steps and findings always do."""

    span_slow_factor: float = 2.0
    """A step is slow when it takes this many times the weighted mean of step latency."""

    lr_scale_min: float = 0.001
    """Lower bound of what decisions may multiply a learning rate by, all together."""

    lr_scale_max: float = 1.0
    """Upper bound of the same."""

    release_steps: int = 200
    """Steps without an OPTIMIZER decision before the learning rate is given back, and
    over which it is. More than a table's baseline window, so that what comes of it is held
    against a healthy past and not against the trouble itself."""

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] | None = None, **overrides: object
    ) -> EsperSettings:
        """Settings from ``environ`` (default: the process's), ``overrides`` winning.

        Raises :class:`SettingsError` naming the variable, its value and what was
        expected. An ``ESPER_`` variable that is no setting is warned about: it is
        most likely a misspelt one.
        """
        environ = os.environ if environ is None else environ
        raw: dict[str, object] = {}
        names: dict[str, str] = {}
        for field in msgspec.structs.fields(cls):
            for name in _variables(field.name):
                if environ.get(name, "") != "":
                    raw[field.name] = environ[name].strip()
                    if field.name not in overrides:
                        names[field.name] = name
                    break
        for name in overrides:
            if name not in cls.__struct_fields__:
                raise SettingsError(f"{name}={overrides[name]!r}: there is no such setting")
        raw.update(overrides)
        known = {name for field in cls.__struct_fields__ for name in _variables(field)}
        for name in sorted(environ):
            if name.startswith("ESPER_") and name not in known | _OTHER_VARIABLES:
                log.warning("%s is set, but esper-otel has no such setting", name)
        values = {}
        for field in msgspec.structs.fields(cls):
            if field.name not in raw:
                continue
            value = raw[field.name]
            try:
                values[field.name] = msgspec.convert(value, field.type, strict=False)
            except msgspec.ValidationError:
                source = names.get(field.name, field.name)
                raise SettingsError(
                    f"{source}={value!r}: expected {_EXPECTED[field.type]}"
                ) from None
        settings = cls(**values)
        settings.check(names)
        return settings

    def check(self, names: Mapping[str, str] | None = None) -> None:
        """Raise :class:`SettingsError` for a value outside its range."""
        for field, low, high in _RANGES:
            value = getattr(self, field)
            if not low <= value <= high:
                source = (names or {}).get(field, field)
                raise SettingsError(
                    f"{source}={value!r}: expected a number from {low:g} to {high:g}"
                )
        if self.rank >= self.world_size:
            raise SettingsError(
                f"rank={self.rank}: expected less than world_size={self.world_size}"
            )

    @property
    def spool_path(self) -> Path:
        """The folder in which unsent OTLP is left."""
        if self.spool_dir:
            return Path(self.spool_dir)
        state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        return Path(state) / "esper" / "spool"


_INFINITY = float("inf")
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("rank", 0, _INFINITY),
    ("world_size", 1, _INFINITY),
    ("tamiyo_deadline_ms", 0.1, 60_000),
    ("stream_interval_ms", 1, 60_000),
    ("ring_steps", 16, 1 << 22),
    ("spool_mb", 0.01, 65_536),
    ("flush_timeout_s", 0, 600),
    ("span_every", 0, _INFINITY),
    ("span_slow_factor", 1, _INFINITY),
    ("lr_scale_min", 0, 1),
    ("lr_scale_max", 1, 1000),
    ("release_steps", 1, _INFINITY),
)

_EXPECTED: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Mode: "off, advise or enforce",
}

_OTHER_VARIABLES = frozenset({"ESPER_CHAINED_PYTHONPATH"})
"""Variables of ours that are not settings (``esper-otel run`` hands one to its child)."""


def _variables(field: str) -> tuple[str, ...]:
    if field == "tolaria_step_enrichment_enabled":
        return ("TOLARIA_STEP_ENRICHMENT_ENABLED",)
    own = f"ESPER_{field.upper()}"
    return (own, field.upper()) if field in ("rank", "world_size") else (own,)
