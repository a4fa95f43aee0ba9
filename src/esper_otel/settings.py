"""Settings of a trainer, read from the environment.

``OTEL_*`` variables set the destination (:mod:`esper_otel.stream.destination`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from esper_otel.choices import Blending as Blending
from esper_otel.choices import Fossils as Fossils
from esper_otel.choices import Growth as Growth
from esper_otel.choices import Mode as Mode
from esper_otel.choices import Schedule as Schedule
from esper_otel.choices import Summaries as Summaries
from esper_otel.leyline.folders import check_socket_path, state_folder
from esper_otel.run_settings import RunSettings, faults_of, format_tags

log = logging.getLogger("esper_otel")


class SettingsError(ValueError):
    """An unusable setting: its name, its value and the expected values."""


class UnusableVariableError(SettingsError):
    """An unusable environment variable."""

    def __init__(self, variable: str, problem: str, instead: str) -> None:
        """``instead`` describes the fallback."""
        super().__init__(f"{variable}={problem}")
        self.variable = variable
        self.instead = instead


class EsperSettings(RunSettings, frozen=True, kw_only=True):
    """How this process records, streams and applies decisions.

    Every field can be set by an environment variable: ``ESPER_`` + its name in capitals
    (``tolaria_step_enrichment_enabled``: without the prefix). :meth:`from_environment`
    reads them. ``rank``, ``local_rank`` and ``world_size`` fall back to ``RANK``,
    ``LOCAL_RANK`` and ``WORLD_SIZE``, which torchrun sets.
    """

    tolaria_step_enrichment_enabled: bool = True
    """False removes every gated metric and stops the device probes."""

    rank: int = 0
    """Rank of this process in the run, from 0."""

    world_size: int = 1
    """Number of processes of the run."""

    local_rank: int = -1
    """Rank among the processes of this host; -1: unknown, and not sent."""

    mode: Mode = Mode.ADVISE

    tamiyo_socket: str = ""
    """Socket path of the sidecar, at most 107 bytes; ``tamiyo`` also reads the variable.
    Empty: ``$XDG_RUNTIME_DIR/esper/tamiyo.sock``, else below the user's own temporary
    directory."""

    tamiyo_deadline_ms: float = 5.0
    """Longest wait for one decision, counted from the time its request was sent."""

    wait_for_decisions: bool = False
    """Wait for each decision at the end of its own step, so that a seed operation or a pause
    happens in that same step and not at the end of the next. It costs one round trip to the
    sidecar per step, 0.1 to 0.5 ms on a quiet machine. Ranks that synchronise decisions
    ignore it."""

    ranks_agree: bool = True
    """Ranks that train together apply the same decisions at the same step: rank 0 requests them
    for all. False: each rank requests and applies its own."""

    ranks_timeout_s: float = 30.0
    """Longest wait for the other ranks of a run; a timeout ends synchronised decisions for
    good. A rank that works alone between two steps keeps the others waiting anyway, but
    must not do so for longer."""

    stream_interval_ms: float = 100.0
    """Interval at which step records are encoded as OTLP and sent."""

    ring_steps: int = 8192
    """Most step records, and seed records, that may wait for encoding."""

    spool_mb: float = 64.0
    """Unsent OTLP kept in memory and on disk; beyond it the oldest is dropped and counted."""

    spool_dir: str = ""
    """Directory of unsent OTLP files; empty: ``$XDG_STATE_HOME/esper/spool``."""

    report: str = ""
    """File for the report that rank 0 writes at the end of the run; empty: none."""

    flush_timeout_s: float = 2.0
    """Longest wait for unsent telemetry at the end of the process."""

    summary: Summaries = Summaries.TEXT
    """Summary that rank 0 prints at the end of a run of at least one step."""

    span_every: int = 50
    """Every n-th step gets spans (0: none by count); slow steps and findings always do."""

    span_slow_factor: float = 2.0
    """A step is slow when it takes this many times the weighted mean of step latency."""

    lr_scale_min: float = 0.001
    """Lower bound of the combined factor of decisions on a learning rate."""

    lr_scale_max: float = 1.0
    """Upper bound of the same factor."""

    primary_optimizer: str = ""
    """The optimizer that defines the run's steps when an unchanged script has several: the name
    of its class, or its position in the order of first steps, from 0; the process is then one
    run. Empty: :class:`integrations.primary.Primary` chooses."""

    losses_prescaled: bool = False
    """Whether each loss of a step is divided by the number of micro-batches before
    ``backward``: then the step's loss is their sum, not their mean. Known frameworks set it;
    otherwise it is detected if the division is the last operation. Reported losses are
    averaged."""

    release_steps: int = 20
    """Steps without an OPTIMIZER decision before the learning rate is restored, and over which
    it is. With more steps than a table's baseline window, the outcome is compared with a
    healthy past and not with the trouble itself."""

    snapshot_every: int = 0
    """Approximate steps between two snapshots of weights and optimizer state in host memory,
    which a decision may restore in ``enforce``; two are kept. 0: none."""

    snapshot_restores_max: int = 3
    """Most restores of snapshots in a run."""

    # What follows is about seeds, and needs a garden to be planted.

    growth: Growth = Growth.ASKED

    plateau_steps: int = 200
    """Steps without a better loss before a seed germinates."""

    plateau_improvement: float = 0.01
    """Share by which the loss must fall to count as better."""

    seeds_at_once: int = 1
    """Most seeds that the garden grows at once on its own. With more than one, a change of
    the loss cannot be attributed to one of them."""

    training_steps: int = 100
    """Least steps that a seed trains in isolation."""

    blending_steps: int = 100
    """Steps in which alpha rises from 0 to 1."""

    shadowing_steps: int = 50
    """Least steps that a blended seed is observed."""

    probation_steps: int = 50
    """Further steps before the seed becomes part of the network."""

    patience_steps: int = 200
    """Steps that a gate may stay closed before its seed is culled."""

    embargo_steps: int = 200
    """Steps that a slot stays empty after its seed was culled."""

    embargo_s: float = 0.0
    """Seconds that the slot stays empty, at least; both must have passed, and a pause does not
    count."""

    blending: Blending = Blending.CONVEX
    alpha_schedule: Schedule = Schedule.COSINE

    alpha_temperature: float = 1.0
    """Softens (above 1) or sharpens (below 1) the sigmoid schedule."""

    fossils: Fossils = Fossils.JOIN

    isolation_every: int = 10
    """Isolation statistics are taken every n-th step (0: never); leaks are always detected."""

    compile_seeds: bool = False
    """Compile each seed in another process, which takes minutes of one processor and a C++
    compiler; until then, and after a failure, the seed runs uncompiled."""

    kernel_budget_ms: float = 10.0
    """Longest duration of one fetch, or one call, of a seed's kernel."""

    gradient_ratio_max: float = 1e4
    """Gate G1: largest ratio of a seed's gradient norm to the host's, or the host's to the
    seed's."""

    loss_rise_max: float = 0.25
    """Gate G4: share by which the loss may rise while a seed joins."""

    loss_fall_min: float = 0.0
    """Gate G4: share by which the loss must have fallen for a seed to stay for good."""

    step_rise_max: float = 3.0
    """Gate G4: share by which the latency of a step may rise."""

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] | None = None, **overrides: object
    ) -> EsperSettings:
        """Settings from ``environ`` (default: the process's); ``overrides`` win.

        No environment keeps a training from starting: for an unusable variable this logs a
        warning with its value and the expected values, and uses the default. An ``ESPER_``
        variable that is no setting, most likely a misspelt one, gets a warning too. Each is
        logged once per process, by the first rank on a host. Raises :class:`SettingsError`
        for unusable ``overrides``.
        """
        environ = dict(os.environ if environ is None else environ)
        problems: dict[str, str] = {}
        while True:
            try:
                settings = cls.read(environ, **overrides)
                break
            except UnusableVariableError as error:
                problems[error.variable] = f"{error}; {error.instead}"
                environ[error.variable] = ""
        if settings.local_rank <= 0:
            for variable in sorted(problems.keys() - _told):
                _told.add(variable)
                log.warning("%s", problems[variable])
            _tell_unknown(environ)
        return settings

    @classmethod
    def read(cls, environ: Mapping[str, str], **overrides: object) -> EsperSettings:
        """As :meth:`from_environment`, for another process's environment: without warnings.

        Raises :class:`SettingsError`, which names the first unusable variable.
        """
        raw: dict[str, object] = {}
        names: dict[str, str] = {}
        for field in msgspec.structs.fields(cls):
            for name in variables_of(field.name):
                if environ.get(name, "") != "":
                    raw[field.name] = environ[name].strip()
                    if field.name not in overrides:
                        names[field.name] = name
                    break
        raw.update(overrides)
        settings = cls(**_converted(raw, names))
        settings._validate(names)
        return settings

    def changed(self, **changes: object) -> EsperSettings:
        """These settings with ``changes``; raises :class:`SettingsError`."""
        settings = msgspec.structs.replace(self, **_converted(changes, {}))
        settings._validate()
        return settings

    def _validate(self, names: Mapping[str, str] | None = None) -> None:
        """Raise :class:`SettingsError` for a value outside its range."""
        names = names or {}
        for field, low, high in RANGES:
            value = getattr(self, field)
            if not low <= value <= high:
                wanted = f"expected a number from {low:g} to {high:g}"
                raise _problem(names, field, f"{value!r}: {wanted}")
        for field, wanted in faults_of(self).items():
            raise _problem(names, field, f"{getattr(self, field)!r}: {wanted}")
        rank, size = self.rank, self.world_size
        if rank >= size:
            # Of a scheduler that tells its processes their number, and not how many there are.
            wanted = f"expected less than the size of the world, {size}"
            raise _problem(names, "rank", f"{rank}: {wanted}", "world_size")
        if self.tamiyo_socket:
            try:
                check_socket_path(Path(self.tamiyo_socket))
            except ValueError as error:
                raise _problem(names, "tamiyo_socket", str(error)) from None

    @property
    def spool_path(self) -> Path:
        """The directory of unsent OTLP files."""
        return Path(self.spool_dir or state_folder() / "esper" / "spool")


