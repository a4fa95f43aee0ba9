"""Tamiyo's own OpenTelemetry: its metrics, and its part of each trainer's traces.

By the official SDK, configured by the standard ``OTEL_*`` variables, with one difference:
nothing is exported unless an endpoint is named. The default endpoint of the specification
is this very sidecar's receiver, or nobody. Nor is anything exported to an endpoint that
is our own.

A trainer's spans have ids that follow from run, rank and step
(:mod:`esper_otel.leyline.trace_ids`), so the span made here continues its trace although
nothing of it was sent.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from esper_otel.leyline.endpoints import shown_endpoint
from esper_otel.leyline.trace_ids import DECIDE_SPAN, STEP_SPAN, span_id, trace_id
from esper_tamiyo import release
from esper_tamiyo.journaling.entries import Decided, Found
from esper_tamiyo.journaling.messages import Heartbeat
from esper_tamiyo.journaling.own_metrics import OWN_METRICS, InstrumentKind, OwnMetric

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import Metric, MetricsData
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

log = logging.getLogger("tamiyo")

SCOPE = "esper_tamiyo"
SERVICE = "tamiyo"
"""``service.name`` unless ``OTEL_SERVICE_NAME`` or ``OTEL_RESOURCE_ATTRIBUTES`` says else."""

FINDING_EVENT = "esper.finding"
CHECK_SPAN = "tamiyo.check"
"""Of a decision about an update that was not made yet."""

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address

LOOPBACK = (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))


def endpoint_of(signal: str) -> str:
    """Where a signal goes: "" for nowhere, as no variable names an endpoint."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ""
    if os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower() == "none":
        return ""
    own = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "").strip()
    return own or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()


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


class OwnTelemetry:
    """Begins with the first heartbeat, which says where the sidecar itself listens."""

    def __init__(self) -> None:
        self.endpoints: list[str] = []
        """Where it is sent, one entry per signal, without what is secret in it."""
        self._heartbeat: Heartbeat | None = None
        self._tracers: TracerProvider | None = None
        self._meters: MeterProvider | None = None
        self._waiting: list[Decided] = []

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        """The newest state of everything the metrics tell."""
        is_first = self._heartbeat is None
        self._heartbeat = heartbeat
        if is_first:
            try:
                self._set_up(heartbeat)
            except Exception as error:
                log.warning("Tamiyo's own telemetry is off: %s", error)
        for decided in self._waiting:
            self.export_decision(decided)
        self._waiting = []

    def export_decision(self, decided: Decided) -> None:
        """Make the span of a decision."""
        if self._heartbeat is None:
            self._waiting.append(decided)
        elif self._tracers is not None:
            make_span(self._tracers, decided)

    def close(self, timeout_s: float) -> None:
        """Send what is unsent, for so long at most."""
        providers = [each for each in (self._tracers, self._meters) if each is not None]
        ends = [threading.Thread(target=each.shutdown, daemon=True) for each in providers]
        for end in ends:
            end.start()
        for end in ends:
            end.join(timeout_s)

    def _set_up(self, heartbeat: Heartbeat) -> None:
        ingest = heartbeat.report.get("ingest") or {}
        ours = [str(ingest[name]) for name in ("otlp_grpc", "otlp_http") if name in ingest]
        traces, metrics = (
            "" if is_ours(endpoint, ours) else endpoint
            for endpoint in (endpoint_of("TRACES"), endpoint_of("METRICS"))
        )
        self.endpoints = [shown_endpoint(each) for each in (traces, metrics) if each]
        if not self.endpoints:
            return
        resource = resource_of(heartbeat.report.get("pid"))
        if traces:
            self._tracers = _tracer_provider(resource)
        if metrics:
            self._meters = self._meter_provider(resource)

    def _meter_provider(self, resource: Resource) -> MeterProvider:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        from esper_tamiyo.journaling.own_exporters import metric_exporter

        reader = PeriodicExportingMetricReader(metric_exporter(self._histograms))
        provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        meter = provider.get_meter(SCOPE)
        makers = {
            InstrumentKind.COUNTER: meter.create_observable_counter,
            InstrumentKind.GAUGE: meter.create_observable_gauge,
        }
        for metric in OWN_METRICS:
            if metric.kind in makers:
                make = makers[metric.kind]
                make(metric.name, [self._reading(metric)], metric.unit, metric.meaning)
        return provider

    def _reading(self, metric: OwnMetric) -> Any:
        from opentelemetry.metrics import Observation

        def observe(options: CallbackOptions) -> Iterable[Observation]:
            heartbeat = self._heartbeat
            if heartbeat is None:
                return []
            report = {**heartbeat.report, "beat": heartbeat.beat}
            return [Observation(value, told) for value, told in metric.read(report)]

        return observe

    def _histograms(self, data: MetricsData) -> list[Metric]:
        """The histograms of the newest heartbeat, for the time that ``data`` is of."""
        from esper_tamiyo.journaling.own_exporters import histogram

        heartbeat = self._heartbeat
        if heartbeat is None:
            return []
        return [
            histogram(
                metric, heartbeat.distributions[metric.distribution], heartbeat.began_unix_nano
            )
            for metric in OWN_METRICS
            if metric.kind is InstrumentKind.HISTOGRAM
        ]


