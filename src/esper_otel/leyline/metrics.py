"""The metric registry: the one place where a metric's name, unit and gating are written.

Exporters, Tamiyo, the table checker and ``docs/metrics.md`` are all made from it.
Times are milliseconds of a monotonic clock; weighted statistics use an exponential
weight of 0.2. Units are UCUM, as OpenTelemetry asks.

Names are translated for Prometheus by :func:`series_name` alone: the sidecar's ``/metrics``,
the metrics page, the dashboards, the alert rules and the tests that look into a real Prometheus
take them from there. It says what the Collector's Prometheus exporters do with their defaults,
which is github.com/prometheus/otlptranslator: escaping, with suffixes.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Scope = Literal["step", "seed", "run"]

WEIGHT = 0.2
"""Weight of the newest observation in every weighted statistic of the registry."""


class Metric(NamedTuple):
    """One row of the registry.

    ``gated`` metrics vanish when ``TOLARIA_STEP_ENRICHMENT_ENABLED`` is false.
    ``scope`` says whose value it is: the step's, one seed's (then every point carries the
    attribute ``seed_id``), or the run's, which no rule of a table is about.
    """

    key: str
    unit: str
    meaning: str
    when: str = "always"
    gated: bool = False
    scope: Scope = "step"

    @property
    def instrument(self) -> str:
        """The OTel instrument name: the key itself for Kasmina's, else ``tolaria.`` + key."""
        return self.key if self.key.startswith("kasmina.") else f"tolaria.{self.key}"


def _seed(key: str, unit: str, meaning: str, when: str = "always") -> Metric:
    return Metric(f"kasmina.seed.{key}", unit, meaning, when, scope="seed")


_REPORTED = "when the loop reports it"
_PHASE = "when the loop exposes its phases"
_CUDA = "CUDA only"

