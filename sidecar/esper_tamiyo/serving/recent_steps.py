"""Recent steps: each rank's data for ``esper-otel top``, in memory of a constant size.

Between the engine and its next observer it hears of each step that was judged, when the answer
is out, and keeps some numbers of the newest ones and, of all steps before, an even choice.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import islice
from math import inf, nan
from typing import NamedTuple

from esper_otel.leyline.custom import is_custom
from esper_otel.leyline.decisions import Action, Decision
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.leyline.wire import DecisionNote, RankNow, Recent, RecentRequest
from esper_tamiyo.judging.liveness import Key, rank_state
from esper_tamiyo.judging.observer import EngineObserver, RuleChange
from esper_tamiyo.judging.run_state import RunState

COLUMNS = (
    "loss",
    "gradient_norm",
    "step_latency_ms",
    "input_wait_ms",
    "forward_ms",
    "backward_ms",
    "optimizer_ms",
    "kasmina.apply_ms",
    "kasmina.finalize_ms",
    "hook_latency_ms",
    "optimizer_lr",
    "lr_scale",
    "accuracy",
    "samples_per_s",
    "gpu_mem_used_gb",
    "gpu_util_percent",
    "cpu_util_percent",
    "nonfinite",
)
"""Metrics that are kept of each step."""

NEWEST = 2048
"""Newest steps that are kept, of all ranks together: 5 MB."""

CHOSEN = 256
"""Steps of a rank that are chosen of all of them, at most."""

MOST_CUSTOM = 8
"""Values of a script's own that are kept of a rank: the first that it reports."""

CHOSEN_CUSTOM = 128
"""Points of each of them that are chosen of all, at most. An evaluation is in few steps, which
would hardly ever be among those that are chosen."""

FROM = 64
"""Only steps whose number it divides are chosen: a rank with so few has all in the newest."""

MOST_RANKS = 64
"""Ranks of which steps are chosen, and that are told of."""

MOST_SEEDS = 64
"""Seeds of a rank beyond which none is told of."""

MOST_DECISIONS = 256
"""Newest decisions that are kept, of all runs."""

GONE_NS = 60_000_000_000
"""A rank that told of nothing for so long makes room for another."""

_TOLD_VALUES, _TOLD_DECISIONS, _TOLD_SEEDS = 96 * len(COLUMNS), 24, 32
"""What one message has of each at most: it has to fit into 64 KiB."""

_LONGEST = 256
_MOST_VALUES = len(STEP_KEYS)
_NANS = (nan,) * (len(COLUMNS) + MOST_CUSTOM)

_HAS_CUSTOM = "custom_nonfinite"
"""A value that is in a step which has values of the script's own."""

Row = list[float]


def _row(frame: StepFrame, columns: Sequence[str] = COLUMNS) -> Row:
    return [frame.step, frame.time_unix_nano, *map(frame.values.get, columns, _NANS)]


class _ChosenPoints:
    """An even choice of the points of one value of a script's own."""

    __slots__ = ("_count", "_every", "points")

    def __init__(self) -> None:
        self.points: list[tuple[int, int, float]] = []
        """Step, Unix time in nanoseconds, value."""
        self._count, self._every = 0, 1

    def add(self, step: int, time_unix_nano: int, value: float) -> None:
        if self._count % self._every == 0:
            self.points.append((step, time_unix_nano, value))
            if len(self.points) > CHOSEN_CUSTOM:
                self._every *= 2
                del self.points[1::2]
        self._count += 1


class _ChosenSteps:
    """An even choice of the steps of one process."""

    __slots__ = ("_every", "_rows", "custom", "frame")

    def __init__(self) -> None:
        self.frame: StepFrame | None = None
        """The newest."""
        self.custom: dict[str, _ChosenPoints] = {}
        """Of the script's own values, by key."""
        self._rows: list[Row] = []
        self._every = FROM

    def add(self, frame: StepFrame) -> None:
        if self.frame is not None and self.frame.instance != frame.instance:
            self._rows, self._every, self.custom = [], FROM, {}
        self.frame = frame
        if frame.step % self._every == 0:
            self._rows.append(_row(frame))
            if len(self._rows) > CHOSEN:
                self._every *= 2
                self._rows = [row for row in self._rows if row[0] % self._every == 0]
        if _HAS_CUSTOM in frame.values:
            for key in filter(is_custom, frame.values):
                if key in self.custom or len(self.custom) < MOST_CUSTOM:
                    points = self.custom.setdefault(key, _ChosenPoints())
                    points.add(frame.step, frame.time_unix_nano, frame.values[key])

    def between(self, after: int, until: float) -> list[Row]:
        """Rows of chosen steps behind ``after`` and before ``until``, in their order."""
        none = _NANS[: len(self.custom)]
        rows = {row[0]: [*row, *none] for row in self._rows if after < row[0] < until}
        for place, chosen in enumerate(self.custom.values(), 2 + len(COLUMNS)):
            for step, at, value in chosen.points:
                if after < step < until:
                    row = rows.setdefault(step, [step, at, *_NANS[: len(COLUMNS)], *none])
                    row[place] = value
        return [rows[step] for step in sorted(rows)]


