"""Rules that compare ranks: a live run and its replay decide alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from esper_otel.leyline.decisions import Action
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.history import History, Watched
from esper_tamiyo.judging.peers import (
    ARRIVAL_NS,
    AT_ONCE,
    HINDSIGHT_NS,
    KEPT_NS,
    KEPT_STEPS,
    MAX_STEPS,
    PeerBoard,
    PeerComparison,
)
from esper_tamiyo.language.table_file import TableSource, load, parse
from esper_tamiyo.serving.connection import Trainer
from sidecar.frames_made import hello_of, set_client

MS = 1_000_000
START = 1_800_000_000_000 * MS
BATCH = 100 * MS
"""What a trainer's stream waits before it sends, unless told otherwise."""

ACTING = parse(
    TableSource(
        "acting",
        b"""
version: acting
baseline: {window: 4, warmup: 2}
conservative: {clean_steps: 3}
rules:
  - {id: high, metric: loss, above: 8, severity: HIGH, action: CONTINUE, inhibits: [lone]}
  - {id: lone, any: [{metric: loss, above_peers: 2, release: 1.5},
       {all: [{metric: forward_ms, above_baseline: 2},
              {metric: forward_ms, above_peers: 1.2}]}],
     for: 2, of: 3, cooldown: 3, severity: WARNING, action: PAUSE, conservative: true}
  - {id: own, any: [{metric: grad_var, below_peers: 0.5}, {metric: backward_ms, above: 5}],
     severity: HIGH, action: OPTIMIZER}
""",
    )
)


class Ledger:
    """What was told of each rank, in order."""

    def __init__(self):
        self.told = {}
        self.fired = {}

    def on_rule_change(self, change):
        self.told.setdefault(change.rank, []).append(change)
        if change.after == "firing":
            self.fired.setdefault((change.rank, change.rule), change.step)

    def on_frame(self, frame, decision):
        pass

    def on_decision(self, decision, frame):
        self.told.setdefault(frame.rank, []).append(decision)


def made(rank, step, time_ns, **values):
    return StepFrame(
        "run", f"process{rank}", rank, step, time_ns, {"step": float(step), **values}
    )


def at_once(frame):
    return frame.time_unix_nano


