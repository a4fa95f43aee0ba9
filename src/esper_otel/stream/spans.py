"""Spans: the story of one step, told afterwards with its own times.

The training thread keeps a :class:`~esper_otel.leyline.frames.StepTimeline`, plain
numbers. The stream's thread makes spans of it: ``train.step`` and below it one span per
phase.
"""

from __future__ import annotations

from collections import Counter
from math import isfinite
from typing import TYPE_CHECKING

from esper_otel.leyline.decisions import FAILED_OPEN, Decision, Finding
from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.leyline.trace_ids import DECIDE_SPAN, STEP_SPAN

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

    from esper_otel.stream.providers import Tracers

FINDING_EVENT = "esper.finding"

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
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind, set_span_in_context

    tracer = tracers.tracer()
    tracers.ids.next(timeline.step, STEP_SPAN)
    step = tracer.start_span(
        STEP_SPAN,
        # An empty context: the thread's own has nothing to do with the step.
        context=Context(),
        attributes=_step_attributes(timeline),
        start_time=timeline.start_unix_nano,
    )
    inside = set_span_in_context(step, Context())
    seen: Counter[str] = Counter()
    for name, start, end in timeline.phases:
        seen[name] += 1
        # Micro-batches: the second train.forward of a step is a span of its own.
        tracers.ids.next(timeline.step, name if seen[name] == 1 else f"{name}#{seen[name]}")
        is_decide = name == DECIDE_SPAN
        span = tracer.start_span(
            name,
            context=inside,
            kind=SpanKind.CLIENT if is_decide else SpanKind.INTERNAL,
            start_time=start,
        )
        if is_decide and timeline.decision is not None:
            _tell_decision(span, timeline.decision, end)
            span.set_attribute("esper.decision.applied", timeline.applied)
        span.end(end)
    if timeline.update is not None:
        for finding in timeline.update.findings:
            step.add_event(FINDING_EVENT, _finding_attributes(finding), timeline.end_unix_nano)
    for event in timeline.events:
        step.add_event(event.name, {**event.attributes, "message": event.text}, event.mark)
    step.end(timeline.end_unix_nano)


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


def _tell_decision(span: Span, decision: Decision, time_unix_nano: int) -> None:
    """Attributes of a decision, one event per finding, an error when nobody decided."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attributes(_decision_attributes(decision))
    for finding in decision.findings:
        span.add_event(FINDING_EVENT, _finding_attributes(finding), time_unix_nano)
    if decision.reason in FAILED_OPEN:
        span.set_attribute("error.type", decision.reason)
        span.set_status(Status(StatusCode.ERROR, f"no decision: {decision.reason}"))


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
