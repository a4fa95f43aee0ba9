"""Values of a script's own, from the loop to a rule that fires; and the run's own record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

import esper_otel
from esper_otel.home import runs_in
from esper_otel.leyline.events import CONFIGURED
from esper_otel.stream import read_frames
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import load
from esper_tamiyo.replaying.recordings import RecordedRuns
from sidecar.running import sidecar, until
from testkit.patience import PATIENCE_S
from testkit.receiver import HttpReceiver

TABLE = """
version: own
rules:
  - {id: overfits, metric: custom.val_loss, above: 2, severity: HIGH, action: PAUSE}
"""
STEPS = 30

SCRIPT = """
import sys
import esper_otel
run = esper_otel.start(mode="off", name="base", tags={"team": "vision"})
run.config({"model": {"depth": 3}, "api_key": "abc"})
for step in range(int(sys.argv[1])):
    run.report(loss=1.0 / (1 + step), kl=0.5)
    run.step()
if "--kill" in sys.argv:
    import os, pathlib, signal, time
    home = pathlib.Path(os.environ["ESPER_RUNS_DIR"])
    # Its card is written just behind its first steps.
    while not [*home.glob("*/run-attempt2.json")]: time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
run.report(val_loss=0.25)
run.close(10.0)
"""


@pytest.fixture(scope="module")
def tamiyo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tamiyo")
    (folder / "own.yaml").write_text(TABLE)
    arguments = ("--table", folder / "own.yaml", "--no-journal")
    with sidecar(folder / "s.sock", *arguments, ingest=True) as running:
        yield running


@pytest.fixture
def environment(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OTEL_", "ESPER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setenv("ESPER_RUNS_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("ESPER_SUMMARY", "off")
    monkeypatch.setenv("ESPER_TAMIYO_DEADLINE_MS", "5000")


def train(**settings):
    """A run whose evaluation is bad before step 11, and before step 21 good again."""
    run = esper_otel.start(wait_for_decisions=True, record=True, arguments=False, **settings)
    reasons = []
    for step in range(1, STEPS + 1):
        if step % 10 == 1:
            run.report(val_loss=2.5 if step == 11 else 0.5)
        run.report(loss=1.0, kl=0.1 * step)
        run.step()
        reasons.append(run.decision.reason)
    run.report(val_loss=0.125)
    report = run.close(10.0)
    assert report.metrics.delivered == report.metrics.produced > 0
    return reasons


def judged(recording, table):
    engine = Engine(table)
    return [
        engine.observe(frame).reason
        for frame, _ in RecordedRuns(recording).steps()
        if frame.ended is None
    ]


def test_a_rule_fires_on_one_by_the_request_by_the_stream_and_in_a_replay(
    tamiyo, environment, tmp_path, monkeypatch
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{tamiyo.words['otlp_http']}")
    asked = train(run_id="asked", tamiyo_socket=str(tamiyo.socket))
    assert Counter(asked) == {"nominal": STEPS - 1, "overfits": 1}
    assert asked[10] == "overfits"
    before = tamiyo.status()["engine"]["frames"]["judged"]
    train(run_id="streamed", mode="off")
    until(lambda: tamiyo.status()["engine"]["frames"]["judged"] == before + STEPS)
    with tamiyo.client() as client:
        assert client.latest("streamed").step == STEPS
    counts = tamiyo.status()["ingest"]
    assert counts["points_unusable"] == 0
    (tmp_path / "own.yaml").write_text(TABLE)
    table = load(str(tmp_path / "own.yaml"))
    for run in runs_in(tmp_path / "home"):
        (recording,) = run.recordings
        assert judged(recording, table) == asked
        frames = list(read_frames(recording))
        assert frames[10].values["custom.val_loss"] == 2.5
        assert frames[-1].values == {"step": float(STEPS), "custom.val_loss": 0.125}
        assert (run.card.steps, run.card.last_loss, run.state) == (STEPS, 1.0, "done")


def script(tmp_path, *arguments, **variables):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), *arguments]
    return subprocess.run(
        command,
        env={**os.environ, "ESPER_RECORD": "true", "ESPER_RUN_ID": "one", **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_run_at_home_is_named_and_a_second_attempt_stays_apart(environment, tmp_path):
    with HttpReceiver() as receiver:
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
        first = script(tmp_path, "5", "--lr", "3e-4", **endpoint)
        assert (first.returncode, first.stderr) == (0, "")
        requests = [one.body for one in receiver.inbox.requests if one.path == "/v1/logs"]
    (body,) = requests
    scope = ExportLogsServiceRequest.FromString(body).resource_logs[0].scope_logs[0]
    (record,) = scope.log_records
    assert record.event_name == CONFIGURED
    assert {each.key for each in record.attributes} == {
        *("esper.config.--lr", "esper.config.argument 1", "esper.config.model.depth"),
        "esper.config.api_key",
    }
    (run,) = runs_in(tmp_path / "home")
    assert (run.card.name, run.card.tags, run.state) == ("base", {"team": "vision"}, "done")
    assert run.card.config == {
        "argument 1": 5,
        "--lr": 3e-4,
        "model.depth": 3,
        "api_key": "(not recorded)",
    }
    whole = {path: path.read_bytes() for path in run.files}
    second = script(tmp_path, "3", "--kill")
    assert second.returncode == -9
    assert "one-rank0 has been recorded in" in second.stderr
    (run,) = runs_in(tmp_path / "home")
    assert (run.attempts, run.state, run.card.attempt) == (2, "cut off", 2)
    assert {path: path.read_bytes() for path in whole} == whole
    assert [frame.step for frame in read_frames(Path(run.recordings[0]))] == [1, 2, 3]
    assert json.loads((run.folder / "run.json").read_text())["ended"] == "done"
