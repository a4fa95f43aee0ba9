"""How long a step waits for its decision, and what that costs more than the bare socket.

Three servers, each a process of its own, answer messages of the same sizes over Unix
sockets: the sidecar (asked through the client that training uses), a bare Python echo,
and a gRPC server with a handler on raw bytes. They are asked in turn, in short blocks,
with gaps of 0, 1 and 10 ms between asks, because after a gap the wake-up dominates.

Then the sidecar alone, idle and while it ingests 20,000 OTLP points per second, in turn.

    python -m bench.roundtrip [--json PATH]
"""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter, perf_counter_ns

from bench.figures import Figure, percentile, run
from bench.roundtrip_peers import FRAME, varying
from esper_otel.leyline import wire
from esper_otel.leyline.decisions import FAILED_OPEN, Decision
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.tamiyo.client import TamiyoClient

BENCH = "roundtrip"

GAPS = ((0, 100), (1, 50), (10, 15))
"""Gap between asks in ms, and asks per block."""

ROUNDS = 20
POINTS_PER_S = 20_000
LOADED_BLOCKS, BLOCK_S = 8, 1.0

Ask = Callable[[], object]


def figures() -> list[Figure]:
    """All rows of this bench."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-bench-")))
        sidecar = stack.enter_context(tamiyo(folder / "tamiyo.sock"))
        asked = stack.enter_context(Asked(folder / "tamiyo.sock"))
        ask_bytes, answer_bytes = asked.sizes()
        rivals: dict[str, Ask] = {
            "echo": stack.enter_context(echo(folder / "echo.sock", ask_bytes, answer_bytes)),
            "gRPC": stack.enter_context(grpc(folder / "grpc.sock", ask_bytes, answer_bytes)),
        }
        rows = against(rivals, asked.ask)
        with feeder(sidecar["otlp_http"], POINTS_PER_S) as feed:
            return rows + while_ingesting(asked.ask, feed)


def against(rivals: dict[str, Ask], ours: Ask) -> list[Figure]:
    """Rows for every gap between asks and every rival, all asked in turn."""
    bars = {"echo": 2.0, "gRPC": 0.25}
    rows = []
    for gap_ms, asks in GAPS:
        times: dict[str, list[float]] = {name: [] for name in ("ours", *rivals)}
        for _ in range(ROUNDS):
            for name, ask in (("ours", ours), *rivals.items()):
                times[name] += [timed(ask, gap_ms / 1e3) for _ in range(asks)]
        gap = f"{gap_ms} ms between asks"
        p50, p99 = (
            {name: percentile(values, percent) for name, values in times.items()}
            for percent in (50, 99)
        )
        for rival, bar in bars.items():
            rows += [
                Figure.at_most(
                    BENCH,
                    f"decision p50 over {rival}, {gap}",
                    p50["ours"],
                    "µs",
                    p50[rival],
                    bar=bar,
                ),
                Figure.report(
                    BENCH, f"decision p99 over {rival}, {gap}", p99["ours"], "µs", p99[rival]
                ),
            ]
    return rows


def while_ingesting(ours: Ask, feed: Feed) -> list[Figure]:
    """Rows of an ask per millisecond, idle and loaded in turn."""
    idle: list[float] = []
    loaded: list[float] = []
    for _ in range(LOADED_BLOCKS):
        idle += block(ours)
        feed.begin(BLOCK_S)
        loaded += block(ours)
        feed.finish()
    name = f"while {feed.rate:,.0f} OTLP points/s are ingested, over idle"
    p50, p99 = (
        (percentile(loaded, percent), "µs", percentile(idle, percent)) for percent in (50, 99)
    )
    return [
        Figure.report(BENCH, f"decision p50 {name}", *p50),
        Figure.at_most(BENCH, f"decision p99 {name}", *p99, bar=3.0),
    ]


def block(ask: Ask) -> list[float]:
    """A block of asks, one a millisecond."""
    until = perf_counter() + BLOCK_S
    times = []
    while perf_counter() < until:
        times.append(timed(ask, 1e-3))
    return times


def timed(ask: Ask, gap_s: float) -> float:
    """Microseconds of one ask after a gap."""
    if gap_s:
        time.sleep(gap_s)
    began = perf_counter_ns()
    ask()
    return (perf_counter_ns() - began) / 1e3


def put_step(row: list[float], step: int) -> None:
    """Make ``row`` that of ``step``."""
    row[STEP_SLOT["step"]] = step
    for key, value in varying(step).items():
        row[STEP_SLOT[key]] = value


class Asked:
    """The sidecar, asked as training asks it: the client, a whole frame, a step at a time."""

    def __init__(self, path: Path) -> None:
        # A deadline that no ask meets: a tail that is cut off looks better than it is.
        self._client = TamiyoClient(path, run="bench", instance="bench", deadline_ms=5000.0)
        self._row = step_row()
        for key, value in FRAME.items():
            self._row[STEP_SLOT[key]] = value
        self._step = 0

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self) -> Decision:
        """Ask about the next step; an ask that fails open is no measurement."""
        self._step = step = self._step + 1
        put_step(self._row, step)
        decision = self._client.ask(step, time.time_ns(), self._row)
        if decision.reason in FAILED_OPEN:
            raise RuntimeError(f"the sidecar did not answer: {decision.reason}")
        return decision

    def sizes(self) -> tuple[int, int]:
        """Bytes of an ask and of its answer."""
        decision = self.ask()
        ask = wire.Ask(self._step, self._step, time.time_ns(), self._row)
        return len(wire.encode(ask)), len(wire.encode(wire.Answer(self._step, decision)))


class Feed:
    """A process that posts OTLP at a rate, when told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._points = 0
        self._seconds = 0.0

    def begin(self, seconds: float) -> None:
        """Feed for so long, from now."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def finish(self) -> None:
        """Wait for the end of it."""
        assert self._process.stdout is not None
        posted = json.loads(self._process.stdout.readline())
        self._points += posted["points"]
        self._seconds += posted["seconds"]

    @property
    def rate(self) -> float:
        """Points per second while it was feeding."""
        return self._points / self._seconds


@contextmanager
def tamiyo(path: Path, *options: str) -> Iterator[dict[str, str]]:
    """A sidecar with its receivers; the words of its ready line."""
    argv = [str(Path(sys.executable).with_name("tamiyo")), "serve", "--socket", str(path)]
    argv += ["--otlp-grpc", "127.0.0.1:0", "--otlp-http", "127.0.0.1:0", *options]
    with started(argv) as (_, line):
        yield dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)


@contextmanager
def echo(path: Path, ask_bytes: int, answer_bytes: int) -> Iterator[Echo]:
    """Asks a bare echo process."""
    message = bytes(ask_bytes)
    with (
        started(peer("echo", path, answer_bytes)),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
    ):
        connection.connect(str(path))
        yield Echo(connection, message, answer_bytes)


class Echo:
    """The two system calls of a round trip, and nothing else."""

    def __init__(self, connection: socket.socket, message: bytes, answer_bytes: int) -> None:
        self._connection = connection
        self._message = message
        self._answer_bytes = answer_bytes

    def __call__(self) -> None:
        """One round trip."""
        self.send()
        self.receive()

    def send(self) -> None:
        """Its first half."""
        self._connection.sendall(self._message)

    def receive(self) -> None:
        """Its second half; waits."""
        missing = self._answer_bytes
        while missing:
            missing -= len(self._connection.recv(65536))


@contextmanager
def grpc(path: Path, ask_bytes: int, answer_bytes: int) -> Iterator[Ask]:
    """Asks a gRPC process."""
    import grpc as library

    message = bytes(ask_bytes)
    with (
        started(peer("grpc", path, answer_bytes)),
        library.insecure_channel(f"unix:{path}") as channel,
    ):
        call = channel.unary_unary("/esper.Bench/Ask", None, None)
        yield lambda: call(message, timeout=5)


@contextmanager
def feeder(address: str, points_per_s: int) -> Iterator[Feed]:
    """A feeder, which is not feeding yet."""
    with started(peer("feed", address, points_per_s)) as (process, _):
        yield Feed(process)


def peer(role: str, where: object, number: int) -> list[str]:
    return [sys.executable, "-m", "bench.roundtrip_peers", role, str(where), str(number)]


@contextmanager
def started(argv: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process from the moment it has printed a line, which comes with it."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"did not start: {shlex.join(argv)}")
            yield process, line
        finally:
            process.terminate()


if __name__ == "__main__":
    raise SystemExit(run(figures))
