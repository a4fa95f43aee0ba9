"""What the Collector between trainers and backends costs: time, processor, and no step.

The real Collector with ``collector/local.yaml``, the real Prometheus, Jaeger and Tamiyo.

- *Latency*: from the end of a step to Tamiyo having evaluated that step, by the stream at
  its default interval: the trainer sending to Tamiyo itself, and to the Collector. Tamiyo
  is asked every two milliseconds what it has seen last, so that much is in the figures.
- *Outage*: the Collector is killed in the middle of a run, and started again 60 s later.
  What the training thread does for a frame meanwhile is held against the seconds before.
- *Load*: 64 ranks of 10 steps a second, each with 24 metrics and 4 seeds of 10, over a
  connection of its own; what arrived is counted in Prometheus and Tamiyo. The ranks are one
  process that writes times and values into requests made before, because what 64 streams take
  is not what is measured here, and the parts would get that much less of the machine.
- *Request by request*: latency and load again with a Collector that gives Tamiyo each
  request as it came, where ``local.yaml`` puts those of 20 ms together.

    python -m bench.collector [--json PATH]
"""

from __future__ import annotations

import resource
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import yaml

from bench.figures import Figure, alternate, percentile, run
from bench.roundtrip import started
from esper_otel.leyline.metrics import SEED_KEYS, SEED_METRICS, STEP_METRICS
from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import Latest, LatestRequest, Status, StatusRequest
from ops.generate.prometheus_names import prometheus_name
from ops.stack.programs import MissingError
from ops.stack.services import CONFIG
from ops.stack.whole import Stack, running
from testkit.patched_requests import Fates
from testkit.simulated_ranks import Rank

BENCH = "collector"
METRICS = 24

LATENCY_STEPS, LATENCY_STEP_S, BLOCKS = 60, 0.037, 4
"""A step that does not divide the stream's interval, so that it falls everywhere in it."""

POLL_S = 0.002
OUTAGE_S, AROUND_S, OUTAGE_STEP_S = 60.0, 10.0, 0.01
UNDISTURBED = 2.0
"""What the slowest frames in a hundred may take of an outage, times what they took before:
they cost a few dozen microseconds, and that doubles with what else the machine does."""

RANKS, STEPS_PER_S, SEEDS, LOAD_STEPS = 64, 10, 4, 300
POINTS = METRICS + SEEDS * len(SEED_KEYS)
SETTLE_S = 30.0
"""Longest that the newest samples are waited for."""

