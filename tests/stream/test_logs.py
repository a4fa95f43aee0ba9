"""Events on their way to a receiver, as OTLP log records."""

import opentelemetry._logs._internal as api_state
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.logs.v1.logs_pb2 import SeverityNumber
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor

from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.events import Event
from esper_otel.leyline.trace_ids import span_id, trace_id
from esper_otel.stream import read_recording, resend
from esper_otel.stream.destination import Signal
from esper_otel.stream.logs import TrainerIdentity, encode_events
from esper_otel.stream.stream import MAX_EVENTS
from esper_otel.stream.transport import Verdict, delivered
from testkit.patience import PATIENCE_S
from testkit.receiver import LOGS, Answer, GrpcReceiver, HttpReceiver


@pytest.fixture
def http():
    with HttpReceiver() as receiver:
        yield receiver


TRAINER = TrainerIdentity("run", 0, "instance")
ATTRIBUTES = {"esper.seed.id": "s", "esper.step": 7, "passed": True, "loss": 0.5}


def event(severity=Severity.NORMAL, mark=123):
    return Event("esper.seed.stage", mark, severity, "s: DORMANT to GERMINATED", ATTRIBUTES)


def records(body):
    request = ExportLogsServiceRequest.FromString(body)
    return [r for of in request.resource_logs for s in of.scope_logs for r in s.log_records]


def plain(value):
    return getattr(value, value.WhichOneof("value"))


@pytest.mark.parametrize(
    ("severity", "number"),
    [
        (Severity.NORMAL, SeverityNumber.SEVERITY_NUMBER_INFO),
        (Severity.WARNING, SeverityNumber.SEVERITY_NUMBER_WARN),
        (Severity.HIGH, SeverityNumber.SEVERITY_NUMBER_ERROR),
        (Severity.CRITICAL, SeverityNumber.SEVERITY_NUMBER_FATAL),
    ],
)
def test_an_event_is_a_log_record_with_a_name(severity, number):
    resource = Resource()
    resource.attributes.add(key="esper.run_id").value.string_value = "r"
    body = encode_events([event(severity)], resource.SerializeToString(), TRAINER)
    (record,) = records(body)
    assert (record.event_name, record.time_unix_nano) == ("esper.seed.stage", 123)
    assert (record.severity_number, record.severity_text) == (number, severity)
    assert plain(record.body) == "s: DORMANT to GERMINATED"
    assert {a.key: plain(a.value) for a in record.attributes} == ATTRIBUTES
    assert record.observed_time_unix_nano > record.time_unix_nano
    of_us = ExportLogsServiceRequest.FromString(body).resource_logs[0]
    assert of_us.resource == resource
    assert of_us.scope_logs[0].scope.name == "esper_otel"


def test_a_record_belongs_to_the_span_of_its_step():
    (record,) = records(encode_events([event()], b"", TRAINER))
    assert int.from_bytes(record.trace_id, "big") == trace_id("run", 7)
    expected = span_id("run", 0, "instance", 7, "train.step")
    assert int.from_bytes(record.span_id, "big") == expected
    assert record.flags == 1


def test_what_happened_outside_of_a_step_belongs_to_no_trace():
    apart = event()._replace(attributes={"esper.seed.id": "s"})
    (record,) = records(encode_events([apart], b"", TRAINER))
    assert (record.trace_id, record.span_id, record.flags) == (b"", b"", 0)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_records_are_delivered_and_accounted_for(open_stream, protocol):
    with (GrpcReceiver if protocol == "grpc" else HttpReceiver)() as receiver:
        stream = open_stream(receiver.url, {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol})
        for mark in range(5):
            stream.event(event(mark=mark))
        report = stream.close()
        assert report.logs.produced == report.logs.delivered == 5
        bodies = [each.body for each in receiver.inbox.requests if each.path == LOGS]
    assert [r.time_unix_nano for body in bodies for r in records(body)] == [0, 1, 2, 3, 4]


