"""The stream as a whole: it never stalls a run, and says what became of everything."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import select
import socket
import subprocess
import sys
import threading
import time
from math import nan
from pathlib import Path

import numpy as np
import pytest

from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.stream import Stream, read_frames, read_recording
from esper_otel.stream.stream import MAX_TIMELINES
from testkit.patience import PATIENCE_S
from testkit.receiver import METRICS, Answer, HttpReceiver

TIMELINE = StepTimeline(1, 1_000, 9_000, [("train.forward", 2_000, 3_000)])


@pytest.fixture
def http():
    with HttpReceiver() as receiver:
        yield receiver


@pytest.fixture
def black_hole():
    """A URL where connections are accepted by the kernel and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def dropped_syn():
    """A URL whose connection attempts are never answered: the backlog is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)
        yield f"http://127.0.0.1:{address[1]}"
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("where", ["black_hole", "dropped_syn"])
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_closing_against_a_black_hole_takes_its_time_and_no_more(
    where, protocol, request, open_stream, row, wait_until
):
    environ = {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    url = request.getfixturevalue(where)
    stream = open_stream(url, environ, flush_timeout_s=0.5)
    for step in range(10):
        stream.frame(step + 1, row(step))
    stream.timeline(TIMELINE)
    wait_until(lambda: stream.snapshot().metrics.spooled == 20)
    start = time.monotonic()
    report = stream.close()
    assert time.monotonic() - start < 2.0
    assert report.metrics.spooled == report.metrics.produced == 20
    assert report.traces.spooled == report.traces.produced == 2
    metrics_file, traces_file = sorted(report.files)
    assert [frame.step for frame in read_frames(metrics_file)] == list(range(10))
    assert len(list(read_recording(traces_file))) == 1


def test_closing_when_nobody_listens_does_not_wait(open_stream, row, caplog):
    receiver = HttpReceiver().start()
    receiver.stop()
    stream = open_stream(receiver.url, flush_timeout_s=30.0)
    stream.frame(1, row(1))
    start = time.monotonic()
    report = stream.close()
    assert time.monotonic() - start < 5
    (left,) = report.files
    assert re.fullmatch(rf"run-rank0-{os.getpid()}-\w+\.000001\.metrics\.otlp", left.name)
    assert [path.name for path in left.parent.iterdir()] == [left.name]
    assert f"esper-otel resend {left}" in caplog.text


def test_closing_waits_for_a_receiver_that_names_its_pause(http, open_stream, row):
    answers = [Answer(503, {"Retry-After": "0.2"})]
    http.answer = lambda request: answers.pop() if answers else Answer(200)
    stream = open_stream(http.url, flush_timeout_s=5.0)
    stream.frame(1, row(1))
    assert stream.close().metrics.delivered == 2


def test_closing_twice_is_closing_once(http, open_stream, row):
    stream = open_stream(http.url)
    stream.frame(1, row(1))
    assert stream.close() == stream.close()
    stream.frame(2, row(2))
    stream.timeline(TIMELINE)
    assert stream.snapshot().frames == 1


def test_what_was_never_started_is_accounted_for_all_the_same(settings, row):
    stream = Stream(settings(), run_id="run", instance_id="i", environ={})
    stream.frame(1, row(1))
    stream.timeline(TIMELINE)
    report = stream.close()
    assert (report.metrics.produced, report.metrics.dropped) == (2, 2)
    assert (report.traces.produced, report.traces.dropped) == (2, 2)


def test_frames_from_before_the_start_are_sent(http, settings, row):
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": http.url}
    stream = Stream(settings(), run_id="run", instance_id="i", environ=environ)
    stream.frame(1, row(1))
    stream.start()
    assert stream.close().metrics.delivered == 2


def test_a_full_ring_refuses_and_counts(settings, row):
    stream = Stream(settings(ring_steps=16), run_id="run", instance_id="i", environ={})
    for step in range(20):
        stream.frame(step, row(step))
    for _ in range(MAX_TIMELINES + 3):
        stream.timeline(TIMELINE)
    report = stream.snapshot()
    assert (report.frames, report.refused_frames) == (16, 4)
    assert (report.metrics.produced, report.metrics.dropped) == (8, 8)
    assert (report.traces.produced, report.traces.dropped) == (6, 6)


def test_the_spool_is_bounded_and_drops_the_oldest(open_stream, row, black_hole, wait_until):
    stream = open_stream(black_hole, spool_mb=0.1, flush_timeout_s=0.1)
    full = [float(slot) for slot in range(len(STEP_KEYS))]
    for step in range(100):
        full[0] = float(step)
        stream.frame(step + 1, full)
        if step % 10 == 9:
            points = (step + 1) * len(STEP_KEYS)
            wait_until(lambda made=points: stream.snapshot().metrics.produced == made)
    report = stream.close()
    assert report.metrics.dropped > 0
    assert report.metrics.spooled > 0
    assert report.metrics.produced == report.metrics.spooled + report.metrics.dropped
    assert report.metrics.produced == 100 * len(STEP_KEYS)
    assert sum(left.stat().st_size for left in report.files) < 101_000
    steps = [frame.step for left in report.files for frame in read_frames(left)]
    assert steps[-1] == 99
    assert len(steps) * len(STEP_KEYS) == report.metrics.spooled


def test_a_recording_holds_every_frame_and_span(http, open_stream, row, seed, tmp_path):
    stream = open_stream(http.url, recording_dir=str(tmp_path / "recordings"))
    for step in range(50):
        stream.frame(1000 + step, row(step, accuracy=0.5), [seed("a", 0.5), seed("b")])
    stream.timeline(TIMELINE)
    report = stream.close()
    metrics_file, traces_file = sorted(report.recordings)
    assert metrics_file.name == "run-rank0.metrics.otlp"
    frames = list(read_frames(metrics_file))
    assert [frame.step for frame in frames] == list(range(50))
    assert frames[7].time_unix_nano == 1007
    assert frames[7].values == {"step": 7.0, "loss": 0.5, "accuracy": 0.5}
    assert frames[7].seeds["a"] == {"kasmina.seed.stage": 3.0, "kasmina.seed.alpha": 0.5}
    assert set(frames[7].seeds) == {"a", "b"}
    assert (frames[7].run, frames[7].instance, frames[7].rank) == ("run", "instance", 0)
    assert len(list(read_recording(traces_file))) == 1


def test_a_recording_is_made_without_any_receiver(open_stream, row, tmp_path):
    environ = {"OTEL_METRICS_EXPORTER": "none", "OTEL_TRACES_EXPORTER": "none"}
    stream = open_stream("http://127.0.0.1:1", environ, recording_dir=str(tmp_path))
    stream.frame(1, row(7))
    stream.timeline(TIMELINE)
    report = stream.close()
    assert (report.metrics.produced, report.traces.produced, report.files) == (0, 0, ())
    assert len(report.recordings) == 2


def test_unsent_telemetry_without_a_place_to_leave_it_is_dropped_and_said(
    open_stream, row, tmp_path, caplog
):
    (tmp_path / "taken").touch()
    stream = open_stream("http://127.0.0.1:1", spool_dir=str(tmp_path / "taken"))
    stream.frame(1, row(1))
    report = stream.close()
    assert (report.metrics.spooled, report.metrics.dropped, report.files) == (0, 2, ())
    assert "unsent metrics are lost" in caplog.text


@pytest.mark.parametrize("bad", [[], ["x"] * len(STEP_KEYS), None])
def test_a_frame_that_is_none_is_said_once_and_hurts_nobody(
    http, open_stream, row, caplog, bad
):
    stream = open_stream(http.url)
    stream.frame(1, bad)
    stream.frame(2, bad)
    stream.frame(3, row(3))
    report = stream.close()
    assert (report.frames, report.refused_frames, report.metrics.delivered) == (1, 2, 2)
    assert caplog.text.count("could not be recorded") == 1


def test_a_start_that_fails_is_said_and_the_run_goes_on(settings, row, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "esper_otel.stream.providers", None)
    stream = Stream(settings(), run_id="run", instance_id="i", environ={})
    stream.start()
    stream.frame(1, row(1))
    assert stream.close().frames == 0
    assert "could not be started" in caplog.text


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_certificate_that_is_none_switches_sending_off_and_is_said(
    open_stream, row, caplog, tmp_path, protocol
):
    (tmp_path / "ca.pem").write_text("not a certificate")
    environ = {
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "ca.pem"),
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_TRACES_EXPORTER": "none",
    }
    stream = open_stream("https://localhost:1", environ)
    stream.frame(1, row(1))
    assert stream.close(1.0).metrics.delivered == 0
    assert "https://localhost:1" in caplog.text or "localhost:1" in caplog.text


def test_the_resource_says_whose_telemetry_it_is(http, open_stream, row, monkeypatch):
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=vision,deployment.environment=lab")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "digits")
    stream = open_stream(http.url, rank=2, local_rank=0, world_size=4)
    stream.frame(1, row(1))
    stream.timeline(TIMELINE)
    stream.close()
    assert (
        resources(http)
        == [
            {
                "service.name": "digits",
                "service.instance.id": "instance",
                "esper.run_id": "run",
                "esper.rank": 2,
                "esper.local_rank": 0,
                "esper.world_size": 4,
                "team": "vision",
                "deployment.environment": "lab",
            }
        ]
        * 2
    )


def test_without_a_name_the_service_is_a_trainer(http, open_stream, row, monkeypatch):
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    stream = open_stream(http.url)
    stream.frame(1, row(1))
    stream.close()
    assert resources(http)[0]["service.name"] == "esper-trainer"


def resources(receiver: HttpReceiver):
    """Attributes of each request's resource but for what the SDK adds about itself."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceRequest,
    )
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
    )

    found = []
    for request in receiver.inbox.requests:
        if request.path == METRICS:
            parts = ExportMetricsServiceRequest.FromString(request.body).resource_metrics
        else:
            parts = ExportTraceServiceRequest.FromString(request.body).resource_spans
        found += [
            {
                attribute.key: attribute.value.string_value or attribute.value.int_value
                for attribute in part.resource.attributes
                if not attribute.key.startswith(("telemetry.", "process.", "host."))
            }
            for part in parts
        ]
    return found