NO_OTHERS = {"OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}


def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as name:
        folder = Path(name)
        with running(folder / "one-by-one", one_by_one(folder)) as stack:
            others_ms = ways_ms(stack, folder)[1]
            others_lost = loaded(stack).lost
        with running(folder / "stack") as stack:
            return [
                *latency(*ways_ms(stack, folder), others_ms),
                *outage(stack, folder),
                *load(loaded(stack), others_lost),
            ]


def one_by_one(folder: Path) -> Path:
    """``local.yaml``, but what is for Tamiyo is not put together."""
    config = yaml.safe_load(CONFIG.read_text())
    del config["exporters"]["otlp_http/tamiyo"]["sending_queue"]["batch"]
    path = folder / "one-by-one.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def ways_ms(stack: Stack, folder: Path) -> tuple[list[float], list[float]]:
    """What steps took to Tamiyo itself, and through the Collector, in blocks that alternate."""
    runs = iter(range(10**6))

    def block(endpoint: str) -> list[float]:
        return _latencies_ms(stack, endpoint, f"latency{next(runs)}", folder)

    direct, through = alternate(
        lambda: block(f"http://127.0.0.1:{stack.ports.tamiyo_http}"),
        lambda: block(stack.url),
        BLOCKS,
    )
    return [ms for some in direct for ms in some], [ms for some in through for ms in some]


def latency(direct: list[float], through: list[float], others: list[float]) -> list[Figure]:
    """Both ways; ``others`` came through a Collector that gives requests one by one."""
    named = "step end to Tamiyo having evaluated it"
    return [
        Figure.report(BENCH, f"{named}, direct, p50", percentile(direct, 50), "ms"),
        Figure.at_most(BENCH, f"{named}, direct, p95", percentile(direct, 95), "ms", bar=150.0),
        Figure.report(
            BENCH,
            f"{named}, through the Collector, p50",
            percentile(through, 50),
            "ms",
            percentile(direct, 50),
        ),
        Figure.at_most(
            BENCH,
            f"{named}, through the Collector, p95",
            percentile(through, 95),
            "ms",
            bar=300.0,
        ),
        Figure.report(
            BENCH,
            f"{named}, through one that gives it request by request, p95",
            percentile(others, 95),
            "ms",
            percentile(through, 95),
        ),
    ]


def _latencies_ms(stack: Stack, endpoint: str, name: str, folder: Path) -> list[float]:
    rank = Rank(endpoint, folder, run=name, metrics=METRICS, environ=NO_OTHERS)
    ended: dict[int, float] = {}
    seen_ms: list[float] = []
    due = time.monotonic()
    deadline = due + LATENCY_STEPS * LATENCY_STEP_S + SETTLE_S
    step = 0
    while step < LATENCY_STEPS or ended:
        now = time.monotonic()
        if now > deadline:
            raise RuntimeError(f"Tamiyo never evaluated steps {sorted(ended)} of {name}")
        if step < LATENCY_STEPS and now >= due:
            rank.step(step)
            ended[step] = now
            step += 1
            due += LATENCY_STEP_S
        newest = _newest(stack, name)
        now = time.monotonic()
        evaluated = [one for one in ended if one <= newest]
        seen_ms += [(now - ended.pop(one)) * 1e3 for one in evaluated]
        time.sleep(POLL_S)
    rank.close()
    # The first step pays for connections that the others find open.
    return seen_ms[1:]


def _newest(stack: Stack, name: str) -> int:
    """The newest step of that run that Tamiyo has evaluated, -1 for none."""
    reply = reply_to(LatestRequest(name, 0), stack.socket)
    if not isinstance(reply, Latest) or reply.decision is None:
        return -1
    return reply.decision.observed_step


def outage(stack: Stack, folder: Path) -> list[Figure]:
    """A run during which the Collector is killed and, a minute later, started again."""
    collector = stack.parts["collector"]
    rank = Rank(stack.url, folder, run="outage", metrics=METRICS, environ=NO_OTHERS)
    frame_us: list[float] = []
    steps = round((OUTAGE_S + 2 * AROUND_S) / OUTAGE_STEP_S)
    killed, started = (round(s / OUTAGE_STEP_S) for s in (AROUND_S, AROUND_S + OUTAGE_S))
    events: dict[int, Callable[[], None]] = {killed: collector.kill, started: collector.start}
    began_ns = time.time_ns()
    due = time.monotonic()
    for step in range(steps):
        if event := events.get(step):
            # On a thread, as this one stands for training.
            threading.Thread(target=event).start()
        before = time.perf_counter_ns()
        rank.step(step, began_ns + step * round(OUTAGE_STEP_S * 1e9))
        frame_us.append((time.perf_counter_ns() - before) / 1e3)
        due += OUTAGE_STEP_S
        time.sleep(max(due - time.monotonic(), 0))
    collector.wait()
    account = rank.close(SETTLE_S).metrics
    came = _settled(
        lambda: float(
            sum(
                len(one.samples)
                for one in stack.prometheus.series('tolaria_step{esper_run_id="outage"}')
            )
        ),
        steps,
    )
    unaccounted = account.produced - account.delivered - account.spooled - account.dropped
    return [
        Figure.at_most(
            BENCH,
            f"Collector killed for {OUTAGE_S:.0f} s: produced - delivered - spooled - dropped",
            abs(unaccounted),
            "points",
            bar=0,
        ),
        Figure.at_most(BENCH, "the same: dropped", account.dropped, "points", bar=0),
        Figure.at_most(
            BENCH, f"the same: of {steps} steps not in Prometheus", steps - came, "steps", bar=0
        ),
        *disturbance(frame_us[1:killed], frame_us[killed:started]),
    ]


def disturbance(before_us: list[float], during_us: list[float]) -> list[Figure]:
    """What the training thread noticed of an outage, by how long it was at each frame."""
    named = "the same: handing over a frame while it is away"
    return [
        Figure.at_most(
            BENCH,
            f"{named}, p99 (and before)",
            percentile(during_us, 99),
            "µs",
            percentile(before_us, 99),
            bar=UNDISTURBED,
        ),
        Figure.report(
            BENCH, f"{named}, longest (and before)", max(during_us), "µs", max(before_us)
        ),
    ]


class Loaded(NamedTuple):
    """What became of the load: ``used`` are processor seconds of each part and the ranks.

    ``lost`` are steps that Tamiyo was not told of; of their points the Collector's queue had no
    room for ``unqueued``, and ``unanswered`` were sent and not answered in time.
    """

    seconds: float
    used: dict[str, float]
    memory_mb: float
    refused: int
    missing: float
    lost: float
    unqueued: float
    unanswered: float


def loaded(stack: Stack) -> Loaded:
    """All ranks at once."""
    argv = [sys.executable, "-m", "testkit.patched_requests", stack.url, "--run", "load"]
    argv += ["--ranks", str(RANKS), "--metrics", str(METRICS), "--seeds", str(SEEDS)]
    argv += ["--steps", str(LOAD_STEPS), "--steps-per-s", str(STEPS_PER_S)]
    with started(argv) as (ranks, _):
        before = {name: _cpu_s(part.pid) for name, part in stack.parts.items()}
        frames = _frames_streamed(stack)
        ended_s = _ended_children_s()
        with _Largest(stack.parts["collector"].pid) as memory:
            began = time.monotonic()
            fates = msgspec.json.decode(ranks.communicate("go\n")[0], type=Fates)
            seconds = time.monotonic() - began
    used = {"ranks": _ended_children_s() - ended_s}
    came = _settled(lambda: _samples(stack), RANKS * LOAD_STEPS * POINTS)
    used |= {name: _cpu_s(part.pid) - before[name] for name, part in stack.parts.items()}
    judged = _settled(lambda: float(_frames_streamed(stack) - frames), RANKS * LOAD_STEPS)
    return Loaded(
        seconds,
        used,
        memory.most_mb,
        (RANKS * LOAD_STEPS - fates.delivered) * POINTS,
        RANKS * LOAD_STEPS * POINTS - came,
        RANKS * LOAD_STEPS - judged,
        _dropped(stack, "enqueue"),
        _dropped(stack, "send"),
    )


def load(found: Loaded, others_lost: float) -> list[Figure]:
    """What each part took for it; ``others_lost`` with requests given one by one."""
    points = RANKS * LOAD_STEPS * POINTS
    cores = {name: used / found.seconds for name, used in found.used.items()}
    told = f"{RANKS} ranks, {points / found.seconds:,.0f} points/s"
    return [
        Figure.report(BENCH, f"{told}: Collector, processor", cores["collector"], "cores"),
        Figure.report(
            BENCH,
            "the same: Collector, processor per 100,000 points",
            found.used["collector"] / points * 1e5,
            "s",
        ),
        Figure.report(BENCH, "the same: Collector, memory, most", found.memory_mb, "MB"),
        Figure.report(BENCH, "the same: Prometheus, processor", cores["prometheus"], "cores"),
        Figure.report(BENCH, "the same: Tamiyo, processor", cores["tamiyo"], "cores"),
        Figure.report(
            BENCH, "the same: the simulated ranks, processor", cores["ranks"], "cores"
        ),
        Figure.at_most(
            BENCH, "the same: points not taken by the Collector", found.refused, "", bar=0
        ),
        Figure.at_most(BENCH, "the same: points not in Prometheus", found.missing, "", bar=0),
        Figure.at_most(
            BENCH,
            "the same: steps that Tamiyo was not told of",
            found.lost,
            "steps",
            bar=0,
        ),
        Figure.report(
            BENCH, "the same: no room in the queue for Tamiyo", found.unqueued, "points"
        ),
        Figure.report(
            BENCH, "the same: not answered by Tamiyo in time", found.unanswered, "points"
        ),
        Figure.report(
            BENCH,
            "the same: and by one that gives it request by request",
            others_lost,
            "steps",
            found.lost,
        ),
    ]


def _dropped(stack: Stack, doing: str) -> float:
    """Points for Tamiyo that the Collector dropped while doing that, by its own count."""
    url = f"http://127.0.0.1:{stack.ports.collector_metrics}/metrics"
    with urllib.request.urlopen(url) as answer:
        lines = answer.read().decode().splitlines()
    name = f"otelcol_exporter_{doing}_failed_metric_points"
    ours = (line for line in lines if line.startswith(name) and "otlp_http/tamiyo" in line)
    return sum(float(line.rpartition(" ")[2]) for line in ours)


def _samples(stack: Stack) -> float:
    """How many samples of the load Prometheus has; by metric, as counting drops the name."""
    metrics = (*STEP_METRICS[:METRICS], *SEED_METRICS)
    counts = (
        stack.prometheus.value(
            f'sum(count_over_time({prometheus_name(metric)}{{esper_run_id="load"}}[30m]))'
        )
        for metric in metrics
    )
    return sum(count or 0.0 for count in counts)


class _Largest:
    """The most memory that a process had while this was open, in MB."""

    def __init__(self, pid: int | None) -> None:
        self.most_mb = 0.0
        self._process = psutil.Process(pid)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Largest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.2):
            self.most_mb = max(self.most_mb, self._process.memory_info().rss / 1e6)


def _cpu_s(pid: int | None) -> float:
    """Processor seconds of a process and its children so far."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _ended_children_s() -> float:
    """Processor seconds of children of this process that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _frames_streamed(stack: Stack) -> int:
    reply = reply_to(StatusRequest(), stack.socket)
    assert isinstance(reply, Status)
    return int(reply.report["connections"].get("frames_streamed", 0))


def _settled(count: Callable[[], float], wanted: float) -> float:
    """``count`` once it has come to ``wanted``, or what it is when it no longer does."""
    deadline = time.monotonic() + SETTLE_S
    while (found := count()) < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


if __name__ == "__main__":
    try:
        sys.exit(run(figures))
    except MissingError as error:
        sys.exit(f"bench.collector: {error}")