@pytest.fixture
def users_exporter(monkeypatch):
    """Set a logger provider, as a script does, for one test."""
    exporter = InMemoryLogRecordExporter()
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    monkeypatch.setattr(api_state, "_LOGGER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


def test_a_logger_provider_of_the_users_gets_the_records(http, open_stream, users_exporter):
    stream = open_stream(http.url)
    stream.event(event(Severity.WARNING))
    report = stream.close()
    (got,) = users_exporter.get_finished_logs()
    record = got.log_record
    assert (record.event_name, record.timestamp) == ("esper.seed.stage", 123)
    assert record.body == "s: DORMANT to GERMINATED"
    assert dict(record.attributes) == ATTRIBUTES
    assert (record.severity_number.name, record.severity_text) == ("WARN", "WARNING")
    assert record.trace_id == trace_id("run", 7)
    assert record.span_id == span_id("run", 0, "instance", 7, "train.step")
    assert report.logs.produced == 0
    assert http.inbox.attempts[LOGS] == 0


def test_a_recording_holds_what_the_users_provider_got(
    http, open_stream, users_exporter, tmp_path
):
    stream = open_stream(http.url, recording_dir=str(tmp_path / "recorded"))
    stream.event(event())
    report = stream.close()
    held = [
        r for file in report.recordings for body in read_recording(file) for r in records(body)
    ]
    assert [record.event_name for record in held] == ["esper.seed.stage"]
    assert len(users_exporter.get_finished_logs()) == 1


def closed_to_logs(receiver, stream, row, wait_until):
    """A receiver with metrics only: what comes of events then."""
    stream.event(event())
    wait_until(lambda: stream.snapshot().logs.refused == 1)
    stream.event(event())
    stream.frame(1, row(1))
    report = stream.close()
    assert report.metrics.delivered == 2
    assert report.logs.delivered == 0


def test_an_http_receiver_without_logs_gets_no_more_of_them(http, open_stream, row, wait_until):
    http.answer = lambda request: Answer(404) if request.path == LOGS else Answer(200)
    closed_to_logs(http, open_stream(http.url), row, wait_until)
    assert http.inbox.attempts[LOGS] == 1


def test_a_grpc_receiver_without_logs_gets_no_more_of_them(open_stream, row, wait_until):
    with GrpcReceiver() as receiver:
        receiver.answer = lambda request: Answer(
            "UNIMPLEMENTED" if request.path == LOGS else "OK"
        )
        environ = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
        closed_to_logs(receiver, open_stream(receiver.url, environ), row, wait_until)


def test_unsent_events_are_left_in_a_file_and_can_be_delivered_later(http, open_stream):
    stream = open_stream("http://127.0.0.1:1")
    stream.event(event())
    report = stream.close()
    assert report.logs.spooled == report.logs.produced == 1
    (file,) = report.files
    (body,) = read_recording(file)
    assert len(records(body)) == 1
    told = resend([file], {"OTEL_EXPORTER_OTLP_ENDPOINT": http.url})
    assert (told.is_complete, told.files[0].delivered) == (True, 1)


def test_more_events_than_may_wait_are_counted_as_dropped(open_stream):
    stream = open_stream(
        "http://127.0.0.1:1", stream_interval_ms=60_000.0, flush_timeout_s=PATIENCE_S
    )
    for _ in range(MAX_EVENTS + 3):
        stream.event(event())
    report = stream.close()
    assert (report.logs.produced, report.logs.dropped) == (MAX_EVENTS + 3, 3)


def test_records_that_a_receiver_rejected_are_read_from_its_answer():
    answer = ExportLogsServiceResponse()
    answer.partial_success.rejected_log_records = 2
    outcome = delivered(Signal.LOGS, answer.SerializeToString())
    assert (outcome.verdict, outcome.rejected) == (Verdict.DELIVERED, 2)
