"""One running stack for all tests of it, with the real programs."""

from __future__ import annotations

import time

import msgspec
import pytest

from ops.stack import services
from ops.stack.ports import free
from ops.stack.processes import Process
from ops.stack.programs import COLLECTOR, PROMTOOL, ROOT, MissingError, find
from ops.stack.whole import running
from testkit.patience import PATIENCE_S
from testkit.simulated_ranks import Rank


def until(condition, patience_s=PATIENCE_S):
    """Poll ``condition`` until it is true, and give what it gave."""
    deadline = time.monotonic() + patience_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.05)


def program(of):
    """The binary, or the test is skipped with the reason."""
    try:
        return find(of)
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def collector_program():
    return program(COLLECTOR)


@pytest.fixture(scope="session")
def promtool():
    return program(PROMTOOL)


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """All parts, ready. Tests that end one of them start it again."""
    try:
        with running(tmp_path_factory.mktemp("stack")) as stack:
            yield stack
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def collector(stack, collector_program, tmp_path):
    """Starts Collectors beside that of the stack, each with ports and a state of its own."""
    begun = []

    def start(name, *configs, **environment):
        names = ("otlp_grpc", "otlp_http", "handover", "collector_health", "collector_metrics")
        own = dict(zip(names, free(len(names)), strict=True))
        ports = services.Ports(**msgspec.structs.asdict(stack.ports) | own)
        places = tuple(ROOT / "collector" / config for config in configs)
        service = services.collector(collector_program, ports, tmp_path / name, places)
        service = msgspec.structs.replace(
            service, name=name, environment={**service.environment, **environment}
        )
        process = Process(service, tmp_path)
        begun.append(process)
        process.start()
        process.wait()
        return ports, process

    yield start
    for process in reversed(begun):
        process.stop()


@pytest.fixture
def rank(stack, tmp_path, request):
    """Makes simulated ranks that send to the stack; closed when the test ends."""
    ranks = []

    def make(**options):
        given = {"run": request.node.name, "stream_interval_ms": 20, **options}
        made = Rank(given.pop("endpoint", stack.url), tmp_path, **given)
        ranks.append(made)
        return made

    yield make
    for made in ranks:
        made.close(0.2)


@pytest.fixture(scope="session")
def wait_until():
    return until