def test_the_global_random_numbers_are_not_touched(http, open_stream, row):
    torch = pytest.importorskip("torch")
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    answers = [Answer(503), Answer(503)]
    http.answer = lambda request: answers.pop() if answers else Answer(200)
    stream = open_stream(http.url)
    for step in range(20):
        stream.frame(step, row(step))
        stream.timeline(TIMELINE)
    report = stream.close()
    assert report.traces.delivered == 40
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_closing_leaves_no_thread_and_no_file_behind(protocol, open_stream, row):
    from testkit.receiver import GrpcReceiver

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with (GrpcReceiver if protocol == "grpc" else HttpReceiver)() as receiver:

        def run() -> None:
            stream = open_stream(receiver.url, {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol})
            stream.frame(1, row(1))
            stream.timeline(TIMELINE)
            assert stream.close().metrics.delivered == 2

        # Of a stream before that was closed without waiting for its receiver.
        others = {*threading.enumerate()}
        run()
        gc.collect()
        before = descriptors()
        for _ in range(5):
            run()
        gc.collect()
        more = {*threading.enumerate()} - others
        ours = [thread for thread in more if "esper" in thread.name]
        deadline = time.monotonic() + PATIENCE_S
        # The receiver notices closed connections a moment later.
        while descriptors() > before + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert descriptors() <= before + 1
    assert ours == []


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_forked_child_is_silent(protocol, open_stream, row, wait_until, tmp_path):
    from testkit.receiver import GrpcReceiver

    with (GrpcReceiver if protocol == "grpc" else HttpReceiver)() as receiver:
        script = f"""
import json, os, sys
from esper_otel.settings import EsperSettings
from esper_otel.leyline.frames import StepTimeline
from esper_otel.stream import Stream
import threading
row = {[7.0] + [0.5] * (len(STEP_KEYS) - 1)}
settings = EsperSettings(
    spool_dir={str(tmp_path / "spool")!r}, recording_dir={str(tmp_path / "recorded")!r},
    stream_interval_ms=10.0)
stream = Stream(settings, run_id="run", instance_id="i")
stream.start()
stream.frame(1, row)
while stream.snapshot().metrics.delivered < {len(STEP_KEYS)}:
    pass
child = os.fork()
if child == 0:
    threads = [t.name for t in threading.enumerate() if "esper" in t.name]
    for step in range(100):
        stream.frame(step, row)
        stream.timeline(StepTimeline(1, 1, 2, []))
    report = stream.close()
    silent = not threads and report.frames == 0 and report.metrics.produced == 0
    sys.exit(0 if silent else 1)
_, status = os.waitpid(child, 0)
stream.frame(2, row)
report = stream.close()
print(json.dumps([os.waitstatus_to_exitcode(status), report.metrics.delivered]))
"""
        finished = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
            env={
                **os.environ,
                "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
                "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert finished.stdout, finished.stderr
        assert json.loads(finished.stdout) == [0, 2 * len(STEP_KEYS)]
        assert len(receiver.inbox.points()) == 2 * len(STEP_KEYS)
        assert not list((tmp_path / "spool").glob("*"))
        (recorded,) = (tmp_path / "recorded").iterdir()
        assert len(list(read_frames(recorded))) == 2


def test_draining_goes_on_while_the_receiver_hangs(
    open_stream, row, black_hole, wait_until, caplog
):
    stream = open_stream(black_hole, ring_steps=16, flush_timeout_s=0.1)
    for step in range(0, 160, 16):
        for each in range(16):
            stream.frame(step + each, row(step + each))
        wait_until(lambda made=2 * (step + 16): stream.snapshot().metrics.produced == made)
    assert stream.snapshot().refused_frames == 0
    assert stream.close().metrics.spooled == 320
    # Not the error of a connection that we closed ourselves.
    wait_until(lambda: "(no answer by the end of the run)" in caplog.text)


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("numpy", "grpc", "requests", "google.protobuf", "opentelemetry", "torch")
    code = (
        "import sys, esper_otel.stream\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"


def test_a_frame_of_nothing_but_gaps_sends_nothing(http, open_stream):
    stream = open_stream(http.url)
    stream.frame(1, [nan] * len(STEP_KEYS))
    report = stream.close()
    assert (report.frames, report.metrics.produced) == (1, 0)


def test_the_process_ends_at_once_however_the_receiver_behaves(black_hole, tmp_path):
    """An interpreter with sends in flight exits without waiting for them."""
    code = f"""
from esper_otel.settings import EsperSettings
from esper_otel.stream import Stream
stream = Stream(EsperSettings(spool_dir={str(tmp_path)!r}), run_id="r", instance_id="i")
stream.start()
stream.frame(1, {[1.0] * len(STEP_KEYS)})
stream.close(0.2)
print("closed", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "OTEL_EXPORTER_OTLP_ENDPOINT": black_hole,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1000",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert select.select([process.stdout], [], [], PATIENCE_S)[0]
        assert process.stdout.readline() == "closed\n"
        assert process.wait(timeout=PATIENCE_S) == 0
    assert len(list(tmp_path.iterdir())) == 1