STEP_METRICS: tuple[Metric, ...] = (
    Metric(
        "step", "{step}", "global optimizer step; required: records without it are discarded"
    ),
    Metric("loss", "{loss}", "mean loss of the step, over its micro-batches", "when known"),
    Metric("accuracy", "1", "accuracy of the step", _REPORTED),
    Metric(
        "gradient_norm",
        "{grad}",
        "L2 norm over all gradients, before clipping",
        "when the optimizer or the loop gives the gradients",
    ),
    Metric("samples_per_s", "{sample}/s", "samples over the step's latency", "when counted"),
    Metric(
        "hook_latency_ms",
        "ms",
        "instrumentation overhead on the training thread within this step_latency_ms; includes "
        "the previous step's decision request, because a step record is sealed before its own "
        "request",
    ),
    Metric(
        "tamiyo_latency_ms",
        "ms",
        "time of the training thread for the decision request sent at the end of the previous "
        "step: sending, collecting the answer, and any waiting; 0.0 without a request",
    ),
    Metric(
        "lr_scale",
        "1",
        "factor by which decisions scaled the learning rates of this step's update: 1 when "
        "none is applied, and always in advise mode",
    ),
    Metric(
        "update_skipped",
        "{update}",
        "1 when a decision skipped the optimizer's update of this step, otherwise 0",
    ),
    Metric(
        "restored",
        "{restore}",
        "1 when a decision restored a snapshot of weights and optimizer state at the end of "
        "this step, otherwise 0",
        "where snapshots are kept",
    ),
    Metric(
        "gradients_kept",
        "1",
        "1 when the update used the gradients of the previous update as well, because nothing "
        "cleared them (zero_grad), otherwise 0",
        "from the first such update on",
    ),
    Metric(
        "unjudged_steps",
        "{step}",
        "decision requests in a row, up to this step, that the sidecar did not answer",
        "with decision requests",
    ),
    Metric(
        "phase",
        "{phase}",
        "number of phases that have begun (run.phase_begins, a new batch size): values from "
        "before a phase are no reference for those after",
    ),
    Metric(
        "step_latency_ms",
        "ms",
        "end of the previous step to the end of this one",
        "from the second step on",
        gated=True,
    ),
    Metric(
        "forward_ms",
        "ms",
        "from batch received to start of backward, including zero_grad and loss",
        _PHASE,
        gated=True,
    ),
    Metric("backward_ms", "ms", "duration of backward", _PHASE, gated=True),
    Metric(
        "optimizer_ms",
        "ms",
        "duration of optimizer.step, with clipping before it and the loop's work after it "
        "until the next batch request",
        _PHASE,
        gated=True,
    ),
    Metric(
        "kasmina.apply_ms",
        "ms",
        "applying a decision at the end of the previous step, 0.0 when there was none",
        gated=True,
    ),
    Metric(
        "kasmina.finalize_ms",
        "ms",
        "advancing alpha and gates, and building the seed records",
        gated=True,
    ),
    Metric(
        "loss_delta",
        "{loss}",
        "loss minus the previous step's",
        "from the second loss on",
        gated=True,
    ),
    Metric("loss_ewma", "{loss}", "weighted mean of loss", "when loss is", gated=True),
    Metric(
        "loss_volatility",
        "{loss}",
        "weighted standard deviation of loss",
        "when loss is",
        gated=True,
    ),
    Metric(
        "grad_norm_ewma",
        "{grad}",
        "weighted mean of gradient_norm",
        "when gradient_norm is",
        gated=True,
    ),
    Metric(
        "grad_var",
        "{grad}2",
        "weighted variance of gradient_norm",
        "when gradient_norm is",
        gated=True,
    ),
    Metric(
        "grad_conflict_rate",
        "1",
        "conflicting pairs over compared pairs in the PCGrad aggregation",
        "with two gradient sources or more",
        gated=True,
    ),
    Metric(
        "optimizer_lr",
        "1",
        "learning rate that the update used (the script's own times lr_scale), mean over "
        "parameter groups",
        "when the optimizer is known",
        gated=True,
    ),
    Metric(
        "optimizer_lr_base",
        "1",
        "base learning rate: `initial_lr` of the parameter groups, which torch's schedules "
        "write, else the first observed rate; mean over parameter groups",
        "when the optimizer is known",
        gated=True,
    ),
    Metric(
        "optimizer_momentum",
        "1",
        "momentum that the update used (Adam: beta1), mean over parameter groups",
        "where the optimizer has one",
        gated=True,
    ),
    Metric(
        "input_wait_ms",
        "ms",
        "time the loop waited for its next batch",
        "when batches come through an instrumented iterator",
        gated=True,
    ),
    Metric(
        "h2d_copy_ms",
        "ms",
        "first host-to-device copy of the step, by CUDA events read later",
        _CUDA,
        gated=True,
    ),
    Metric("gpu_mem_used_gb", "GBy", "device memory in use", _CUDA, gated=True),
    Metric("gpu_mem_free_gb", "GBy", "device memory free", _CUDA, gated=True),
    Metric("gpu_util_percent", "%", "device utilisation", "NVML only", gated=True),
    Metric("cpu_util_percent", "%", "host CPU utilisation", "psutil only", gated=True),
    Metric(
        "nonfinite",
        "{value}",
        "number of this step's values that were NaN or infinite (the values are omitted)",
    ),
    Metric(
        "custom_nonfinite",
        "{value}",
        "number of the step's custom values that were NaN or infinite; `nonfinite` excludes "
        "them, because an overflowing perplexity may be harmless",
        "when the loop reports custom values",
    ),
    Metric(
        "kasmina.isolation.violations",
        "{violation}",
        "isolation violations of all seeds, running count",
        "with a garden",
    ),
    Metric("kasmina.kernel_fetch_ms", "ms", "last seed kernel fetch", "with a garden"),
    Metric("kasmina.seeds_live", "{seed}", "seeds alive", "with a garden"),
)

SEED_METRICS: tuple[Metric, ...] = (
    _seed("stage", "{state}", "number of the stage"),
    _seed("alpha", "1", "blend weight of the seed, 0 to 1"),
    _seed("alpha_steps", "{step}", "steps spent advancing alpha", "BLENDING only"),
    _seed("kernel_attached", "{flag}", "1 when the seed's kernel is attached"),
    _seed("last_kernel_latency_ms", "ms", "last fetch or call of the seed's kernel"),
    _seed("isolation_violations", "{violation}", "running count of this seed"),
    _seed("fallback_used", "{flag}", "1 when identity replaces the kernel"),
    _seed(
        "isolation.dot",
        "{grad}2",
        "inner product of host and seed gradient at the slot's input",
        "when isolation statistics exist",
    ),
    _seed(
        "isolation.host_norm",
        "{grad}",
        "norm of the gradient through the host path",
        "when isolation statistics exist",
    ),
    _seed(
        "isolation.seed_norm",
        "{grad}",
        "norm of the gradient through the seed path",
        "when isolation statistics exist",
    ),
)

