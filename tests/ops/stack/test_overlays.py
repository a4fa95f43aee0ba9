"""What can be laid over a configuration: recordings, a backend for logs, a page to scrape."""

import json
import re
import time
import urllib.request

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.events import STAGE_CHANGED, Event
from ops.generate.dashboards.sample_run import RANKS, rows, seed_values, step_values
from ops.stack.ports import free
from sidecar.running import tamiyo
from testkit.receiver import LOGS, HttpReceiver

STEPS, STEP_S = 400, 0.02
"""Within the ten seconds by which ranks may be apart in a file: here they are sent at once."""


def url_of(ports):
    return f"http://127.0.0.1:{ports.otlp_http}"


def replayed(folder):
    """What ``tamiyo replay`` decides about each step."""
    done = tamiyo("replay", folder, "--all", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    *decided, _ = map(json.loads, done.stdout.splitlines())
    return decided


def trained(ranks, patience_s):
    """What became of the telemetry of a run with trouble of several kinds."""
    began_s = time.time() - STEPS * STEP_S
    for step in range(STEPS):
        for number, one in enumerate(ranks):
            told = rows(
                step_values(step, STEPS, number, STEP_S), seed_values(step / STEPS, number)
            )
            # Ranks do not end their steps at the same instant.
            ended_s = began_s + step * STEP_S + number * 0.001
            one.stream.frame(round(ended_s * 1e9), *told)
    return [one.close(patience_s) for one in ranks]


def test_what_collector_and_trainers_recorded_replays_with_the_same_decisions(
    collector, rank, tmp_path
):
    by_trainers, by_collector = tmp_path / "trainers", tmp_path / "recorded"
    ports, process = collector(
        "recorder", "local.yaml", "recording.yaml", COLLECTOR_RECORDINGS=str(by_collector)
    )
    ranks = [
        rank(
            endpoint=url_of(ports),
            rank=number,
            world_size=RANKS,
            recording_dir=str(by_trainers),
        )
        for number in range(RANKS)
    ]
    for report in trained(ranks, 20.0):
        assert report.metrics.delivered == report.metrics.produced > 0
    process.stop()
    decided = replayed(by_trainers)
    assert len(decided) >= RANKS * STEPS
    assert {"CONTINUE", "OPTIMIZER", "PAUSE"} <= {one["action"] for one in decided}
    assert replayed(by_collector) == decided


def test_what_trainers_without_a_collector_left_in_their_spool_replays_the_same(rank, tmp_path):
    by_trainers = tmp_path / "trainers"
    (nobody,) = free(1)
    ranks = [
        rank(
            endpoint=f"http://127.0.0.1:{nobody}",
            rank=number,
            world_size=RANKS,
            recording_dir=str(by_trainers),
        )
        for number in range(RANKS)
    ]
    spool = tmp_path / "spool"
    for report in trained(ranks, 1.0):
        assert report.metrics.spooled == report.metrics.produced > 0
        assert report.files
        assert {file.parent for file in report.files} == {spool}
    decided = replayed(by_trainers)
    assert len(decided) >= RANKS * STEPS
    assert {"CONTINUE", "OPTIMIZER", "PAUSE"} <= {one["action"] for one in decided}
    assert replayed(spool) == decided


def test_what_happened_to_a_seed_comes_to_a_backend_for_logs(collector, rank, wait_until):
    with HttpReceiver() as backend:
        ports, _ = collector("logs", "local.yaml", "logs.yaml", LOGS_OTLP=backend.url)
        one = rank(endpoint=url_of(ports))
        one.stream.event(Event(STAGE_CHANGED, time.time_ns(), Severity.NORMAL, "it grew", {}))
        assert one.close(20.0).logs.delivered == 1
        (request,) = wait_until(lambda: [r for r in backend.inbox.requests if r.path == LOGS])
    (resource,) = ExportLogsServiceRequest.FromString(request.body).resource_logs
    assert resource.scope_logs[0].log_records[0].body.string_value == "it grew"


def test_the_newest_step_can_be_scraped(collector, rank, wait_until):
    (port,) = free(1)
    ports, _ = collector(
        "scraped", "local.yaml", "scraped.yaml", COLLECTOR_SCRAPED=f"127.0.0.1:{port}"
    )
    one = rank(endpoint=url_of(ports))
    for step in range(5):
        one.step(step)
    one.close(20.0)

    def losses():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            page = answer.read().decode()
        series = rf'^tolaria_loss{{.*esper_run_id="{one.run}".*}} (\S+)'
        return re.findall(series, page, re.MULTILINE)

    wait_until(lambda: losses() == ["4.01"])