_INFINITY = float("inf")
_FROM_0 = """
    rank span_every seeds_at_once embargo_steps embargo_s isolation_every loss_rise_max
    step_rise_max snapshot_every snapshot_restores_max
"""
_FROM_1 = """
    world_size span_slow_factor release_steps plateau_steps training_steps blending_steps
    shadowing_steps probation_steps patience_steps gradient_ratio_max
"""
RANGES: tuple[tuple[str, float, float], ...] = (
    *((field, 0, _INFINITY) for field in _FROM_0.split()),
    *((field, 1, _INFINITY) for field in _FROM_1.split()),
    *((field, 0, 1) for field in ("lr_scale_min", "plateau_improvement", "loss_fall_min")),
    ("local_rank", -1, _INFINITY),
    ("tamiyo_deadline_ms", 0.1, 60_000),
    ("ranks_timeout_s", 0.1, 3600),
    ("stream_interval_ms", 1, 60_000),
    ("ring_steps", 16, 1 << 22),
    ("spool_mb", 0.01, 65_536),
    ("flush_timeout_s", 0, 600),
    ("lr_scale_max", 1, 1000),
    ("alpha_temperature", 1e-3, 1000),
    ("kernel_budget_ms", 0.01, 60_000),
)
"""Setting, least and greatest value."""