def resource_of(pid: object) -> Resource:
    """Who produces this telemetry."""
    from opentelemetry.sdk.resources import Resource

    resource = Resource.create({"service.version": release(), "process.pid": str(pid)})
    name = str(resource.attributes.get("service.name", ""))
    if not name or name.startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": SERVICE}))
    return resource


def make_span(provider: TracerProvider, decided: Decided) -> None:
    """The span of a decision, below the trainer's own span of asking for it.

    A step that came in the stream only was not asked about: then it is below the span of
    the step. So is the check of its update, which is another question.
    """
    from opentelemetry.trace import (
        NonRecordingSpan,
        SpanContext,
        SpanKind,
        TraceFlags,
        set_span_in_context,
    )

    parent = SpanContext(
        trace_id(decided.run, decided.step),
        span_id(
            decided.run,
            decided.rank,
            decided.instance,
            decided.step,
            DECIDE_SPAN if decided.asked and not decided.update else STEP_SPAN,
        ),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
    end = decided.decided_unix_nano
    span = provider.get_tracer(SCOPE).start_span(
        CHECK_SPAN if decided.update else DECIDE_SPAN,
        set_span_in_context(NonRecordingSpan(parent)),
        SpanKind.SERVER,
        attributes=_attributes(decided),
        start_time=end - int(decided.took_ms * 1e6),
    )
    for found in decided.findings:
        span.add_event(FINDING_EVENT, _finding(found), end)
    for silenced in decided.silenced:
        about: dict[str, AttributeValue] = {
            "esper.finding.rule": silenced.rule,
            "esper.finding.silenced_by": silenced.by,
        }
        span.add_event("esper.silenced", about, end)
    span.end(end)


def _attributes(decided: Decided) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "esper.run_id": decided.run,
        "esper.rank": decided.rank,
        "esper.step": decided.step,
        "esper.decision.id": decided.id,
        "esper.decision.action": str(decided.action),
        "esper.decision.severity": str(decided.severity),
        "esper.decision.reason": decided.reason,
        "esper.decision.observed_step": decided.observed_step,
        "esper.decision.conservative": decided.conservative,
        "esper.decision.table_version": decided.table_version,
        "esper.decision.mode": decided.mode or "unknown",
    }
    if decided.update:
        attributes["esper.decision.update"] = True
    if decided.target_seed is not None:
        attributes["esper.decision.target_seed"] = decided.target_seed
    if decided.seed_operation is not None:
        attributes["esper.decision.seed_operation"] = str(decided.seed_operation)
    if decided.proposal is not None:
        attributes["esper.proposal.seed_id"] = decided.proposal.seed_id
        attributes["esper.proposal.operation"] = str(decided.proposal.operation)
    for name, value in decided.parameters.items():
        attributes[f"esper.decision.parameter.{name}"] = value
    return attributes


def _finding(found: Found) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "esper.finding.rule": found.rule,
        "esper.finding.action": str(found.action),
        "esper.finding.severity": str(found.severity),
        "esper.finding.text": found.text,
    }
    if found.seed_id is not None:
        attributes["esper.finding.seed_id"] = found.seed_id
    if found.firing_since is not None:
        attributes["esper.finding.firing_since_step"] = found.firing_since
    if found.pending_since is not None:
        attributes["esper.finding.pending_since_step"] = found.pending_since
    for key, value in found.values.items():
        attributes[f"esper.finding.value.{key}"] = value
    return attributes


def _tracer_provider(resource: Resource) -> TracerProvider:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from esper_tamiyo.journaling.own_exporters import span_exporter

    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(span_exporter()))
    return provider
