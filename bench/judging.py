"""What judging one frame costs: default.yaml, with seeds and without, witnessed and not.

CPU time of the thread, of frames in which no rule fires, as nearly all are. The baseline
is the same engine, in the same run and in turn, with a table of one rule that never
fires: what remembering a frame costs without judging it. Beside it is the default table of
before (``bench/scenarios/before.yaml``), which the one of now is to cost no more than. The same
engine judges by both. ESPER_BENCH_BEFORE=PATH names a checkout of an earlier commit, whose own
engine and default table are the baseline then, in a process beside ours and in turn with it.

Then what a streamed frame costs the process that decides, from the bytes of its pipe to the
entries of its journal, but for system calls: in stretches, and beside it each judged alone.

    python -m bench.judging [--json PATH]
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from statistics import fmean

import msgspec

from bench.figures import Figure, alternate, median, percentile, run
from bench.scenarios.suite import BEFORE
from esper_otel.leyline.decisions import Decision
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.journaling.reporter import WRITTEN_PER_TURN, Reporter
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.observer import EngineObserver, RuleChange
from esper_tamiyo.keeping.bodies import StepsBody, encode_body
from esper_tamiyo.keeping.state_keeper import GATHERED
from esper_tamiyo.language.table import Table
from esper_tamiyo.language.table_file import TableSource, load, parse
from esper_tamiyo.receiving import pipe
from esper_tamiyo.receiving.ingest_child import READ_BYTES
from esper_tamiyo.serving.recent_steps import RecentSteps

BENCH = "judging"
SEEDS = 8
WARM, BLOCK, BLOCKS = 300, 400, 20
BAR_US = 60.0
STREAMED = ((1, 0), (1, 4), (64, 0), (64, 4))
"""Ranks, and seeds of each."""
STREAMED_BLOCK, STREAMED_BLOCKS = 768, 10
STREAMED_BAR_US = 25.0
"""40,000 frames in a second of one core."""

CHECKOUT = "ESPER_BENCH_BEFORE"

JUDGES = """
import sys
from bench.judging import Engine, block, load
judge = block(Engine(load("default")), int(sys.argv[1]))
for _ in sys.stdin:
    print(*judge(), flush=True)
