"""A made-up run that has something for every panel, sent by the real stream.

Two ranks train, two seeds grow, one learning rate slips; Tamiyo says so. The frames are
computed and not trained, so that the run is the same every time, is over at once, and has
values of devices that are not here.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterable, Iterator
from math import exp, nan, sin
from pathlib import Path

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric

from esper_otel.leyline.endings import HowEnded, RunEnd
from esper_otel.leyline.frames import StepFrame, StepTimeline
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings
from esper_otel.stream import Stream
from esper_tamiyo.journaling.own_metrics import OWN_METRICS, InstrumentKind, OwnMetric

RUN = "sample"
RANKS = 2
TAMIYO = "tamiyo-1"
"""The instance that tells of itself; the real one of the stack does so as well."""

SLIP = 0.55
"""Share of the run after which the learning rate slips, for a twentieth of it."""

AWAY = 0.8
"""Share of the run after which Tamiyo does not answer, for a thirtieth of it."""

PATIENCE_S = 120.0
"""Longest that a Collector takes for what one rank sends, also on a busy machine."""

REPORT_S = 15
"""How often Tamiyo tells of itself."""

BOUNDS_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0, 100.0, 250.0)

Values = dict[str, float]


def send_sample_run(
    endpoint: str, folder: Path, begin_s: float, steps: int, step_s: float
) -> None:
    """Send the whole run to a Collector at ``endpoint``; it began at ``begin_s`` (Unix).

    Raises ``TimeoutError`` where the Collector does not take all within :data:`PATIENCE_S`.
    """
    for rank in range(RANKS):
        stream = Stream(
            EsperSettings.from_environment(
                {}, spool_dir=str(folder), rank=rank, world_size=RANKS, stream_interval_ms=20
            ),
            run_id=RUN,
            instance_id=f"{RUN}-{rank}",
            environ={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
        )
        stream.start()
        for step in range(steps):
            end_ns = round((begin_s + (step + 1) * step_s) * 1e9)
            values = step_values(step, steps, rank, step_s)
            own = {"val_loss": values["loss"] + 0.1} if step % EVALUATED_EVERY == 0 else {}
            stream.frame(end_ns, *rows(values, seed_values(step / steps, rank)), own)
            if values["step_latency_ms"] > 1500 * step_s:
                stream.timeline(_timeline(step, end_ns, values))
        done = RunEnd(HowEnded.DONE)
        stream.end(StepFrame(RUN, f"{RUN}-{rank}", rank, step, end_ns + 1, {}, ended=done))
        report = stream.close(PATIENCE_S)
        if report.metrics.delivered < report.metrics.produced:
            raise TimeoutError(f"{endpoint}: rank {rank} of the sample run: {report}")
    for at_s in range(0, round(steps * step_s), REPORT_S):
        _post(endpoint, tamiyo_report(begin_s, at_s, at_s / (steps * step_s)))


EVALUATED_EVERY = 20
"""Steps from one evaluation to the next."""


def rows(
    values: Values, seeds: Iterable[tuple[str, Values]]
) -> tuple[list[float], list[tuple[str, list[float]]]]:
    """A step and its seeds as the stream takes them."""
    told = [(seed, [one.get(key, nan) for key in SEED_KEYS]) for seed, one in seeds]
    return [values.get(key, nan) for key in STEP_KEYS], told


def step_values(step: int, steps: int, rank: int, step_s: float) -> Values:
    """What a step of a rank looked like."""
    done = step / steps
    slipped = SLIP <= done < SLIP + 0.05
    wobble = sin(step * 1.7 + rank) + 0.5 * sin(step * 0.31)
    slow = 3.0 if rank == 1 and step % 97 == 96 else 1.0
    loss = 2.3 * exp(-3 * done) + 0.15 + (0.04 + 1.2 * slipped) * (1 + 0.3 * wobble)
    latency = 1000 * step_s * (0.97 + 0.02 * wobble) * slow
    factor = 0.25 if SLIP + 0.01 <= done < SLIP + 0.1 else 1.0
    unanswered = step + 1 - round(AWAY * steps) if AWAY <= done < AWAY + 0.03 else 0
    return {
        "step": step,
        "loss": loss,
        "accuracy": 1 - 0.9 * exp(-4 * done) - 0.3 * slipped,
        "gradient_norm": (1.5 + 0.3 * wobble) * (0.4 + exp(-2 * done)) * (1 + 9 * slipped),
        "samples_per_s": 64e3 / latency,
        "hook_latency_ms": 0.6 + 0.1 * wobble,
        "tamiyo_latency_ms": 0.02 + 0.005 * wobble,
        "lr_scale": factor,
        "update_skipped": float(slipped and step % 3 == 0),
        "restored": float(slipped and step % 60 == 0),
        "gradients_kept": 0.0,
        "unjudged_steps": float(unanswered),
        "phase": 0.0,
        "step_latency_ms": latency,
        "input_wait_ms": latency * (0.08 if slow == 1.0 else 0.68),
        "forward_ms": latency * (0.3 if slow == 1.0 else 0.1),
        "backward_ms": latency * (0.5 if slow == 1.0 else 0.17),
        "optimizer_ms": latency * 0.04,
        "kasmina.apply_ms": 0.02,
        "kasmina.finalize_ms": 0.15,
        "loss_delta": 0.05 * wobble + 1.2 * slipped,
        "loss_ewma": 2.3 * exp(-3 * done) + 0.19 + 1.2 * slipped,
        "loss_volatility": 0.05 + 0.4 * slipped,
        "grad_norm_ewma": 1.5 * (0.4 + exp(-2 * done)) * (1 + 9 * slipped),
        "grad_var": 0.2 + 3 * slipped,
        "grad_conflict_rate": 0.2 + 0.1 * sin(step * 0.05),
        "optimizer_lr": 0.1 * (1 - done) * (50 if slipped else 1) * factor,
        "optimizer_lr_base": 0.1,
        "optimizer_momentum": 0.9,
        "h2d_copy_ms": 1.5 + 0.2 * wobble,
        "gpu_mem_used_gb": 31 + 4 * done,
        "gpu_mem_free_gb": 49 - 4 * done,
        "gpu_util_percent": 88 + 4 * wobble,
        "cpu_util_percent": 35 + 5 * wobble,
        "nonfinite": float(slipped and step % 3 == 0),
        "custom_nonfinite": float(slipped and step % 3 == 1),
        "kasmina.isolation.violations": float(done > 0.7),
        "kasmina.kernel_fetch_ms": 12.0,
        "kasmina.seeds_live": 2.0,
    }


_GROWN = (
    (0.1, Stage.DORMANT),
    (0.15, Stage.GERMINATED),
    (0.3, Stage.TRAINING),
    (0.55, Stage.BLENDING),
    (0.65, Stage.SHADOWING),
    (0.75, Stage.PROBATIONARY),
    (1.0, Stage.FOSSILIZED),
)
_CULLED = (
    (0.3, Stage.DORMANT),
    (0.35, Stage.GERMINATED),
    (0.5, Stage.TRAINING),
    (0.7, Stage.BLENDING),
    (0.74, Stage.CULLED),
    (0.9, Stage.EMBARGOED),
    (0.92, Stage.RESETTING),
    (1.0, Stage.DORMANT),
)


def seed_values(done: float, rank: int) -> Iterator[tuple[str, Values]]:
    """What each seed was doing when so much of the run was over."""
    for seed, story in (("features.2-1", _GROWN), ("features.5-1", _CULLED)):
        stage = next(stage for until, stage in story if done < until)
        blending = next(until for until, at in story if at is Stage.BLENDING)
        began = next(until for until, at in story if at is Stage.TRAINING)
        alpha = min(max((done - began) / (blending - began), 0.0), 1.0)
        grows = Stage.GERMINATED <= stage <= Stage.FOSSILIZED
        isolated = stage <= Stage.TRAINING
        sign = -0.7 if story is _CULLED else 0.6
        host, own = 1.2 - 0.4 * done, 0.0 if isolated else 0.5 * alpha
        values: Values = {
            "kasmina.seed.stage": float(stage),
            "kasmina.seed.alpha": alpha if grows else 0.0,
            "kasmina.seed.kernel_attached": float(grows),
            "kasmina.seed.last_kernel_latency_ms": 0.4 + 0.1 * rank + 0.2 * sin(done * 60),
            "kasmina.seed.isolation_violations": float(done > 0.7 and story is _CULLED),
            "kasmina.seed.fallback_used": float(stage is Stage.CULLED),
        }
        if grows:
            values |= {
                "kasmina.seed.isolation.dot": host * own * sign,
                "kasmina.seed.isolation.host_norm": host,
                "kasmina.seed.isolation.seed_norm": own,
            }
        if stage is Stage.BLENDING:
            values["kasmina.seed.alpha_steps"] = float(round(alpha * 100))
        yield seed, values


_DECISIONS: dict[tuple[str, str, str], Callable[[float], float]] = {
    ("CONTINUE", "NORMAL", "nominal"): lambda done: 1000 * done,
    ("SEED", "NORMAL", "nominal"): lambda done: 12 * done // 1,
    ("OPTIMIZER", "HIGH", "loss_diverging"): lambda done: 4.0 * (done > SLIP),
    ("PAUSE", "CRITICAL", "nonfinite_loss"): lambda done: 9.0 * (done > SLIP),
    ("PAUSE", "NORMAL", "conservative_mode"): lambda done: 3.0 * (done > SLIP + 0.05),
}
_CHECKS: dict[str, Callable[[float], float]] = {
    "unchanged": lambda done: 12 * done // 1,
    "smaller": lambda done: 4.0 * (done > SLIP),
    "skipped": lambda done: 9.0 * (done > SLIP),
}
_ONE_ATTRIBUTE = {
    "tamiyo.frames": ("judged", "duplicate", "late"),
    "tamiyo.frames.refused": ("step_leap", "name_too_long"),
    "tamiyo.ingest.points": ("used", "foreign"),
    "tamiyo.ingest.requests": ("accepted", "busy"),
    "tamiyo.ingest.unusable": ("no_step", "name"),
    "tamiyo.ingest.connections.closed": ("timed_out", "evicted"),
    "tamiyo.queue.depth": ("frames", "notes"),
    "tamiyo.journal.entries": ("written", "lost"),
    "tamiyo.runs": ("healthy", "stale", "finished", "failed"),
    "tamiyo.runs.ended": ("done", "exception", "interrupted"),
    "tamiyo.restarts": ("ingest", "scribe"),
    "tamiyo.hung": ("ingest",),
    "tamiyo.table.reloads": ("taken", "refused"),
    "tamiyo.table.info": ("default-2+0badcafe",),
}
_RARE = (
    "tamiyo.hung",
    "tamiyo.ingest.connections.closed",
    "tamiyo.ingest.unusable",
    "tamiyo.restarts",
    "tamiyo.table.reloads",
)
_RULES = {"loss_diverging": "firing", "loss_spike": "recovering", "slow_input": "pending"}


def tamiyo_report(begin_s: float, at_s: float, done: float) -> ExportMetricsServiceRequest:
    """Every metric of Tamiyo's own as it stood ``at_s`` seconds after the run began."""
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    for name, who in (("service.name", "tamiyo"), ("service.instance.id", TAMIYO)):
        resource.resource.attributes.add(key=name).value.string_value = who
    scope = resource.scope_metrics.add()
    start, now = round(begin_s * 1e9), round((begin_s + at_s) * 1e9)
    for metric in OWN_METRICS:
        points = list(_points(metric, begin_s, at_s, done))
        if not points:
            continue
        made = scope.metrics.add(name=metric.name, unit=metric.unit)
        if metric.kind is InstrumentKind.HISTOGRAM:
            _add_histogram(made, start, now, done)
            continue
        for attributes, value in points:
            if metric.kind is InstrumentKind.COUNTER:
                made.sum.is_monotonic = True
                made.sum.aggregation_temporality = (
                    AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
                )
                point = made.sum.data_points.add(as_double=value)
            else:
                point = made.gauge.data_points.add(as_double=value)
            point.start_time_unix_nano, point.time_unix_nano = start, now
            for name, told in attributes.items():
                point.attributes.add(key=name).value.string_value = told
    return request


