"""Each process of the sidecar killed, or stopped, while a run asks about every step.

A client as training has it, with a deadline of 5 ms, asks about recorded troubled trainings,
paced, one fault in each run: the process that decides, ingest, the journal writer, the table's
watch and the writer of state, killed (SIGKILL) or stopped (SIGSTOP), one after the other. The
process that decides is started again, as a supervisor does; the others it has to replace
itself. Each answered decision is held against that of an engine which is left alone and was
asked the same. An ask that nobody answered may or may not have been heard, and which of the two
has to explain all that follows; what was not asked as the breaker was open was not heard, and a
kill may cost the steps of the last 20 ms.

Meanwhile an honest producer sends OTLP, and a loop without a sidecar shows what the machine
does to a wait, by turns of a bare echo that answers and of one that does not. Seconds between
two faults and minutes of it all, for longer tries:

    python -m bench.killed_sidecar [--json PATH]
    KILLED_EVERY=5 KILLED_MINUTES=10 python -m bench.killed_sidecar
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from time import perf_counter_ns
from typing import NamedTuple

from bench.figures import Figure, percentile, run
from bench.floods import Peer, taken
from bench.floods_peers import Outcome
from bench.roundtrip import Echo, echo
from bench.scenarios.scoring import recorded_in
from bench.scenarios.suite import RECORDINGS
from bench.sidecar_process import DECIDE, PROCESSES, SidecarProcess
from esper_otel.leyline.decisions import (
    BREAKER_OPEN,
    FAILED_OPEN,
    UNREACHABLE,
    Decision,
    Proposal,
)
from esper_otel.leyline.frames import ABSENT, StepFrame
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.tamiyo.breaker import State
from esper_otel.tamiyo.client import TamiyoClient
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table import Table
from esper_tamiyo.language.table_file import load

BENCH = "killed_sidecar"

DEADLINE_MS = 5.0
OVER_MS = 1.0
PACE_S = 0.005
EVERY_S = float(os.environ.get("KILLED_EVERY", "4"))
MINUTES = float(os.environ.get("KILLED_MINUTES", "0"))
"""0: each fault once."""

STOPPED_S = 1.0
"""How long the process that decides is stopped, which nobody replaces within a minute."""

REPLACED_S = 20.0
"""Longest that a stopped child is left to be replaced."""

FORGOTTEN_NS = 30_000_000
"""How old the oldest step is that a kill may cost: 20 ms, and what a turn takes."""

MOST_TRIES = 200
"""Ways to read what was heard that are tried, before one run counts as decided otherwise."""

Recording = list[tuple[StepFrame, Proposal | None]]


class Step(NamedTuple):
    """One step of a run: what was told of it and what came back."""

    frame: StepFrame
    proposal: Proposal | None
    sent_ns: int
    decision: Decision
    was_sent: bool
    took_ms: float

    @property
    def is_answered(self) -> bool:
        """Whether a sidecar decided about it."""
        return self.decision.reason not in FAILED_OPEN


class Fault(NamedTuple):
    """What is done to which process."""

    process: str
    signal: signal.Signals

    @property
    def name(self) -> str:
        """For a row."""
        done = "killed" if self.signal is signal.SIGKILL else "stopped"
        return f"{self.process} {done}"


FAULTS = [
    Fault(process, number)
    for process in PROCESSES
    for number in (signal.SIGKILL, signal.SIGSTOP)
]


def troubled() -> Iterator[Recording]:
    """The recorded troubled trainings of one rank; neighbours are of one workload."""
    for ranks in recorded_in(RECORDINGS, held_out=False):
        if ranks[0].at is not None and len(ranks) == 1:
            yield list(ranks[0].frames())


class Runs:
    """Runs without an end, each of recorded trainings one behind the other."""

    def __init__(self, recordings: Iterable[Recording]) -> None:
        self._recordings = itertools.cycle(recordings)
        self._number = 0

    def next_run(self) -> Iterator[tuple[StepFrame, Proposal | None]]:
        """The steps of one more run, counted through."""
        self._number += 1
        name, step, now = f"killed-{self._number}", 0, time.time_ns()
        for recording in self._recordings:
            for frame, proposal in recording:
                step += 1
                values = frame.values | {"step": float(step)}
                at = now + int(step * PACE_S * 1e9)
                yield StepFrame(name, name, 0, step, at, values, frame.seeds), proposal


def asked(
    steps: Iterator[tuple[StepFrame, Proposal | None]], path: Path, until: Callable[[], bool]
) -> tuple[list[Step], int]:
    """A run that goes on until told; its steps, and exceptions that reached it."""
    made: list[Step] = []
    exceptions = 0
    client: TamiyoClient | None = None
    due = time.monotonic()
    for frame, proposal in steps:
        if until():
            break
        if client is None:
            client = TamiyoClient(
                path,
                run=frame.run,
                instance=frame.instance,
                deadline_ms=DEADLINE_MS,
                mode="enforce",
            )
        row = [frame.values.get(key, ABSENT) for key in STEP_KEYS]
        seeds = [
            (seed, [values.get(key, ABSENT) for key in SEED_KEYS])
            for seed, values in frame.seeds.items()
        ]
        sends = client.breaker.state is State.CLOSED
        began = perf_counter_ns()
        try:
            decision = client.ask(frame.step, frame.time_unix_nano, row, seeds, proposal)
        except Exception:
            exceptions += 1
            continue
        took_ms = (perf_counter_ns() - began) / 1e6
        was_sent = sends and decision.reason != BREAKER_OPEN
        made.append(Step(frame, proposal, began, decision, was_sent, took_ms))
        due = max(due + PACE_S, time.monotonic() - PACE_S)
        time.sleep(max(0.0, due - time.monotonic()))
    if client is not None:
        client.close()
    return made, exceptions


def differing(steps: list[Step], table: Path, *, killed: bool = False) -> tuple[int, int]:
    """Answered steps that an engine left alone decides otherwise; and otherwise than one that
    heard of all of them.

    Which of the asks without an answer were heard is not known: every way to read it is tried
    from the likeliest on, and one that explains all that followed is enough. Where the process
    that decides was ``killed`` it may have forgotten the steps of the last 20 ms.
    """
    loaded = load(str(table))
    best = len(steps)
    for forgotten in forgettable(steps) if killed else [frozenset[int]()]:
        best = min(best, fewest(steps, loaded, forgotten))
        if not best:
            break
    everything = dict.fromkeys(range(len(steps)), True)
    return best, len(list(unequal(steps, loaded, everything)))


def forgettable(steps: list[Step]) -> Iterator[frozenset[int]]:
    """Places of the steps before a kill that may be forgotten: none, the last, the last two."""
    gap = next(
        (nth for nth, step in enumerate(steps) if step.decision.reason == UNREACHABLE), 0
    )
    yield frozenset()
    for first in range(gap - 1, -1, -1):
        if steps[gap].sent_ns - steps[first].sent_ns > FORGOTTEN_NS:
            break
        yield frozenset(range(first, gap))


def fewest(steps: list[Step], table: Table, forgotten: frozenset[int]) -> int:
    """Steps decided otherwise, read in the way in which they are fewest."""
    unsure = [nth for nth, step in enumerate(steps) if step.was_sent and not step.is_answered]
    heard = dict.fromkeys(unsure, True)
    best = len(steps)
    for _ in range(MOST_TRIES):
        wrong = list(unequal(steps, table, heard, forgotten))
        best = min(best, len(wrong))
        if not wrong:
            break
        # The last choice before the first difference that can still be made otherwise.
        while unsure and (unsure[-1] > wrong[0] or not heard[unsure[-1]]):
            heard[unsure.pop()] = True
        if not unsure:
            break
        heard[unsure[-1]] = False
        unsure = list(heard)
    return best


def unequal(
    steps: list[Step],
    table: Table,
    heard: dict[int, bool],
    forgotten: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Places of answered steps that an engine decides otherwise, where the others were
    ``heard`` or not; behind those ``forgotten`` goes on one that never heard of them."""
    engine, later = Engine(table), Engine(table) if forgotten else None
    for nth, step in enumerate(steps):
        if not step.is_answered and not heard.get(nth, False):
            continue
        proposal = step.proposal if step.is_answered else None
        if later is not None and nth not in forgotten:
            if nth > max(forgotten):
                engine, later = later, None
            else:
                later.observe(step.frame, proposal, step.sent_ns, asked=True)
        decided = engine.observe(step.frame, proposal, step.sent_ns, asked=True)
        if step.is_answered and decided != step.decision:
            yield nth


