"""Four ranks as torchrun starts them, not edited, beside a sidecar that dies once."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from esper_otel.leyline.trace_ids import STEP_SPAN
from esper_otel.settings import EsperSettings
from sidecar.running import sidecar
from testkit.fork_server import Forked, fork_server
from testkit.patience import PATIENCE_S
from testkit.receiver import METRICS, HttpReceiver
from testkit.torchrun_ranks import torchrun_ranks

pytest.importorskip("torch")
from ranks.four_ranks import (
    KILLED,
    RESTARTED,
    SHARDED_STEPS,
    SLOW_RANK,
    SLOW_STEPS,
)

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
SCRIPT = str(HERE / "four_ranks.py")
RANKS = range(4)
STEPS = 120
UNTOUCHED = 50
"""Steps of the bare run; the table decides nothing before the 56th."""

Point = dict[str, float]


class Told(NamedTuple):
    """What became of a run: from the script itself, and from its telemetry."""

    script: list[dict[str, Any]]
    points: dict[int, dict[int, Point]]
    """Rank → step → values by metric; the steps of the second training behind the first's."""
    came: Counter[tuple[int, int]]
    resources: dict[int, dict[str, Any]]
    spans: list[Span]
    said: str


def environment(folder: Path, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    ours = {"OMP_NUM_THREADS": "1", "ESPER_SPOOL_DIR": str(folder / "spool")}
    return clean | ours | more


def start(folder: Path, *words: str, envs: list[dict[str, str]]) -> list[Forked]:
    """A process in each environment."""
    with (folder / "said").open("w") as said:
        return [
            fork_server().start([sys.executable, *words], env=env, stdout=said, stderr=said)
            for env in envs
        ]


def ended(processes: list[Forked], folder: Path) -> list[dict[str, Any]]:
    """What the ranks have left, once all have ended well."""
    try:
        statuses = {process.wait(PATIENCE_S) for process in processes}
    finally:
        for process in processes:
            process.kill()
    assert statuses == {0}, (folder / "said").read_text()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in RANKS]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bare")
    words = SCRIPT, str(folder), str(UNTOUCHED)
    return ended(start(folder, *words, envs=[environment(folder)]), folder)


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Told:
    folder = tmp_path_factory.mktemp("watched")
    socket, table = folder / "s.sock", HERE / "often.yaml"
    with HttpReceiver() as receiver:
        env = environment(
            folder,
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
            ESPER_MODE="enforce",
            ESPER_TAMIYO_SOCKET=str(socket),
            ESPER_TAMIYO_DEADLINE_MS="2000",
            ESPER_RELEASE_STEPS="100000",
            ESPER_SUMMARY="off",
        )
        with torchrun_ranks(len(RANKS)) as ranks:
            with sidecar(socket, "--table", table) as first:
                words = "-m", "esper_otel", SCRIPT, str(folder), str(STEPS), "slow"
                processes = start(folder, *words, envs=[env | rank for rank in ranks])
                waits_for(processes, folder, "killed")
                first.process.kill()
                first.process.wait()
                (folder / "killed").touch()
            # Not before it is asked for: between the two steps nobody must be there to answer.
            waits_for(processes, folder, "restarted")
            with sidecar(socket, "--table", table):
                (folder / "restarted").touch()
                script = ended(processes, folder)
        points, came, resources = received(receiver)
        spans = receiver.inbox.spans()
    return Told(script, points, came, resources, spans, (folder / "said").read_text())


def waits_for(processes: list[Forked], folder: Path, word: str) -> None:
    """Until rank 0 waits for the test to have done what ``word`` says."""
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not (folder / f"to be {word}").exists():
            assert {each.poll() for each in processes} == {None}, (folder / "said").read_text()
            assert time.monotonic() < deadline, (folder / "said").read_text()
            time.sleep(0.02)
    except BaseException:
        for process in processes:
            process.kill()
        raise


def received(receiver: HttpReceiver) -> tuple[Any, Any, Any]:
    points: dict[int, dict[int, Point]] = {rank: {} for rank in RANKS}
    came: Counter[tuple[int, int]] = Counter()
    resources: dict[int, dict[str, Any]] = {}
    later = []
    for attributes, values in steps_in(receiver):
        if "tolaria.run.ended" in values:
            continue
        rank, step = attributes["esper.rank"], int(values["tolaria.step"])
        if attributes["esper.run_id"].endswith("-2"):
            later.append((rank, step, attributes["esper.run_id"], values))
            continue
        resources.setdefault(rank, attributes)
        assert resources[rank] == attributes
        came[rank, step] += 1
        points[rank][step] = values
    before = {rank: max(points[rank]) for rank in RANKS}
    for rank, step, run, values in later:
        assert run == resources[rank]["esper.run_id"] + "-2"
        came[rank, before[rank] + step] += 1
        points[rank][before[rank] + step] = values
    return points, came, resources


def steps_in(receiver: HttpReceiver) -> Iterator[tuple[dict[str, Any], Point]]:
    for request in receiver.inbox.requests:
        if request.path != METRICS:
            continue
        for resource in ExportMetricsServiceRequest.FromString(request.body).resource_metrics:
            attributes = {
                each.key: getattr(each.value, each.value.WhichOneof("value"))
                for each in resource.resource.attributes
            }
            for scope in resource.scope_metrics:
                yield (
                    attributes,
                    {
                        metric.name: metric.gauge.data_points[0].as_double
                        for metric in scope.metrics
                    },
                )