def _points(
    metric: OwnMetric, begin_s: float, at_s: float, done: float
) -> Iterator[tuple[dict[str, str], float]]:
    grows = metric.kind is InstrumentKind.COUNTER
    if metric.name == "tamiyo.decisions":
        for names, count in _DECISIONS.items():
            if made := count(done):
                yield dict(zip(("action", "severity", "rule"), names, strict=True)), made
    elif metric.name == "tamiyo.checks":
        for decided, count in _CHECKS.items():
            yield {"decided": decided}, count(done)
    elif metric.name == "tamiyo.rules":
        for rule, state in _RULES.items() if SLIP < done < SLIP + 0.15 else ():
            yield {"rule": rule, "state": state}, 1.0
    elif metric.name == "tamiyo.conservative":
        yield {}, float(SLIP < done < SLIP + 0.2)
    elif metric.name == "tamiyo.table.loaded":
        yield {}, begin_s
    elif metric.attributes:
        (attribute,) = metric.attributes
        for place, told in enumerate(_ONE_ATTRIBUTE[metric.name]):
            rare = metric.name in _RARE or place > 1
            amount = (done > SLIP) if rare else at_s / 10**place
            yield {attribute: told}, float(amount // 1) if grows else 1.0
    else:
        rare = metric.name == "tamiyo.frames.missed"
        amount = float(done > SLIP) if rare else float(at_s)
        yield {}, amount if grows or metric.unit == "s" else 2.0


def _add_histogram(made: Metric, start: int, now: int, done: float) -> None:
    made.histogram.aggregation_temporality = (
        AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    )
    count = round(2000 * done)
    counts = [count * share // 100 for share in (5, 20, 40, 20, 10, 3, 1, 1, 0, 0, 0)]
    made.histogram.data_points.add(
        start_time_unix_nano=start,
        time_unix_nano=now,
        count=sum(counts),
        sum=0.6 * count,
        bucket_counts=counts,
        explicit_bounds=BOUNDS_MS,
    )


def _timeline(step: int, end_ns: int, values: Values) -> StepTimeline:
    marks = [end_ns - round(values["step_latency_ms"] * 1e6)]
    names = ("input_wait", "forward", "backward", "optimizer")
    for name in names:
        marks.append(marks[-1] + round(values[f"{name}_ms"] * 1e6))
    spans = [
        (f"train.{name}", begin, end)
        for name, begin, end in zip(names, marks, marks[1:], strict=False)
    ]
    return StepTimeline(step, marks[0], end_ns, spans)


def _post(endpoint: str, request: ExportMetricsServiceRequest) -> None:
    sent = urllib.request.Request(
        f"{endpoint}/v1/metrics",
        request.SerializeToString(),
        {"Content-Type": "application/x-protobuf"},
    )
    with urllib.request.urlopen(sent, timeout=30):
        pass