class Control:
    """The loop without a sidecar, on a thread of a process of its own: ``main`` below."""

    def __init__(self, stack: ExitStack) -> None:
        self._peer = Peer(stack, "control", module="bench.killed_sidecar")

    def result(self) -> tuple[list[float], list[float]]:
        """Milliseconds of waits that were answered, and of those that nobody answered."""
        self._peer.tell()
        answered, unanswered = self._peer.result()
        return answered, unanswered


def control() -> None:
    """At the same pace: a bare echo, and a wait as long as the client's for nobody."""
    from bench.floods_peers import told_to_stop

    answered: list[float] = []
    unanswered: list[float] = []
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        tempfile.TemporaryDirectory() as folder,
        echo(Path(folder) / "echo.sock", 700, 200) as bare,
    ):
        print("ready", flush=True)
        stop, due = told_to_stop(), time.monotonic()
        gc.disable()
        while not stop.is_set():
            answered.append(waited(bare))
            began = perf_counter_ns()
            select.select((ours,), (), (), 0.95 * DEADLINE_MS / 1e3)
            unanswered.append((perf_counter_ns() - began) / 1e6)
            due = max(due + 2 * PACE_S, time.monotonic() - PACE_S)
            time.sleep(max(0.0, due - time.monotonic()))
    print(json.dumps((answered, unanswered)), flush=True)


