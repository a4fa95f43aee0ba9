"""Spans: the phases of one step, created afterwards with their own times.

The training thread keeps a :class:`~esper_otel.leyline.frames.StepTimeline`, plain
numbers. The stream's thread makes spans of it: ``train.step`` and below it one span per
phase. Where nobody but us takes them they become bytes at once
(:mod:`~esper_otel.stream.span_encoding`), else they go through the user's tracer provider.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from esper_otel.leyline.decisions import FAILED_OPEN, Decision, Finding
from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.leyline.trace_ids import DECIDE_SPAN, STEP_SPAN
from esper_otel.stream.span_encoding import CLIENT, AttributeValue, SpanContent, SpanEvent

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

    from esper_otel.stream.providers import StepIds, Tracers

FINDING_EVENT = "esper.finding"

_NONE: Mapping[str, AttributeValue] = {}

STEP_ATTRIBUTES = (
    "loss",
    "accuracy",
    "gradient_norm",
    "optimizer_lr",
    "lr_scale",
    "restored",
    "samples_per_s",
    "nonfinite",
)
"""Metrics of the step that its span carries, as ``esper.`` + key."""


def emit_spans(timeline: StepTimeline, tracers: Tracers) -> None:
    """Make the spans of one step, each with its own start and end."""
    root, phases = _step_span(timeline), list(_phase_spans(timeline))
    if not tracers.is_on:
        return
    ids = tracers.ids
    encoder = tracers.encoder_for((root, *phases), timeline.step)
    if encoder is None:
        _start_and_end(timeline.step, root, phases, tracers)
        return
    trace, parent = ids.trace_of(timeline.step), ids.span_of(timeline.step, STEP_SPAN)
    for key, phase in _keyed(phases):
        encoder.add(phase, trace, ids.span_of(timeline.step, key), parent)
    encoder.add(root, trace, parent, 0)


def _start_and_end(
    step: int, root: SpanContent, phases: Sequence[SpanContent], tracers: Tracers
) -> None:
    """The same through a tracer: the user's own, or one whose sampler and limits ask for it."""
    from opentelemetry.context import Context
    from opentelemetry.trace import set_span_in_context

    tracer = tracers.tracer()
    # An empty context: the thread's own has nothing to do with the step.
    whole = _started(tracer, tracers.ids, step, STEP_SPAN, root, Context())
    inside = set_span_in_context(whole, Context())
    for key, phase in _keyed(phases):
        span = _started(tracer, tracers.ids, step, key, phase, inside)
        _end(span, phase)
    _end(whole, root)


def _started(
    tracer: Tracer, ids: StepIds, step: int, key: str, content: SpanContent, context: Context
) -> Span:
    from opentelemetry.trace import SpanKind

    ids.next(step, key)
    return tracer.start_span(
        content.name,
        context=context,
        kind=SpanKind.CLIENT if content.kind == CLIENT else SpanKind.INTERNAL,
        attributes=content.attributes,
        start_time=content.start,
    )


def _end(span: Span, content: SpanContent) -> None:
    from opentelemetry.trace import Status, StatusCode

    for event in content.events:
        span.add_event(event.name, event.attributes, event.time_unix_nano)
    if content.error:
        span.set_status(Status(StatusCode.ERROR, content.error))
    span.end(content.end)


def _keyed(phases: Sequence[SpanContent]) -> Iterator[tuple[str, SpanContent]]:
    """Phases, each with what its id is made of."""
    seen: Counter[str] = Counter()
    for phase in phases:
        seen[phase.name] += 1
        # Micro-batches: the second train.forward of a step is a span of its own.
        times = seen[phase.name]
        yield (phase.name if times == 1 else f"{phase.name}#{times}"), phase


def _step_span(timeline: StepTimeline) -> SpanContent:
    events: list[SpanEvent] = []
    if timeline.update is not None:
        events += _finding_events(timeline.update, timeline.end_unix_nano)
    events += [
        SpanEvent(event.name, {**event.attributes, "message": event.text}, event.mark)
        for event in timeline.events
    ]
    return SpanContent(
        STEP_SPAN,
        timeline.start_unix_nano,
        timeline.end_unix_nano,
        _step_attributes(timeline),
        events,
    )


def _phase_spans(timeline: StepTimeline) -> Iterator[SpanContent]:
    for name, start, end in timeline.phases:
        if name != DECIDE_SPAN:
            yield SpanContent(name, start, end, _NONE)
        elif timeline.decision is None:
            yield SpanContent(name, start, end, _NONE, (), CLIENT)
        else:
            yield _decide_span(timeline.decision, start, end, timeline.applied)


def _decide_span(decision: Decision, start: int, end: int, applied: bool) -> SpanContent:
    """Attributes of a decision, one event per finding, an error when nobody decided."""
    attributes, error = _decision_attributes(decision), ""
    if decision.reason in FAILED_OPEN:
        attributes["error.type"] = decision.reason
        error = f"no decision: {decision.reason}"
    attributes["esper.decision.applied"] = applied
    events = _finding_events(decision, end)
    return SpanContent(DECIDE_SPAN, start, end, attributes, events, CLIENT, error)


def _finding_events(decision: Decision, time_unix_nano: int) -> list[SpanEvent]:
    return [
        SpanEvent(FINDING_EVENT, _finding_attributes(finding), time_unix_nano)
        for finding in decision.findings
    ]


def _step_attributes(timeline: StepTimeline) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {"esper.step": timeline.step}
    if timeline.phase:
        attributes["esper.phase.name"] = timeline.phase
    if timeline.row:
        for key in STEP_ATTRIBUTES:
            value = timeline.row[STEP_SLOT[key]]
            if isfinite(value):
                attributes[f"esper.{key}"] = value
    update = timeline.update
    if update is not None:
        # Decided before the update was made, and about that one alone.
        attributes["esper.update.reason"] = update.reason
        attributes["esper.update.skipped"] = bool(
            timeline.row and timeline.row[STEP_SLOT["update_skipped"]] == 1.0
        )
        for name, value in update.parameters.items():
            attributes[f"esper.update.parameter.{name}"] = value
    decision = timeline.decision
    if decision is not None:
        # On the step as well: it is the span that people search for.
        attributes["esper.decision.action"] = str(decision.action)
        attributes["esper.decision.severity"] = str(decision.severity)
        attributes["esper.decision.reason"] = decision.reason
    return attributes


def _decision_attributes(decision: Decision) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "esper.decision.id": decision.id,
        "esper.decision.action": str(decision.action),
        "esper.decision.severity": str(decision.severity),
        "esper.decision.reason": decision.reason,
        "esper.decision.observed_step": decision.observed_step,
        "esper.decision.conservative": decision.conservative,
        "esper.decision.table_version": decision.table_version,
    }
    if decision.target_seed is not None:
        attributes["esper.decision.target_seed"] = decision.target_seed
    if decision.seed_operation is not None:
        attributes["esper.decision.seed_operation"] = str(decision.seed_operation)
    for name, value in decision.parameters.items():
        attributes[f"esper.decision.parameter.{name}"] = value
    return attributes


def _finding_attributes(finding: Finding) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "esper.finding.rule": finding.rule,
        "esper.finding.action": str(finding.action),
        "esper.finding.severity": str(finding.severity),
        "esper.finding.text": finding.text,
    }
    if finding.seed_id is not None:
        attributes["esper.finding.seed_id"] = finding.seed_id
    for key, value in finding.values.items():
        attributes[f"esper.finding.value.{key}"] = value
    return attributes