def streamed(frame):
    """Rank 0 asks, the others only stream: what a run of several ranks does unless told."""
    time_ns = frame.time_unix_nano
    return time_ns if frame.rank == 0 else (time_ns // BATCH + 1) * BATCH


def heard(table, frames, arrival):
    """A ledger of all ``frames``, each judged at its ``arrival``; rank 0 asks."""
    ledger = Ledger()
    engine = Engine(table, observer=ledger)
    for frame in sorted(frames, key=lambda frame: (arrival(frame), frame.rank, frame.step)):
        trainer, ask = Trainer(hello_of(frame)), set_client(frame)
        asks = frame.rank == 0
        glanced = engine.decide_fast(trainer.key, trainer.instance, ask) if asks else None
        if glanced is None:
            engine.observe(frame)
        else:
            engine.commit(frame, glanced)
    return ledger


@pytest.mark.parametrize("slow", [0, 2])
@pytest.mark.parametrize("step_ms", [1, 2, 5, 20, 50, 500, 10_000])
def test_a_live_run_in_which_only_rank_0_asks_and_its_replay_name_the_straggler_alike(
    step_ms, slow
):
    trouble = 100
    met, back = ARRIVAL_NS // (step_ms * MS), HINDSIGHT_NS // (step_ms * MS)
    since = max(trouble, met) + back + 8
    frames = [
        made(
            rank,
            step,
            START + step * step_ms * MS + rank * MS // 100,
            loss=9.0 / step,
            step_latency_ms=float(step_ms),
            forward_ms=0.3 * step_ms * (3 if rank == slow and step > trouble else 1),
        )
        for step in range(1, since + 4)
        for rank in range(4)
    ]
    live, replayed = (
        heard(load("default"), frames, arrival) for arrival in (streamed, at_once)
    )
    assert live.told == replayed.told
    ((rank, rule),) = live.fired
    assert (rank, rule) == (slow, "straggler_rank")
    assert trouble + 6 <= live.fired[rank, rule] <= since


@st.composite
def trainings(draw):
    """Frames of a few ranks, and how long each of them is under way."""
    ranks = draw(st.integers(2, 4))
    time_ns, frames, delays = START, [], {}
    for step in range(1, draw(st.integers(1, 40)) + 1):
        time_ns += MS * draw(st.sampled_from((1, 20, 100, 300, 400, 1000, 3000)))
        for rank in range(ranks):
            if draw(st.integers(0, 9)) == 0:  # it was lost
                continue
            late_ns = draw(st.integers(0, 300)) * MS
            keys = ("loss", "forward_ms", "backward_ms", "grad_var")
            values = {key: draw(st.sampled_from((1.0, 1.5, 9.0))) for key in keys}
            frames.append(made(rank, step, time_ns + late_ns, **values))
            delays[rank, step] = draw(st.integers(0, ARRIVAL_NS // MS - 1)) * MS
    return frames, delays


@given(trainings())
def test_the_order_in_which_ranks_are_heard_changes_no_decision(training):
    frames, delays = training
    arrivals, newest = {}, {}
    in_order = {}
    for frame in frames:  # clocks never go back, and one rank's frames come in their order
        time_ns = max(frame.time_unix_nano, newest.get(frame.rank, (0, 0))[0] + 1)
        come = max(time_ns + delays[frame.rank, frame.step], newest.get(frame.rank, (0, 0))[1])
        newest[frame.rank] = time_ns, come
        one = structs.replace(frame, time_unix_nano=time_ns)
        in_order[one.rank, one.step] = one
        arrivals[one.rank, one.step] = come
    live = heard(ACTING, in_order.values(), lambda frame: arrivals[frame.rank, frame.step])
    assert live.told == heard(ACTING, in_order.values(), at_once).told


def test_an_action_on_a_rank_reaches_its_answers_in_hindsight():
    frames = [
        made(rank, step, START + step * 100 * MS, loss=7.0 if rank == 0 and step > 30 else 1.0)
        for step in range(1, 60)
        for rank in range(3)
    ]
    ledger = heard(ACTING, frames, at_once)
    # The second slow step is old enough thirteen steps later, and counts from the next on.
    assert ledger.fired == {(0, "lone"): 32 + 13}
    paused = [one for one in ledger.told[0] if getattr(one, "action", "") == Action.PAUSE]
    assert (paused[0].step, paused[0].reason) == (32 + 13 + 1, "lone")
    seen = {"step": 32.0, "loss": 7.0, "peers(loss)": 1.0}
    assert paused[0].findings[0].values == seen
    assert paused[0].conservative


def test_a_rank_that_is_alone_is_judged_at_once():
    ledger = heard(ACTING, [made(0, 1, START, backward_ms=9.0)], at_once)
    assert ledger.fired == {(0, "own"): 1}


def test_ranks_that_come_later_than_they_may_are_left_out():
    board = PeerBoard()
    one = PeerComparison(board, 0, Watched())
    board.post(1, 7, START + HINDSIGHT_NS - ARRIVAL_NS + 1, {"loss": 1.0})
    board.post(2, 7, START, {"loss": 3.0})
    board.post(3, 7, START, {"loss": 5.0})
    assert one.in_company(START + ARRIVAL_NS, History(Watched()))
    one.record(made(0, 7, START, loss=9.0), ["loss"])
    assert one.due(START + HINDSIGHT_NS - 1) == []
    (waiting,) = one.due(START + HINDSIGHT_NS)
    one.compare(waiting, ["loss"], START + HINDSIGHT_NS)
    assert one.target.history.peers == {"loss": 4.0}


def test_behind_a_pause_the_newest_steps_are_compared():
    board = PeerBoard()
    board.post(1, 0, START, {})
    one = PeerComparison(board, 0, Watched(lasts=("loss",)))
    assert one.in_company(START + ARRIVAL_NS, History(Watched()))
    for step in range(100):
        one.record(made(0, step, START + step, loss=float(step)), ["loss"])
    due = one.due(START + 10 * HINDSIGHT_NS)
    assert [waiting.step for waiting in due] == [*range(100 - AT_ONCE, 100)]
    one.turn_to(due[0].values)
    last = one.target.history.lasts["loss"]
    assert (last.value, last.total) == (99.0 - AT_ONCE, 100 - AT_ONCE)  # the past has them all


def test_steps_of_a_rank_that_was_alone_are_compared_once_others_come():
    board = PeerBoard()
    for step in range(40):
        board.post(0, step, START + step * KEPT_NS // 20, {"loss": float(step)})
    kept = [step for step, *_ in board.told_by(0)]
    assert kept == [*range(39, 39 - len(kept), -1)]
    assert len(kept) == board.posts == 21
    assert [*board.told_by(1)] == []
    for rank in (1, 2):
        board.post(rank, 38, START + 38 * KEPT_NS // 20, {"loss": 10.0 * rank})
    assert board.others(0, 38, "loss", 1 << 63) == 15.0
    assert board.others(1, 38, "loss", 1 << 63) == 29.0
    assert [step for step, *_ in board.told_by(0)] == kept
    assert board.posts == len(kept) + 2
    board.remove_rank(0)
    assert [*board.told_by(0)] == []
    assert board.posts == 2


def test_a_rank_that_is_alone_may_begin_anew():
    board = PeerBoard()
    for step in (5, 6, 7, 6):
        board.post(0, step, START + step, {"loss": float(step)})
    assert [step for step, *_ in board.told_by(0)] == [7, 6, 5]
    board.remove_rank(0)
    assert [*board.told_by(0)] == []
    assert board.posts == 0


@pytest.mark.parametrize(
    ("step_ns", "kept"),
    [(10_000 * MS, KEPT_STEPS), (10 * MS, KEPT_NS // (10 * MS) + 1), (0, MAX_STEPS)],
)
def test_a_board_is_bounded_by_time_and_by_steps(step_ns, kept):
    board = PeerBoard()
    last = 3 * MAX_STEPS
    for step in range(last + 1):
        for rank in (0, 1):
            board.post(rank, step, START + step * step_ns, {"loss": float(step)})
    held = [
        step for step in range(last + 1) if board.others(0, step, "loss", 1 << 63) is not None
    ]
    assert held == [*range(last + 1 - kept, last + 1)]