def column(told: Told, rank: int, key: str) -> list[float | None]:
    """A metric of one rank, by step from the first."""
    steps = told.points[rank]
    return [steps[step].get(f"tolaria.{key}") for step in sorted(steps)]


def test_all_ranks_are_one_run(watched) -> None:
    assert len({each["esper.run_id"] for each in watched.resources.values()}) == 1
    assert len({each["service.instance.id"] for each in watched.resources.values()}) == 4
    for rank, each in watched.resources.items():
        assert each["esper.rank"] == each["esper.local_rank"] == rank
        assert each["esper.world_size"] == 4


def test_every_step_of_every_rank_is_in_the_stream_once(watched) -> None:
    steps = len(watched.script[0]["losses"]) + SHARDED_STEPS
    assert watched.came == {(rank, step): 1 for rank in RANKS for step in range(1, steps + 1)}


def test_a_step_of_all_ranks_is_one_trace(watched) -> None:
    roots = [each for each in watched.spans if each.name == STEP_SPAN]
    assert not any(each.parent_span_id for each in roots)
    steps_of: dict[bytes, list[int]] = {}
    for root in roots:
        steps_of.setdefault(root.trace_id, []).append(step_of(root))
    # A slow step may be one rank's alone; those that are sampled by count are of all.
    every = EsperSettings().span_every
    counts = {steps[0]: len(steps) for steps in steps_of.values() if steps[0] % every == 0}
    steps = len(watched.script[0]["losses"])
    assert counts == dict.fromkeys(range(every, steps + 1, every), len(RANKS))
    assert all(len(set(steps)) == 1 for steps in steps_of.values())
    assert len({root.span_id for root in roots}) == len(roots)
    for span in watched.spans:
        assert span.trace_id in steps_of


def step_of(root: Span) -> int:
    return next(each.value.int_value for each in root.attributes if each.key == "esper.step")


def test_losses_are_those_of_a_bare_run_until_something_is_applied(bare, watched) -> None:
    for without, by_us in zip(bare, watched.script, strict=True):
        assert set(by_us["rates"][:UNTOUCHED]) == {0.05}
        assert by_us["losses"][:UNTOUCHED] == without["losses"]


def test_decisions_are_applied_by_all_ranks_at_the_same_step(watched) -> None:
    first, *others = watched.script
    rates = first["rates"]
    assert all(each["rates"] == rates for each in others)
    lowered = [step for step in range(2, len(rates) + 1) if rates[step - 1] < rates[step - 2]]
    assert lowered[0] > UNTOUCHED
    assert any(step <= KILLED for step in lowered)
    # Nobody is there to decide; only what was decided before it died is still applied: asked
    # about at the end of a step, settled at the end of the next, used from the one after on.
    assert [s for s in lowered if KILLED + 2 < s <= RESTARTED] == [], lowered
    # And nothing of it is given back.
    assert all(rates[s] <= rates[s - 1] for s in range(1, len(rates)))
    assert any(step > RESTARTED for step in lowered)


def test_the_learning_rate_in_the_telemetry_is_the_one_that_was_used(watched) -> None:
    rates = watched.script[0]["rates"]
    for rank in RANKS:
        assert column(watched, rank, "optimizer_lr")[: len(rates)] == rates
        scales = column(watched, rank, "lr_scale")[: len(rates)]
        assert [0.05 * scale for scale in scales] == rates


def test_the_script_sees_nothing_of_the_factor(watched) -> None:
    for script in watched.script:
        assert set(script["own_rates"]) == {0.05}


def test_how_long_nobody_judged_is_told_by_every_rank(watched) -> None:
    for rank in RANKS:
        unjudged = column(watched, rank, "unjudged_steps")
        # What was decided about a step is settled at the end of the next, and told after that.
        dead = unjudged[KILLED + 3 : RESTARTED]
        assert dead == [dead[0] + i for i in range(len(dead))]
        # The second training's ranks have not agreed yet when it is over.
        assert unjudged[KILLED - 1] == unjudged[-1 - SHARDED_STEPS] == 0.0


def test_a_slow_rank_shows_as_such(watched) -> None:
    waits = {}
    for rank in RANKS:
        waited = column(watched, rank, "input_wait_ms")
        waits[rank] = median(waited[step - 1] for step in SLOW_STEPS)
    slowest = waits.pop(SLOW_RANK)
    assert slowest >= 20.0
    assert all(wait < slowest / 2 for wait in waits.values())
    # What the others wait for it is in their backward.
    for rank in waits:
        backward = column(watched, rank, "backward_ms")
        assert median(backward[step - 1] for step in SLOW_STEPS) > slowest / 2


def test_gradient_norms_are_those_of_all_ranks_or_left_out(watched) -> None:
    for rank, script in enumerate(watched.script):
        told = column(watched, rank, "gradient_norm")
        *ddp, a, b, c, d, e, f = zip(told, script["norms"], strict=True)
        for ours, theirs in [*ddp, d, e, f]:
            assert ours == pytest.approx(theirs, rel=1e-5)
        # Sharded, and not clipped.
        assert [ours for ours, _ in (a, b, c)] == [None] * 3
    assert len({script["norms"][-1] for script in watched.script}) == 1
    assert watched.said.count("gradient_norm is omitted") == 1


def test_only_the_rank_that_asks_complains_of_the_dead_sidecar(watched) -> None:
    assert watched.said.count("Tamiyo is unreachable") == 1
    assert "agree" not in watched.said
