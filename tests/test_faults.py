"""One part's fault takes nothing else along: a fault at each constructor, start and write.

The loop is made by hand, so torch has no part in it.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

import esper_otel
from esper_otel.leyline.faults import alone, end_each
from esper_otel.stream import (
    drain,
    read_frames,
    recording,
    redelivery,
    sender,
    spool_files,
    totals,
)
from esper_otel.stream import providers as providers_module
from esper_otel.tamiyo import client
from esper_otel.tolaria import devices
from testkit.killed_trainer import steps_in
from testkit.receiver import HttpReceiver

STEPS = 5


@pytest.fixture
def receiver():
    with HttpReceiver() as there:
        yield there


@pytest.fixture
def train(monkeypatch, tmp_path, receiver, capsys, caplog):
    """A small run; the steps that arrived, those in files, and what was told."""
    for name in [name for name in os.environ if name.startswith(("OTEL_", "ESPER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def trained(**settings):
        run = esper_otel.start(spool_dir=str(tmp_path / "spool"), run_id="r", **settings)
        for _ in range(STEPS):
            run.report(loss=0.5)
            run.step()
        report = run.close(timeout_s=5)
        assert run.close() == report
        return SimpleNamespace(
            arrived=sorted(receiver.inbox.steps()),
            left=sorted(steps_in((tmp_path / "spool").glob("*"))),
            report=report,
            told=caplog.text + capsys.readouterr().err,
        )

    return trained


ALL = list(range(1, STEPS + 1))


def fails(*args, **kwargs):
    raise RuntimeError("an injected fault")


HARMLESS = {
    "client": (client.TamiyoClient, "__init__"),
    "spans": (providers_module.Tracers, "__init__"),
    "span encoding": (providers_module.SpanEncoder, "__init__"),
    "keeper of files": (spool_files.Keeper, "__init__"),
    "redelivery": (redelivery.EarlierProcesses, "__init__"),
    "redelivery's start": (redelivery.EarlierProcesses, "start"),
    "probes": (devices.CpuUtilisation, "__init__"),
    "probes' start": (devices.DeviceSampler, "start"),
    "probes' end": (devices.DeviceSampler, "stop"),
    "a probe's reading": (devices.CpuUtilisation, "read"),
    "recording": (recording.Recording, "__init__"),
    "recording's write": (recording, "write_whole"),
    "sums of frames": (totals.RunTotals, "add"),
    "spans of a step": (drain, "emit_spans"),
    "encoded spans": (providers_module.Tracers, "encode_finished"),
}
"""Parts without which every step arrives all the same."""


@pytest.mark.parametrize("name", HARMLESS)
def test_without_a_part_every_step_arrives(name, train, monkeypatch, tmp_path):
    monkeypatch.setattr(*HARMLESS[name], fails)
    done = train(recording_dir=str(tmp_path / "recorded"))
    assert done.arrived == ALL
    account = done.report.metrics
    assert account.delivered == account.produced
    assert done.told.count("Traceback") == 0


KEPT = {
    "transport": (sender, "_transport"),
    "the sender of each signal": (sender.Sender, "__init__"),
    "its start": (sender.Sender, "start"),
    "its sending": (sender.Sender, "_send"),
    "threads": (drain.threading.Thread, "start"),
}
"""Parts without which steps wait in files."""


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_sent_is_left_in_files(name, train, monkeypatch):
    monkeypatch.setattr(*KEPT[name], fails)
    done = train(mode="off")
    assert (done.arrived, done.left) == ([], ALL)
    account = done.report.metrics
    assert account.spooled == account.produced > 0
    assert "WARNING" in done.told
    assert done.told.count("Traceback") == 0


@pytest.mark.parametrize("signal", ["traces", "logs", "metrics"])
def test_a_sender_of_one_signal_that_fails_leaves_the_others_alone(signal, train, monkeypatch):
    begin = sender.Sender.__init__

    def but_one(self, destination, *args, **kwargs):
        if destination.signal == signal:
            fails()
        begin(self, destination, *args, **kwargs)

    monkeypatch.setattr(sender.Sender, "__init__", but_one)
    done = train(span_every=1)
    assert (done.arrived, done.left) == (([], ALL) if signal == "metrics" else (ALL, []))
    spans = done.report.traces
    assert spans.produced > 0
    assert spans.delivered == (0 if signal == "traces" else spans.produced)
    assert f"sending {signal}: off for this run, RuntimeError: an injected fault" in done.told


NOTHING = {
    "the ring": ("esper_otel.stream.ring.FrameRing", "put"),
    "the SDK": ("esper_otel.stream.providers", None),
    "the encoding": ("esper_otel.stream.encoding.FrameEncoder", "encode"),
    "the end of the stream": ("esper_otel.stream.spool.Spool", "seal"),
    "the summary": ("esper_otel.summary", "summary_of"),
    "the account": ("esper_otel.stream.spool.Spool", "end_input"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_raises_into_the_script(name, train, monkeypatch):
    where, what = NOTHING[name]
    if what is None:
        monkeypatch.setitem(sys.modules, where, None)
    else:
        monkeypatch.setattr(f"{where}.{what}", fails)
    assert "WARNING" in train().told


def test_bad_variables_of_opentelemetry_leave_a_run_as_it_is(train, monkeypatch):
    monkeypatch.setenv("OTEL_SPAN_EVENT_COUNT_LIMIT", "-1")
    monkeypatch.setenv("OTEL_PYTHON_TRACER_PROVIDER", "nowhere")
    done = train(span_every=1)
    assert done.arrived == ALL
    assert done.report.traces.delivered == done.report.traces.produced > 0
    assert "OTEL_SPAN_EVENT_COUNT_LIMIT='-1': expected a whole number from 0" in done.told
    assert "OTEL_PYTHON_TRACER_PROVIDER='nowhere': expected" in done.told
    assert os.environ["OTEL_SPAN_EVENT_COUNT_LIMIT"] == "-1"


def test_a_recording_that_fails_is_told_and_the_rest_goes_on(train):
    done = train(recording_dir="/dev/null/nowhere")
    assert done.arrived == ALL
    assert "recording to /dev/null/nowhere stopped" in done.told


def test_a_part_alone_gives_what_it_gives_or_nothing(caplog):
    assert alone("it", lambda: 3) == 3
    assert alone("it", fails) is None
    called = []
    end_each([fails, lambda: called.append(1)])
    assert called == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "it: off for this run, RuntimeError: an injected fault",
        "a part of the run could not be ended, RuntimeError: an injected fault",
    ]


def test_frames_of_recordings_are_read_as_ever(train, tmp_path):
    train(recording_dir=str(tmp_path / "recorded"))
    (path,) = (tmp_path / "recorded").glob("*.metrics.otlp")
    assert [frame.step for frame in read_frames(path)] == ALL
