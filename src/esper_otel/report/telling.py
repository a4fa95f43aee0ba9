"""Telling: rulings and events from OTLP traces and logs, and from a journal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from esper_otel.leyline.events import CONFIG_ATTRIBUTE, CONFIGURED
from esper_otel.leyline.metrics import RANK, RUN_ID
from esper_otel.leyline.trace_ids import DECIDE_SPAN, STEP_SPAN
from esper_otel.report.rulings import Aftermath, Ground, Happening, Ledger, Ruling

_FINDING = "esper.finding"
_VALUE = f"{_FINDING}.value."
_PARAMETER = ".parameter."
_SEVERITIES = {9: "NORMAL", 13: "WARNING", 17: "HIGH", 21: "CRITICAL"}

Value = str | int | float | bool


def take_traces(request: ExportTraceServiceRequest, ledger: Ledger) -> None:
    """Add what the spans of steps and decisions say."""
    for group in request.resource_spans:
        resource = _attributes(group.resource.attributes)
        run, rank = str(resource.get(RUN_ID, "")), _whole(resource.get(RANK))
        for scope in group.scope_spans:
            for span in scope.spans:
                if span.name == DECIDE_SPAN:
                    _take_decision(span, ledger)
                elif span.name == STEP_SPAN:
                    _take_step(span, run, rank, ledger)


def _take_decision(span: Span, ledger: Ledger) -> None:
    found = _attributes(span.attributes)
    name = str(found.get("esper.decision.id", ""))
    run, rank, step = _parts(name)
    if step < 0:
        return
    applied = found.get("esper.decision.applied")
    ledger.add(
        Ruling(
            id=name,
            run=run,
            rank=rank,
            step=step,
            time_unix_nano=span.end_time_unix_nano,
            action=str(found.get("esper.decision.action", "")),
            severity=str(found.get("esper.decision.severity", "")),
            reason=str(found.get("esper.decision.reason", "")),
            applied=applied if isinstance(applied, bool) else None,
            conservative=found.get("esper.decision.conservative") is True,
            target_seed=_text(found.get("esper.decision.target_seed")),
            seed_operation=_text(found.get("esper.decision.seed_operation")),
            table_version=str(found.get("esper.decision.table_version", "")),
            parameters=_numbers(found, f"esper.decision{_PARAMETER}"),
            findings=list(_findings(span)),
        )
    )


def _take_step(span: Span, run: str, rank: int, ledger: Ledger) -> None:
    found = _attributes(span.attributes)
    step = _whole(found.get("esper.step"), -1)
    reason = found.get("esper.update.reason")
    findings = list(_findings(span))
    if isinstance(reason, str) and findings:
        parameters = _numbers(found, f"esper.update{_PARAMETER}")
        ledger.add(
            Ruling(
                id=f"{run}/{rank}/{step}/update",
                run=run,
                rank=rank,
                step=step,
                time_unix_nano=span.end_time_unix_nano,
                action=findings[0].action,
                severity=findings[0].severity,
                reason=reason,
                of_update=True,
                applied=bool(parameters) or found.get("esper.update.skipped") is True,
                parameters=parameters,
                findings=findings,
            )
        )
    for event in span.events:
        if event.name.startswith("esper.") and event.name != _FINDING:
            what = _attributes(event.attributes)
            seed, text = what.get("esper.seed.id", ""), what.get("message", "")
            ledger.tell(
                Happening(
                    run,
                    rank,
                    _whole(what.get("esper.step"), step),
                    event.time_unix_nano,
                    event.name,
                    "",
                    str(text),
                    str(seed),
                )
            )


def take_logs(request: ExportLogsServiceRequest, ledger: Ledger) -> None:
    """Add the events that are log records."""
    for group in request.resource_logs:
        resource = _attributes(group.resource.attributes)
        run, rank = str(resource.get(RUN_ID, "")), _whole(resource.get(RANK))
        for scope in group.scope_logs:
            for record in scope.log_records:
                if not record.event_name.startswith("esper."):
                    continue
                found = _attributes(record.attributes)
                if record.event_name == CONFIGURED:
                    told = {k: v for k, v in found.items() if k.startswith(CONFIG_ATTRIBUTE)}
                    ledger.configure(run, told)
                    continue
                step = _whole(found.get("esper.step"), -1)
                ledger.tell(
                    Happening(
                        run,
                        rank,
                        step,
                        record.time_unix_nano,
                        record.event_name,
                        _SEVERITIES.get(record.severity_number, ""),
                        record.body.string_value,
                        str(found.get("esper.seed.id", "")),
                    )
                )


def _findings(span: Span) -> Iterator[Ground]:
    for event in span.events:
        if event.name == _FINDING:
            found = _attributes(event.attributes)
            yield Ground(
                str(found.get(f"{_FINDING}.rule", "")),
                str(found.get(f"{_FINDING}.action", "")),
                str(found.get(f"{_FINDING}.severity", "")),
                str(found.get(f"{_FINDING}.text", "")),
                _numbers(found, _VALUE),
                _text(found.get(f"{_FINDING}.seed_id")),
            )


def _attributes(attributes: Iterable[KeyValue]) -> dict[str, Value]:
    return {each.key: value for each in attributes if (value := _value(each.value)) is not None}


def _value(value: AnyValue) -> Value | None:
    kind = value.WhichOneof("value")
    if kind in ("string_value", "int_value", "double_value", "bool_value"):
        found: Value = getattr(value, kind)
        return found
    return None


def _numbers(found: Mapping[str, Value], prefix: str) -> dict[str, float]:
    return {
        key.removeprefix(prefix): float(value)
        for key, value in found.items()
        if key.startswith(prefix) and isinstance(value, int | float)
    }


def _whole(value: Value | None, otherwise: int = 0) -> int:
    return value if isinstance(value, int) else otherwise


def _text(value: Value | None) -> str | None:
    return value if isinstance(value, str) else None


def _parts(name: str) -> tuple[str, int, int]:
    """Run, rank and step that an id names; step -1 where it is none."""
    parts = name.removesuffix("/update").rsplit("/", 2)
    if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return "", 0, -1
    return parts[0], int(parts[1]), int(parts[2])


class _Found(msgspec.Struct):
    rule: str
    action: str = ""
    severity: str = ""
    text: str = ""
    values: dict[str, float] = {}
    seed_id: str | None = None


class _RuleWords(msgspec.Struct):
    id: str
    when: str = ""
    text: str = ""


class _Line(msgspec.Struct):
    """Any line of a journal; docs/decisions.md lists the fields of each kind."""

    kind: str
    time_unix_nano: int = 0
    id: str = ""
    run: str = ""
    rank: int = 0
    step: int = 0
    action: str = ""
    severity: str = ""
    reason: str = ""
    mode: str = ""
    update: bool = False
    conservative: bool = False
    target_seed: str | None = None
    seed_operation: str | None = None
    table_version: str = ""
    parameters: dict[str, float] = {}
    findings: list[_Found] = []
    decision: str = ""
    outcome: str = ""
    because: str = ""
    comparison: str = ""
    window: int = 0
    observed: int = 0
    applied: bool | None = None
    lr_scale: float | None = None
    skipped: bool | None = None
    scaled_from: int | None = None
    lr_scale_after: float | None = None
    before: dict[str, float] | str = ""
    during: dict[str, float] = {}
    after: dict[str, float] | str = ""
    rule: str = ""
    seed_id: str | None = None
    rules: list[_RuleWords] = []


class _Kind(msgspec.Struct):
    kind: str


_KINDS = frozenset({"decision", "field_report", "rule", "table"})
"""Kinds of lines that a report tells of; there are others, and there will be more."""

_kinds, _lines = msgspec.json.Decoder(_Kind), msgspec.json.Decoder(_Line)


def take_journal_line(line: bytes, ledger: Ledger) -> bool:
    """Add what one line of a journal says; whether it is such a line."""
    try:
        if _kinds.decode(line).kind not in _KINDS:
            return True
        entry = _lines.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    if entry.kind == "decision":
        _take_decided(entry, ledger)
    elif entry.kind == "field_report":
        ledger.aftermaths[entry.decision] = _aftermath(entry)
    elif entry.kind == "rule" and isinstance(entry.after, str):
        whose = (entry.run, entry.rank, entry.rule, entry.seed_id or "")
        ledger.change(whose, entry.step, entry.after)
    elif entry.kind == "table":
        for rule in entry.rules:
            ledger.rules[rule.id] = (rule.when, rule.text)
    return True


def _take_decided(entry: _Line, ledger: Ledger) -> None:
    ledger.add(
        Ruling(
            id=entry.id,
            run=entry.run,
            rank=entry.rank,
            step=entry.step,
            time_unix_nano=entry.time_unix_nano,
            action=entry.action,
            severity=entry.severity,
            reason=entry.reason,
            of_update=entry.update,
            mode=entry.mode,
            conservative=entry.conservative,
            target_seed=entry.target_seed,
            seed_operation=entry.seed_operation,
            table_version=entry.table_version,
            parameters=entry.parameters,
            findings=[
                Ground(f.rule, f.action, f.severity, f.text, f.values, f.seed_id)
                for f in entry.findings
            ],
        )
    )


def _aftermath(entry: _Line) -> Aftermath:
    before: Any = entry.before if isinstance(entry.before, dict) else {}
    after: Any = entry.after if isinstance(entry.after, dict) else {}
    keys = dict.fromkeys([*before, *entry.during, *after])
    return Aftermath(
        entry.outcome,
        entry.applied,
        list(_sentences(entry)),
        {key: [before.get(key), entry.during.get(key), after.get(key)] for key in keys},
    )


def _sentences(entry: _Line) -> Iterator[str]:
    yield from (words for words in (entry.because, entry.comparison) if words)
    yield f"{entry.observed} of {entry.window} steps after it were seen"
    if entry.applied is not None:
        yield "it was applied" if entry.applied else "nothing was done to the run"
    if entry.skipped:
        yield f"the update of step {entry.step} was skipped"
    elif entry.update and entry.lr_scale is not None and entry.lr_scale != 1.0:
        yield f"the update of step {entry.step} was made at {entry.lr_scale:g} times the rate"
    if entry.scaled_from is not None and entry.lr_scale_after is not None:
        yield (
            f"updates were made at {entry.lr_scale_after:g} times the script's rate from step "
            f"{entry.scaled_from} on"
        )