def waited(bare: Echo) -> float:
    """Milliseconds of one round trip."""
    began = perf_counter_ns()
    bare()
    return (perf_counter_ns() - began) / 1e6


def suffer(fault: Fault, sidecar: SidecarProcess, pid: int) -> None:
    """Bring the fault about, and wait until that process is gone, or goes on.

    In the process of the loop, whose interpreter this must hardly take: no more than it needs.
    """
    if fault.process == DECIDE:
        if fault.signal is signal.SIGKILL:
            sidecar.kill()
            sidecar.start()
        else:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
        return
    os.kill(pid, fault.signal)
    until = time.monotonic() + REPLACED_S
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > until:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            raise RuntimeError(f"{fault.name}: it was not ended")
        time.sleep(0.05)


def replaced(fault: Fault, sidecar: SidecarProcess) -> None:
    """Wait until the process is there again."""
    until = time.monotonic() + REPLACED_S
    while fault.process not in sidecar.processes():
        if time.monotonic() > until:
            raise RuntimeError(f"{fault.name}: it was not replaced")
        time.sleep(0.05)


class Suffered(NamedTuple):
    """What one fault did: the run's steps, and how many of them were decided otherwise."""

    fault: Fault
    steps: list[Step]
    exceptions: int
    differing: int
    differing_from_all: int
    gap: float
    """Seconds of the longest time without an answer."""


def one_fault(fault: Fault, sidecar: SidecarProcess, runs: Runs) -> Suffered:
    """A run with one fault, ``EVERY_S`` at least."""
    done = threading.Event()
    errors: list[Exception] = []
    pid = sidecar.processes()[fault.process]

    def harm() -> None:
        began = time.monotonic()
        try:
            time.sleep(EVERY_S / 3)
            suffer(fault, sidecar, pid)
            time.sleep(max(EVERY_S / 3, began + EVERY_S - time.monotonic()))
        except Exception as error:
            errors.append(error)
        done.set()

    harming = threading.Thread(target=harm)
    gc.collect()
    gc.freeze()
    gc.disable()  # of thousands of recorded steps, which no training has in memory
    harming.start()
    steps, exceptions = asked(runs.next_run(), sidecar.socket, done.is_set)
    gc.enable()
    harming.join()
    if errors:
        raise errors[0]
    replaced(fault, sidecar)
    killed = fault == Fault(DECIDE, signal.SIGKILL)
    differing_ones, from_all = differing(steps, sidecar.table, killed=killed)
    answered = [step.sent_ns for step in steps if step.is_answered]
    gap = max((b - a for a, b in itertools.pairwise(answered)), default=0) / 1e9
    why = Counter(step.decision.reason for step in steps if not step.is_answered)
    print(
        f"  {fault.name}: {len(steps)} steps, not answered {dict(why)}, longest {gap:.2f} s, "
        f"decided otherwise {differing_ones}",
        flush=True,
    )
    return Suffered(fault, steps, exceptions, differing_ones, from_all, gap)