EXPECTED: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Mode: "off, advise or enforce",
    Growth: "asked or autonomous",
    Blending: "convex, residual, channelwise or confidence",
    Schedule: "sigmoid, cosine or linear",
    Fossils: "join or stay",
    Summaries: "text, json or off",
}

_OTHER_VARIABLES = frozenset({"ESPER_CHAINED_PYTHONPATH", "ESPER_ONLY_WORKERS"})
"""Variables of ours that are not settings (``esper-otel run`` hands them to its child)."""

_ALSO_READ = {
    "rank": ("RANK",),
    "world_size": ("WORLD_SIZE",),
    "local_rank": ("LOCAL_RANK",),
    "losses_prescaled": ("ESPER_LOSSES_ARE_SHARES",),  # as it was called first
}
"""Setting → further variables that set it."""

_told: set[str] = set()
"""Variables that this process has warned about."""


def _tell_unknown(environ: Mapping[str, str]) -> None:
    known = {name for field in EsperSettings.__struct_fields__ for name in variables_of(field)}
    for name in sorted(environ.keys() - known - _OTHER_VARIABLES - _told):
        if name.startswith("ESPER_"):
            _told.add(name)
            log.warning("%s is set, but esper-otel has no such setting", name)


def _converted(raw: Mapping[str, object], names: Mapping[str, str]) -> dict[str, Any]:
    """``raw`` as the types of the fields; ``names`` has the variables for error messages."""
    for name in raw:
        if name not in EsperSettings.__struct_fields__:
            raise SettingsError(f"{name}={raw[name]!r}: there is no such setting")
    values = {}
    for field in (each for each in msgspec.structs.fields(EsperSettings) if each.name in raw):
        value = raw[field.name]
        if field.name == "tags" and isinstance(value, Mapping):
            value = format_tags(value)
        try:
            values[field.name] = msgspec.convert(value, field.type, strict=False)
        except msgspec.ValidationError:
            wanted = f"{value!r}: expected {EXPECTED[field.type]}"
            raise _problem(names, field.name, wanted) from None
    return values


def _problem(names: Mapping[str, str], field: str, problem: str, *also: str) -> SettingsError:
    """The error for ``field``, or for one of ``also`` where only that is a variable."""
    for name in (field, *also):
        if name in names:
            default = EsperSettings.__struct_defaults__[
                EsperSettings.__struct_fields__.index(name)
            ]
            instead = f"{str(default) or 'the default'} is used"
            return UnusableVariableError(names[name], problem, instead)
    return SettingsError(f"{field}={problem}")


def variables_of(field: str) -> tuple[str, ...]:
    """The environment variables that set it; the first that is there counts."""
    if field == "tolaria_step_enrichment_enabled":
        return ("TOLARIA_STEP_ENRICHMENT_ENABLED",)
    own = f"ESPER_{field.upper()}"
    return (own, *_ALSO_READ.get(field, ()))