"""
"""A process that judges a block for each line that it reads."""

NOTHING = b"""
version: nothing
rules: [{id: never, metric: loss, above: 1e300, severity: NORMAL, action: CONTINUE}]
"""


def figures() -> list[Figure]:
    """All rows of this bench."""
    default, nothing = load("default"), parse(TableSource("nothing", NOTHING))
    rows = []
    for seeds in (SEEDS, 0):
        ours, bare = paired(default, nothing, seeds)
        name = f"one frame through default.yaml, {seeds} seeds"
        rows += [
            Figure.at_most(BENCH, f"{name}, median", median(ours), "µs", bar=BAR_US),
            Figure.report(BENCH, f"{name}, p99", percentile(ours, 99), "µs"),
            Figure.report(
                BENCH,
                f"{name}, median, over a table of one rule",
                median(ours),
                "µs",
                median(bare),
            ),
        ]
    rows += over_before(default)
    witnessed, alone = paired(default, default, SEEDS, witness=True)
    rows.append(
        Figure.report(
            BENCH,
            f"one frame, {SEEDS} seeds, with a witness over without",
            median(witnessed),
            "µs",
            median(alone),
        )
    )
    rows += chain.from_iterable(streamed(default, *each) for each in STREAMED)
    return rows


def streamed(table: Table, ranks: int, seeds: int) -> list[Figure]:
    """Rows of what a streamed frame costs, with so many ranks and seeds of each."""
    warm = ranks * WARM
    made = of_ranks(warm + STREAMED_BLOCK * STREAMED_BLOCKS, ranks, seeds)
    ways = [DecideProcess(table), DecideProcess(table)]
    ways[1].engine._book.together = 0  # each is judged alone
    for way in ways:
        way.judge(b"".join(map(pipe.pack, made[:warm])))
    blocks = [
        b"".join(map(pipe.pack, made[first : first + STREAMED_BLOCK]))
        for first in range(warm, len(made), STREAMED_BLOCK)
    ]
    rests = [iter(blocks), iter(blocks)]
    together, alone = alternate(
        lambda: ways[0].judge(next(rests[0])),
        lambda: ways[1].judge(next(rests[1])),
        STREAMED_BLOCKS,
    )
    name = f"a streamed frame, {ranks} ranks, {seeds} seeds"
    ours, before = median(together), median(alone)
    return [
        Figure.at_most(BENCH, name, ours, "µs", bar=STREAMED_BAR_US),
        Figure.report(BENCH, f"{name}, least of the blocks", min(together), "µs", min(alone)),
        Figure.report(
            BENCH,
            f"{name}: frames per second, over each judged alone",
            1e6 / ours,
            "frames/s",
            1e6 / before,
        ),
    ]


class DecideProcess:
    """What the process that decides does with streamed frames, without its system calls."""

    def __init__(self, table: Table) -> None:
        self._reporter = Reporter(None)
        self._log = self._reporter.decision_log
        self._kept = Kept(self._log)
        self.engine = Engine(table, observer=RecentSteps(self._kept))

    def judge(self, data: bytes) -> float:
        """Microseconds for each frame of ``data``."""
        gc.collect()
        gc.disable()
        try:
            before = time.thread_time_ns()
            count = self._judge(memoryview(data))
            return (time.thread_time_ns() - before) / 1e3 / count
        finally:
            gc.enable()

    def _judge(self, data: memoryview) -> int:
        inlet, count = pipe.Inlet(), 0
        for first in range(0, len(data), READ_BYTES):
            for _, body in inlet.feed(data[first : first + READ_BYTES]):
                count += 1
                frame = pipe.frame(body)
                began_at = time.perf_counter_ns()
                self._log.set_context(began_at, asked=False)
                self.engine.observe(frame, at_ns=began_at)
                self._reporter.record_lag(frame.time_unix_nano)
            self._kept.write()
            while self._log.waiting:
                self._log.make_entries(WRITTEN_PER_TURN, 0.0)
        return count


class Kept:
    """An observer that encodes steps as they are kept for a restart, and passes on the rest."""

    def __init__(self, observer: EngineObserver) -> None:
        self._frames: list[StepFrame] = []
        self._observer = observer
        self.on_rule_change = observer.on_rule_change
        self.on_end = observer.on_end
        self.on_decision = observer.on_decision

    def on_frame(self, frame: StepFrame, decision: Decision) -> None:
        """A frame was judged."""
        self._frames.append(frame)
        self._observer.on_frame(frame, decision)

    def write(self) -> None:
        """Encode what there is."""
        frames = self._frames
        for first in range(0, len(frames), GATHERED):
            encode_body(StepsBody(time.time_ns(), frames[first : first + GATHERED]))
        frames.clear()


def of_ranks(count: int, ranks: int, seeds: int) -> list[StepFrame]:
    """So many frames of a run with so many ranks, ten steps a second."""
    return [
        msgspec.structs.replace(
            each, rank=rank, time_unix_nano=10**18 + each.step * 10**8 + rank
        )
        for each in frames(-(-count // ranks), seeds)
        for rank in range(ranks)
    ]


def over_before(default: Table) -> list[Figure]:
    """The cost of the default table over that of the one before it: of most frames, and of all
    of them, as what lies between stretches is in few."""
    checkout = os.environ.get(CHECKOUT)
    if checkout is None:
        ours, before = paired(default, load(str(BEFORE)), SEEDS)
        beside = "the table before it"
    else:
        ours, before = beside_checkout(Path(checkout), SEEDS)
        beside = "engine and table before"
    name = f"one frame through default.yaml, {SEEDS} seeds"
    means = fmean(ours), fmean(before)
    return [
        Figure.at_most(
            BENCH, f"{name}, median, over {beside}", median(ours), "µs", median(before), bar=1.0
        ),
        Figure.at_most(
            BENCH, f"{name}, mean, over {beside}", means[0], "µs", means[1], bar=1.0
        ),
    ]


def beside_checkout(checkout: Path, seeds: int) -> tuple[list[float], list[float]]:
    """Microseconds per frame by this engine and by that of a checkout, a process for each."""
    trees = Path(__file__).parent.parent, checkout
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(beside(tree, seeds)) for tree in trees)
        mine, others = alternate(ours, theirs, BLOCKS)
    return [*chain.from_iterable(mine)], [*chain.from_iterable(others)]


@contextmanager
def beside(tree: Path, seeds: int) -> Iterator[Callable[[], list[float]]]:
    """What has a process judge one block with the engine and the default table in ``tree``."""
    paths = os.pathsep.join(str(tree / part) for part in ("src", "sidecar", ""))
    with subprocess.Popen(
        [sys.executable, "-c", JUDGES, str(seeds)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asking, answers = process.stdin, process.stdout

        def judge() -> list[float]:
            print(file=asking, flush=True)
            return [float(each) for each in answers.readline().split()]

        yield judge
        asking.close()


class Listener:
    """An observer that does nothing: the price of telling."""

    def on_rule_change(self, change: RuleChange) -> None:
        """Nothing."""

    def on_frame(self, frame: StepFrame, decision: Decision) -> None:
        """Nothing."""

    def on_end(self, frame: StepFrame) -> None:
        """Nothing."""

    def on_decision(self, decision: Decision, frame: StepFrame) -> None:
        """Nothing."""


def paired(
    ours: Table, other: Table, seeds: int, *, witness: bool = False
) -> tuple[list[float], list[float]]:
    """Microseconds per frame by either table, the same frames in blocks in turn."""
    engines = (Engine(ours, observer=Listener() if witness else None), Engine(other))
    judge, judge_other = (block(engine, seeds) for engine in engines)
    mine, others = alternate(judge, judge_other, BLOCKS)
    return [each for times in mine for each in times], [
        each for times in others for each in times
    ]


def block(engine: Engine, seeds: int) -> Callable[[], list[float]]:
    """What judges one block of frames, going on where the last one ended."""
    made = frames(WARM + BLOCK * BLOCKS, seeds)
    for frame in made[:WARM]:
        engine.observe(frame)
    rest = iter(made[WARM:])

    def judge() -> list[float]:
        gc.collect()
        gc.disable()  # as the server does while it answers
        try:
            return [timed(engine, next(rest)) for _ in range(BLOCK)]
        finally:
            gc.enable()

    return judge


def timed(engine: Engine, frame: StepFrame) -> float:
    """Microseconds of this thread's CPU."""
    before = time.thread_time_ns()
    engine.observe(frame)
    return (time.thread_time_ns() - before) / 1e3


