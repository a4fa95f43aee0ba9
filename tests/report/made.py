"""Recordings for tests of reports, and reading the data of a page back."""

from __future__ import annotations

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)

from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import RANK, RUN_ID
from esper_otel.leyline.otlp_file import framed
from sidecar.frames_made import otlp_of, put

STEP_NS = 10_000_000
BEGAN_NS = 1_790_000_000_000_000_000


def frames(count, run="run", instance="one", rank=0, first=0, seeds=(), at_s=0.0, **curves):
    """Frames of ``count`` steps; each of ``curves`` gives a value, or None, for a step."""
    made = []
    for step in range(first, first + count):
        values = {"step": float(step)}
        for key, of in curves.items():
            value = of(step)
            if value is not None:
                values[key] = value
        made.append(
            StepFrame(
                run,
                instance,
                rank,
                step,
                BEGAN_NS + round(at_s * 1e9) + (step + 1) * STEP_NS,
                values,
                {
                    seed: {"kasmina.seed.stage": 3.0, "kasmina.seed.alpha": step / count}
                    for seed in seeds
                },
            )
        )
    return made


def recorded(path, made, at_once=100):
    """``made`` frames of one trainer as a recording."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, len(made), at_once):
            file.write(framed(otlp_of(*made[start : start + at_once]).SerializeToString()))
    return path


def spans(path, run, *steps, rule="loss_spike", text="The loss leapt.", rank=0, action="PAUSE"):
    """A recording of spans with a decision about each of ``steps``."""
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    put(group.resource.attributes, RUN_ID, run)
    group.resource.attributes.add(key=RANK).value.int_value = rank
    scope = group.scope_spans.add()
    for step in steps:
        span = scope.spans.add(name="tamiyo.decide", trace_id=b"t" * 16, span_id=b"s" * 8)
        put(span.attributes, "esper.decision.id", f"{run}/{rank}/{step}")
        put(span.attributes, "esper.decision.action", action)
        put(span.attributes, "esper.decision.severity", "HIGH")
        put(span.attributes, "esper.decision.reason", rule)
        span.attributes.add(key="esper.decision.applied").value.bool_value = True
        event = span.events.add(name="esper.finding")
        put(event.attributes, "esper.finding.rule", rule)
        put(event.attributes, "esper.finding.action", action)
        put(event.attributes, "esper.finding.severity", "HIGH")
        put(event.attributes, "esper.finding.text", text)
        for key, value in (("loss", 8.5), ("baseline(loss)", 0.5 + step)):
            attribute = event.attributes.add(key=f"esper.finding.value.{key}")
            attribute.value.double_value = value
    path.write_bytes(framed(request.SerializeToString()))
    return path


def logs(path, run, seed, text, step=5):
    """A recording of one event of a seed."""
    request = ExportLogsServiceRequest()
    group = request.resource_logs.add()
    put(group.resource.attributes, RUN_ID, run)
    record = group.scope_logs.add().log_records.add(
        time_unix_nano=BEGAN_NS, severity_number=13, event_name="esper.seed.stage"
    )
    record.body.string_value = text
    record.attributes.add(key="esper.step").value.int_value = step
    put(record.attributes, "esper.seed.id", seed)
    path.write_bytes(framed(request.SerializeToString()))
    return path


JOURNAL = """\
{"at":"x","kind":"opened","time_unix_nano":1,"pid":1,"release":"1"}
{"kind":"table","time_unix_nano":1,"version":"v1","rules":[{"id":"loss_spike",\
"action":"PAUSE","severity":"HIGH","when":"loss_delta above 2","text":"The loss leapt."}]}
{"kind":"rule","time_unix_nano":2,"run":"run","rank":0,"step":30,"rule":"loss_spike",\
"severity":"HIGH","seed_id":null,"before":"inactive","after":"firing","since_step":1,\
"values":{},"silenced_by":""}
{"kind":"decision","time_unix_nano":2,"id":"run/0/30","run":"run","rank":0,"instance":"one",\
"step":30,"observed_step":30,"action":"PAUSE","severity":"HIGH","reason":"loss_spike",\
"target_seed":null,"seed_operation":null,"parameters":{"lr_scale":0.5},"conservative":true,\
"table_version":"v1","mode":"enforce","asked":true,"decided_unix_nano":2,"took_ms":0.1,\
"proposal":null,"findings":[{"rule":"loss_spike","action":"PAUSE","severity":"HIGH",\
"text":"The loss leapt.","values":{"loss":9.0}}],"silenced":[]}
{"kind":"rule","time_unix_nano":3,"run":"run","rank":0,"step":40,"rule":"loss_spike",\
"severity":"HIGH","seed_id":null,"before":"firing","after":"inactive","since_step":30,\
"values":{},"silenced_by":""}
{"kind":"field_report","time_unix_nano":4,"decision":"run/0/30","run":"run","rank":0,\
"step":30,"action":"PAUSE","reason":"loss_spike","mode":"enforce","outcome":"improved",\
"because":"loss is back to its earlier value","window":20,"observed":20,"before":{"loss":0.5},\
"during":{"loss":9.0},"after":{"loss":0.4},"applied":true,"comparison":"none was left alone"}
"""
"""A journal of one decision about step 30 of "run", and what came of it."""