RUN_ENDED = Metric(
    "run.ended",
    "{step}",
    "number of the last step of a run that has ended on this rank; attributes say how it ended",
    "once, when the run ends",
    scope="run",
)
"""In no frame of a step, and so in no table."""

CUSTOM = Metric(
    "custom",
    "{custom}",
    "a custom value of the script (`run.report(name=…)`), or of a framework's validation",
    "at steps that report it",
)
"""All values without a row here; :mod:`esper_otel.leyline.custom` separates them by name."""

STEP_KEYS: tuple[str, ...] = tuple(metric.key for metric in STEP_METRICS)
SEED_KEYS: tuple[str, ...] = tuple(metric.key for metric in SEED_METRICS)

STEP_SLOT: dict[str, int] = {key: slot for slot, key in enumerate(STEP_KEYS)}
"""Position of a step metric in a row of step values (ring, wire)."""

SEED_SLOT: dict[str, int] = {key: slot for slot, key in enumerate(SEED_KEYS)}
"""Position of a seed metric in a row of seed values."""

BY_KEY: dict[str, Metric] = {metric.key: metric for metric in (*STEP_METRICS, *SEED_METRICS)}
BY_INSTRUMENT: dict[str, Metric] = {metric.instrument: metric for metric in BY_KEY.values()}

SEED_ID = "seed_id"
"""Attribute carried by every point of a seed metric."""

HOW_ENDED, EXCEPTION_TYPE = "esper.run.ended", "exception.type"
"""Attributes of the point of :data:`RUN_ENDED`: ``done``, ``exception`` or ``interrupted``, and
the name of the exception's type, where there was one."""

RUN_ID, RANK, LOCAL_RANK, WORLD_SIZE, INSTANCE_ID = (
    "esper.run_id",
    "esper.rank",
    "esper.local_rank",
    "esper.world_size",
    "service.instance.id",
)
"""Resource attributes that identify a trainer."""

RUN_NAME, RUN_TAG = "esper.run.name", "esper.run.tag."
"""Resource attributes of a run that has a name or tags: the second begins with that."""


SeriesKind = Literal["gauge", "counter", "histogram"]

_UNITS = {"ms": "milliseconds", "s": "seconds", "GBy": "gigabytes", "%": "percent", "1": ""}
_PER = {"s": "second"}
_SEPARATORS = re.compile(r"[^a-zA-Z0-9:]")


def prometheus_name(metric: Metric) -> str:
    """What the gauge of a metric in the registry is called in Prometheus."""
    return series_name(metric.instrument, metric.unit)


def series_name(instrument: str, unit: str, kind: SeriesKind = "gauge") -> str:
    """The name of an instrument's series; a histogram's ends in ``_bucket`` and so on besides.

    The name is cut into words, the unit's word is added unless it is one of them, and
    what stands in braces is no unit. "ms" is not the word "milliseconds", so a name that
    ends in the first gets the second as well. A counter ends in ``_total``, and a gauge of
    unit ``1`` in ``_ratio``. Raises ``KeyError`` for a unit that nobody has translated yet.
    """
    words = [word for word in _SEPARATORS.split(instrument) if word]
    main, _, per = unit.partition("/")
    suffixes = [] if "{" in main else [_UNITS[main]]
    if per:
        suffixes.append(f"per_{_PER[per]}")
    words += [suffix for suffix in suffixes if suffix and suffix not in words]
    last = "total" if kind == "counter" else "ratio" if (kind, unit) == ("gauge", "1") else ""
    if last:
        words = [*(word for word in words if word != last), last]
    return "_".join(words)


def label_name(attribute: str) -> str:
    """The label that an attribute, of a resource or of a point, becomes."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", attribute)