class _Noted(NamedTuple):
    number: int
    decision: Decision
    frame: StepFrame
    update: bool


class RecentSteps:
    """An observer of the engine that passes on what it hears."""

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer
        self._frames: deque[StepFrame] = deque(maxlen=NEWEST)
        self._chosen: dict[Key, _ChosenSteps] = {}
        self._seeds: dict[Key, StepFrame] = {}
        self._modes: dict[Key, str] = {}
        self._noted: deque[_Noted] = deque(maxlen=MOST_DECISIONS)
        self._count = 0

    def on_rule_change(self, change: RuleChange) -> None:
        """A rule's state changed."""
        self._observer.on_rule_change(change)

    def on_end(self, frame: StepFrame) -> None:
        """A rank said that its run has ended."""
        self._observer.on_end(frame)

    def on_frame(self, frame: StepFrame, decision: Decision) -> None:
        """A frame was judged."""
        is_plain = not frame.seeds and len(frame.values) <= _MOST_VALUES
        if not frame.step % FROM or _HAS_CUSTOM in frame.values:
            self._choose(frame)
        self._frames.append(frame if is_plain else self._slim(frame))
        self._observer.on_frame(frame, decision)

    def on_decision(self, decision: Decision, frame: StepFrame) -> None:
        """A decision became the newest of its rank."""
        if decision.findings or decision.action is not Action.CONTINUE:
            self._note(decision, frame, update=False)
        self._observer.on_decision(decision, frame)

    def note_check(self, decision: Decision, known: StepFrame) -> None:
        """An update was checked before it was made."""
        if decision.action is not Action.CONTINUE:
            self._note(decision, known, update=True)

    def note_mode(self, key: Key, mode: str) -> None:
        """A trainer has said what it does with decisions."""
        if len(self._modes) >= 2 * MOST_RANKS and key not in self._modes:
            del self._modes[next(iter(self._modes))]
        self._modes[key] = mode

    def _note(self, decision: Decision, frame: StepFrame, *, update: bool) -> None:
        self._count += 1
        self._noted.append(_Noted(self._count, decision, frame, update))

    def _slim(self, frame: StepFrame) -> StepFrame:
        """A frame without seeds, of which only a rank's newest are kept, and with no more
        values than there is room for."""
        key, values = (frame.run, frame.rank), frame.values
        self._seeds.pop(key, None)
        if 0 < len(frame.seeds) <= MOST_SEEDS:
            self._seeds[key] = frame
            if len(self._seeds) > MOST_RANKS:
                del self._seeds[next(iter(self._seeds))]
        if len(values) > _MOST_VALUES:
            values = {name: values[name] for name in self._columns(key) if name in values}
        return StepFrame(
            frame.run, frame.instance, frame.rank, frame.step, frame.time_unix_nano, values
        )

    def _columns(self, key: Key) -> list[str]:
        """What a row of this rank has behind its step and time."""
        chosen = self._chosen.get(key)
        return [*COLUMNS, *(chosen.custom if chosen is not None else ())]

    def _choose(self, frame: StepFrame) -> None:
        key, chosen = (frame.run, frame.rank), self._chosen
        if key not in chosen:
            if len(chosen) >= MOST_RANKS:
                if frame.step % FROM:  # looking for room at every step takes too long
                    return
                oldest = min(chosen, key=lambda each: _heard(chosen[each]))
                if frame.time_unix_nano - _heard(chosen[oldest]) < GONE_NS:
                    return
                del chosen[oldest]
            chosen[key] = _ChosenSteps()
        chosen[key].add(frame)

    def recent(
        self, request: RecentRequest, states: OrderedDict[Key, RunState], now_ns: int
    ) -> Recent:
        """What a tool is told at ``now_ns``, by the clock of the engine's ``tick``.

        ``states`` are those of all ranks, the one heard of last at the end.
        """
        run = request.run or (next(reversed(states))[0] if states else "")
        keys = [*_told_ranks(run, states)]
        mine = [rank for name, rank in keys if name == run]
        rank = request.rank if request.rank in mine or not mine else mine[0]
        state = states.get((run, rank))
        instance = "" if state is None else state.instance
        is_known = (instance, rank) == (request.instance, request.rank)
        columns = self._columns((run, rank))
        most = _TOLD_VALUES // len(columns)
        rows, newest = self._look_back(
            (run, rank), instance, request.step if is_known else -1, keys, most + 1
        )
        seeds = self._seeds.get((run, rank))
        return Recent(
            ranks=[self._now(key, states[key], newest.get(key), now_ns) for key in keys],
            of=len(states),
            run=run,
            rank=rank,
            instance=instance,
            columns=columns,
            rows=rows[:most],
            more=len(rows) > most,
            seeds=_seeds(seeds, state) if seeds is not None and state is not None else {},
            decisions=[*self._notes(run, request.decision)],
        )

    def _look_back(
        self, key: Key, instance: str, step: int, keys: list[Key], most: int
    ) -> tuple[list[Row], dict[Key, StepFrame]]:
        """Steps of a process behind ``step``, ``most`` of them or some more; and the newest of
        each rank."""
        found: list[StepFrame] = []
        newest: dict[Key, StepFrame] = {}
        first, looking = inf, True
        for frame in reversed(self._frames):
            its = (frame.run, frame.rank)
            newest.setdefault(its, frame)
            if looking and its == key and frame.instance == instance:
                looking = frame.step > step
                if looking:
                    found.append(frame)
                    first = frame.step
            if not looking and len(newest) >= len(keys):
                break
        chosen = self._chosen.get(key)
        rows: list[Row] = []
        if chosen is not None and chosen.frame and chosen.frame.instance == instance:
            rows = chosen.between(step, first)
        room, columns = max(most - len(rows), 0), self._columns(key)
        return [*rows, *(_row(frame, columns) for frame in found[::-1][:room])], newest

    def _now(self, key: Key, state: RunState, newest: StepFrame | None, now_ns: int) -> RankNow:
        decision, ending = state.decision, state.pace.ending
        values = {} if newest is None else newest.values
        return RankNow(
            run=key[0],
            rank=key[1],
            step=state.newest,
            time_unix_nano=state.time_unix_nano,
            state=rank_state(state, now_ns).value,
            ended=str(ending.ended) if ending is not None else "",
            mode=self._modes.get(key, ""),
            action=decision.action.value if decision else "",
            reason=decision.reason[:_LONGEST] if decision else "",
            loss=values.get("loss", nan),
            step_latency_ms=values.get("step_latency_ms", nan),
        )

    def _notes(self, run: str, after: int) -> Iterator[DecisionNote]:
        fresh = [n for n in self._noted if n.number > after and n.decision.run == run]
        for number, decision, frame, update in fresh[-_TOLD_DECISIONS:]:
            findings = [f for f in decision.findings if f.rule == decision.reason]
            won = next(iter(findings or decision.findings), None)
            yield DecisionNote(
                number=number,
                rank=frame.rank,
                step=decision.step,
                time_unix_nano=frame.time_unix_nano,
                action=decision.action.value,
                severity=decision.severity.value,
                reason=decision.reason[:_LONGEST],
                of_update=update,
                text=won.text[:_LONGEST] if won else "",
                values=dict([*won.values.items()][:8]) if won else {},
            )


def _told_ranks(run: str, states: OrderedDict[Key, RunState]) -> Iterator[Key]:
    """Ranks of a run, in order, and then those of others that were heard of last."""
    mine = sorted(key for key in states if key[0] == run)[:MOST_RANKS]
    yield from mine
    others = (key for key in reversed(states) if key[0] != run)
    yield from islice(others, MOST_RANKS - len(mine))


def _heard(chosen: _ChosenSteps) -> int:
    return 0 if chosen.frame is None else chosen.frame.time_unix_nano


def _seeds(frame: StepFrame, state: RunState) -> dict[str, tuple[float, float]]:
    """Stage and alpha of the seeds at the newest step; none where that had none."""
    found: dict[str, tuple[float, float]] = {}
    if frame.instance != state.instance or frame.step < state.newest - 1:
        return found
    for seed, values in frame.seeds.items():
        stage, alpha = values.get("kasmina.seed.stage"), values.get("kasmina.seed.alpha", 0.0)
        if stage is not None and len(found) < _TOLD_SEEDS:
            found[seed] = (stage, alpha)
    return found
