"""An agent, two gateways, and runs of several ranks between them."""

import time
from itertools import count

import pytest
import yaml
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import StatusRequest
from esper_otel.stream.recording import read_recording
from esper_tamiyo.receiving.otlp_frames import frames_of
from ops.stack.ports import free

RUNS, RANKS, STEPS = 4, 4, 50
STEP_NS = 2_000_000

TOLD = {
    "exporters": {
        "file/told": {
            "path": "${env:COLLECTOR_RECORDINGS}/told.metrics.otlp",
            "create_directory": True,
            "format": "proto",
            "rotation": {"max_megabytes": 64},  # or else it is written in pieces
        }
    },
    "service": {
        "pipelines": {
            "metrics/told": {"receivers": ["otlp/tamiyo"], "exporters": ["file/told"]}
        }
    },
}
"""Over a gateway's configuration: what comes to it for Tamiyo is also written to a file."""


def at(port):
    return f"127.0.0.1:{port}"


def frames_in(path):
    """What is recorded at ``path``, as Tamiyo reads it: agents put steps together."""
    for body in read_recording(path):
        yield from frames_of(ExportMetricsServiceRequest.FromString(body)).frames


@pytest.fixture
def agent(stack, collector, tmp_path):
    """The URL of an agent before two gateways, which record what comes to them."""
    addresses, for_tamiyo = [], []
    told = tmp_path / "told.yaml"
    told.write_text(yaml.safe_dump(TOLD))
    for number in range(2):  # before the agent: who finds nobody there pauses for a second
        (tamiyo_port,) = free(1)
        ports, _ = collector(
            f"gateway{number}",
            "gateway.yaml",
            "recording.yaml",
            told,
            COLLECTOR_TAMIYO_GRPC=at(tamiyo_port),
            TAMIYOS="127.0.0.1",
            TAMIYO_PORT=str(stack.ports.tamiyo_grpc),
            COLLECTOR_RECORDINGS=str(tmp_path / f"recorded{number}"),
        )
        addresses.append(at(ports.otlp_grpc))
        for_tamiyo.append(at(tamiyo_port))
    # By their ports: they have no names here that a DNS could tell apart.
    found = {
        "load_balancing": {"resolver": {"dns": None, "static": {"hostnames": addresses}}},
        "load_balancing/tamiyo": {
            "resolver": {"dns": None, "static": {"hostnames": for_tamiyo}}
        },
    }
    gateways = tmp_path / "gateways.yaml"
    gateways.write_text(yaml.safe_dump({"exporters": found}))
    ports, _ = collector("agent", "agent.yaml", gateways)
    return f"http://{at(ports.otlp_http)}"


def test_ranks_spread_and_every_step_arrives_but_for_tamiyo_a_run_takes_one_way(
    agent, stack, rank, wait_until, tmp_path
):
    ranks = [
        rank(endpoint=agent, run=f"spread{run}", rank=number, world_size=RANKS, metrics=4)
        for run in range(RUNS)
        for number in range(RANKS)
    ]
    began = (time.time_ns() // STEP_NS - 1000) * STEP_NS
    for step in range(STEPS):
        for one in ranks:
            one.step(step, began + step * STEP_NS)
    more = count(STEPS)

    def judged():
        """Whether Tamiyo has heard of all; it is told of each step once, or never."""
        step = next(more)
        for one in ranks:
            one.step(step, began + step * STEP_NS)
        runs = reply_to(StatusRequest(), stack.socket).report["engine"]["runs"]
        return {(one.run, n % RANKS) for n, one in enumerate(ranks)} <= {
            (told["run"], told["rank"]) for told in runs
        }

    wait_until(judged)
    steps = next(more)
    for one in ranks:
        report = one.close(20.0)
        assert report.metrics.delivered == report.metrics.produced == steps * 4

    def ways(file="collector"):
        """(run, rank) to the gateways it came by, and the steps that came."""
        found = {}
        for number in range(2):
            path = tmp_path / f"recorded{number}" / f"{file}.metrics.otlp"
            for frame in frames_in(path) if path.exists() else ():
                gateways, seen = found.setdefault((frame.run, frame.rank), (set(), set()))
                gateways.add(number)
                seen.add(frame.step)
        return found

    def all_recorded():
        found = ways()
        return len(found) == RUNS * RANKS and all(len(s) == steps for _, s in found.values())

    def by_run(found):
        """Run to the gateways that its ranks came by."""
        runs = {}
        for (run, _), (gateways, _) in found.items():
            runs.setdefault(run, set()).update(gateways)
        return runs

    wait_until(all_recorded)
    assert all(len(gateways) == 1 for gateways, _ in ways().values()), "a rank has one way"
    assert {0, 1} in by_run(ways()).values(), "a run has more"
    told = ways("told")
    assert told.keys() == ways().keys()
    assert all(len(gateways) == 1 for gateways in by_run(told).values())

    def in_prometheus():
        found = stack.prometheus.series('tolaria_loss{esper_run_id=~"spread.*"}')
        return [one.samples for one in found]

    wait_until(lambda: sum(map(len, in_prometheus())) >= RUNS * RANKS * steps)
    expected = [((began + s * STEP_NS) // 1_000_000, s + 0.01) for s in range(steps)]
    assert in_prometheus() == [expected] * (RUNS * RANKS)