def suffered(sidecar: SidecarProcess) -> Iterator[Suffered]:
    """One fault after the other."""
    runs = Runs(list(troubled()))  # nothing is read while a run goes on
    until = time.monotonic() + MINUTES * 60
    for nth, fault in enumerate(itertools.cycle(FAULTS)):
        if nth >= len(FAULTS) and time.monotonic() >= until:
            return
        yield one_fault(fault, sidecar, runs)


def figures() -> list[Figure]:
    """All rows of this bench."""
    logging.getLogger("esper_otel").setLevel(logging.ERROR)  # it warns, and rightly
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-bench-")))
        sidecar = stack.enter_context(SidecarProcess(folder))
        words = sidecar.words
        honest = Peer(stack, "honest", words["otlp_http"], words["otlp_grpc"])
        without = Control(stack)
        found = list(suffered(sidecar))
        waits = without.result()
        honest.tell()
        outcomes = [Outcome(*each) for each in honest.result()]
        tracebacks = sidecar.tracebacks()
    return [
        *decided(found),
        *waited_for(found, *waits),
        *taken(BENCH, outcomes),
        Figure.at_most(BENCH, "tracebacks in the log", tracebacks, "", bar=0.0),
    ]


def decided(found: list[Suffered]) -> Iterator[Figure]:
    """Rows of what was decided, all in all and for each fault."""
    steps = sum(len(each.steps) for each in found)
    yield Figure.at_most(
        BENCH,
        f"{len(found)} faults: steps decided otherwise than by one left alone, of {steps:,}",
        sum(each.differing for each in found),
        "steps",
        bar=0.0,
    )
    yield Figure.at_most(
        BENCH, "exceptions", sum(each.exceptions for each in found), "", bar=0.0
    )
    for fault in FAULTS:
        some = [each for each in found if each.fault == fault]
        silent = sum(not step.is_answered for each in some for step in each.steps)
        of = sum(len(each.steps) for each in some)
        yield Figure.report(
            BENCH, f"{fault.name}: steps without an answer, of {of:,}", silent, "steps"
        )
        yield Figure.report(
            BENCH,
            f"{fault.name}: longest without an answer",
            max(each.gap for each in some),
            "s",
        )
        yield Figure.report(
            BENCH,
            f"{fault.name}: steps decided otherwise than by one that heard of every step",
            sum(each.differing_from_all for each in some),
            "steps",
        )


def waited_for(
    found: list[Suffered], answered: list[float], unanswered: list[float]
) -> Iterator[Figure]:
    """Rows of how long asks took, beside a loop without a sidecar."""
    limit = DEADLINE_MS + OVER_MS
    waits = [step for each in found for step in each.steps if step.was_sent]
    over = sum(step.took_ms > limit for each in found for step in each.steps)
    replied = sum(step.is_answered for step in waits)
    expected = replied * share_over(answered, limit)
    expected += (len(waits) - replied) * share_over(unanswered, limit)
    yield Figure.at_most(
        BENCH,
        "asks over the deadline by more than 1 ms, beyond what a loop without a sidecar has",
        max(0.0, over - expected),
        "asks",
        bar=0.0,
    )
    yield Figure.report(
        BENCH,
        "asks over the deadline by more than 1 ms, over as many waits of that loop",
        over,
        "asks",
        expected,
    )
    took = [step.took_ms for each in found for step in each.steps]
    yield Figure.report(BENCH, "longest ask", max(took), "ms", max(*answered, *unanswered))
    yield Figure.report(
        BENCH, "ask p99, over a bare echo", percentile(took, 99), "ms", percentile(answered, 99)
    )


def share_over(waits: list[float], limit: float) -> float:
    """Which part of some waits took longer."""
    return sum(wait > limit for wait in waits) / len(waits)


if __name__ == "__main__":
    if sys.argv[1:] == ["control"]:
        control()
        sys.exit(0)
    sys.exit(run(figures))