def frames(steps: int, seeds: int) -> list[StepFrame]:
    """A steady run with every metric that a CUDA run with a garden has.

    Free memory falls a little, as a slope is only worked out of what falls.
    """
    draw = random.Random(1)
    return [frame(step, seeds, draw) for step in range(steps)]


def frame(step: int, seeds: int, draw: random.Random) -> StepFrame:
    """One step of it."""
    noise = draw.gauss
    values = {
        "step": float(step),
        "loss": 1.0 + noise(0, 0.05),
        "gradient_norm": 1.0 + noise(0, 0.05),
        "samples_per_s": 6400.0,
        "hook_latency_ms": 0.2,
        "tamiyo_latency_ms": 0.1,
        "step_latency_ms": 10.0 + noise(0, 0.5),
        "forward_ms": 3.0 + noise(0, 0.1),
        "backward_ms": 5.0,
        "optimizer_ms": 1.0,
        "kasmina.apply_ms": 0.1,
        "kasmina.finalize_ms": 0.1,
        "loss_delta": noise(0, 0.07),
        "loss_ewma": 1.0,
        "loss_volatility": 0.05 + 0.01 * draw.random(),
        "grad_norm_ewma": 1.0,
        "grad_var": 0.01 + 0.002 * draw.random(),
        "grad_conflict_rate": 0.1,
        "optimizer_lr": 0.1 * 0.9999**step,
        "optimizer_momentum": 0.9,
        "input_wait_ms": 0.2,
        "h2d_copy_ms": 0.3,
        "gpu_mem_used_gb": 10.0 + 1e-4 * step,
        "gpu_mem_free_gb": 70.0 - 1e-4 * step,
        "gpu_util_percent": 90.0,
        "cpu_util_percent": 50.0,
        "nonfinite": 0.0,
        "kasmina.isolation.violations": 0.0,
        "kasmina.kernel_fetch_ms": 1.0,
        "kasmina.seeds_live": float(seeds),
    }
    of_seeds = {
        f"features.{number}-1": {
            "kasmina.seed.stage": 4.0 + step // 1000 % 3,
            "kasmina.seed.alpha": 0.5,
            "kasmina.seed.alpha_steps": 5.0,
            "kasmina.seed.kernel_attached": 1.0,
            "kasmina.seed.last_kernel_latency_ms": 0.3,
            "kasmina.seed.isolation_violations": 0.0,
            "kasmina.seed.fallback_used": 0.0,
            "kasmina.seed.isolation.dot": noise(0, 0.1),
            "kasmina.seed.isolation.host_norm": 1.0,
            "kasmina.seed.isolation.seed_norm": 0.8,
        }
        for number in range(seeds)
    }
    return StepFrame("bench", "one", 0, step, 10**18 + step * 10**7, values, of_seeds)


if __name__ == "__main__":
    sys.exit(run(figures))
