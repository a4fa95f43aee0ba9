"""An agent, two gateways, and runs of several ranks between them."""

import time
from itertools import count

import pytest
import yaml

from esper_otel.leyline.wire import StatusRequest
from esper_otel.stream import read_frames
from esper_tamiyo.serving.asking import reply_to
from stack.ports import free

RUNS, RANKS, STEPS = 6, 2, 50
STEP_NS = 2_000_000


def at(port):
    return f"127.0.0.1:{port}"


@pytest.fixture
def agent(stack, collector, tmp_path):
    """The URL of an agent before two gateways, which record what comes to them."""
    addresses, for_tamiyo = [], []
    for number in range(2):  # before the agent: who finds nobody there pauses for a second
        (tamiyo_port,) = free(1)
        ports, _ = collector(
            f"gateway{number}",
            "gateway.yaml",
            "recording.yaml",
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


def test_all_ranks_of_a_run_take_one_way_and_every_step_arrives(
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

    def recorded():
        """Run to (gateway, ranks, steps) that came by it."""
        found = {}
        for number in range(2):
            path = tmp_path / f"recorded{number}" / "collector.metrics.otlp"
            for frame in read_frames(path) if path.exists() else ():
                by = found.setdefault(frame.run, (set(), set(), set()))
                for kept, value in zip(by, (number, frame.rank, frame.step), strict=True):
                    kept.add(value)
        return found

    def all_recorded():
        found = recorded()
        return len(found) == RUNS and all(len(s) == steps for _, _, s in found.values())

    wait_until(all_recorded)
    ways = recorded()
    for gateways, seen, _ in ways.values():
        assert len(gateways) == 1
        assert seen == set(range(RANKS))
    assert {way for gateways, _, _ in ways.values() for way in gateways} == {0, 1}

    def in_prometheus():
        found = stack.prometheus.series('tolaria_loss{esper_run_id=~"spread.*"}')
        return [one.samples for one in found]

    wait_until(lambda: sum(map(len, in_prometheus())) >= RUNS * RANKS * steps)
    expected = [((began + s * STEP_NS) // 1_000_000, s + 0.01) for s in range(steps)]
    assert in_prometheus() == [expected] * (RUNS * RANKS)
