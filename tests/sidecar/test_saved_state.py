"""What is saved of an engine: an engine made of it goes on as the one that it was made of."""

import socket
import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from bench.scenarios.recordings import read
from bench.scenarios.suite import RECORDINGS
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.wire import SilenceRequest
from esper_tamiyo.journaling.reporter import Reporter
from esper_tamiyo.judging import (
    endings,
    engine,
    excursions,
    history,
    liveness,
    peers,
    roster,
    rule_status,
    run_state,
    silences,
)
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.rulebook import Rulebook
from esper_tamiyo.judging.saved_state import saved_engine, saved_rank
from esper_tamiyo.judging.saved_structs import BY_HAND, DERIVED, SAVED
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.table import conditions
from esper_tamiyo.language.table_file import TableSource, load, parse
from esper_tamiyo.latency import GarbageSchedule
from esper_tamiyo.serving.connection import ClientConnection
from esper_tamiyo.serving.replies import Replies
from sidecar.frames_made import NUMBERS, SEED_VALUES, STEP_VALUES
from testkit.kept_state import KeptEngine, Observed

DEFAULT = load("default")

EVERYTHING = parse(
    TableSource(
        "everything",
        b"""
version: everything
baseline: {window: 4, warmup: 2}
record: {window: 8, warmup: 8, false_alarm_steps: 100}
conservative: {clean_steps: 3}
rules:
  - {id: often, metric: loss, above: 0.15, release: 0.05, for: 2, of: 100, severity: HIGH,
     action: OPTIMIZER, parameters: {lr_scale: 0.5}}
  - {id: least, metric: accuracy, at_least: 1.0, severity: HIGH, action: CONTINUE, cooldown: 4}
  - {id: low, metric: loss, below: 0.05, for: 3, severity: HIGH, action: OPTIMIZER}
  - {id: most, metric: accuracy, at_most: 0.0, severity: HIGH, action: CONTINUE}
  - {id: sunk, metric: accuracy, below_baseline: 0.5, release: 0.9, severity: HIGH,
     action: PAUSE, conservative: true, inhibits: [often]}
  - {id: drift, metric: grad_var, above_baseline: 2, baseline: frozen, mode: observe,
     severity: HIGH, action: PAUSE}
  - {id: worst, metric: optimizer_lr, above_baseline: 1, baseline: highest, severity: WARNING,
     action: CONTINUE}
  - {id: best, metric: loss, above_baseline: 3, baseline: lowest, severity: WARNING,
     action: OPTIMIZER, downgrade: true}
  - {id: spike, metric: loss, above_record: 1, severity: HIGH, action: OPTIMIZER,
     parameters: {usual_norm: true}}
  - {id: climb, metric: gradient_norm, above_record: 1, rising: true, for: 2, of: 3,
     severity: HIGH, action: OPTIMIZER, parameters: {usual_norm: true}}
  - {id: fell, metric: loss, below_record: 1, severity: HIGH, action: CONTINUE}
  - {id: slow, metric: step_latency_ms, above_peers: 2, release: 1.5, for: 2, of: 3,
     severity: HIGH, action: PAUSE}
  - {id: mixed, any: [{metric: forward_ms, below_peers: 0.5}, {metric: backward_ms, above: 50},
     {metric: forward_ms, above_baseline: 2}], severity: HIGH, action: OPTIMIZER, for: 2, of: 2}
  - {id: rise, metric: grad_var, rises_by: 0.1, severity: WARNING, action: OPTIMIZER}
  - {id: same, metric: optimizer_lr, unchanged_for: 2, severity: WARNING, action: OPTIMIZER}
  - {id: risen, metric: loss, risen_for: 2, severity: WARNING, action: OPTIMIZER}
  - {id: fallen, metric: loss, fallen_for: 2, for: 2, severity: WARNING, action: OPTIMIZER}
  - {id: out, metric: gpu_mem_free_gb, runs_out_within: 3, severity: HIGH, action: PAUSE}
  - {id: lost, metric: loss, nonfinite: true, severity: CRITICAL, action: PAUSE}
  - {id: gone, metric: samples_per_s, missing_for: 2, severity: WARNING, action: OPTIMIZER}
  - {id: silent, metric: step, missing_for: 2, severity: HIGH, action: CONTINUE}
  - {id: seed, severity: HIGH, action: PAUSE, conservative: true, any: [
      {metric: kasmina.seed.alpha, above: 0.5}, {metric: kasmina.seed.stage, rises_by: 1},
      {metric: kasmina.seed.alpha, above_baseline: 2}]}
""",
    )
)

TABLES = {"default": DEFAULT, "everything": EVERYTHING}

STATEFUL = (
    *(endings, engine, excursions, history, liveness, peers, roster, rule_status),
    *(run_state, silences),
)
"""Modules whose classes may have to be saved."""

PLAIN = {
    # Made of a table or for one call, and never changed.
    *(history.BaselineKey, history.RecordKey, history.Watched, rule_status.RuleTransition),
    *(peers.Waiting, liveness.RankCensus, liveness.RankState),
    *(silences.SilenceOrder, silences.SilenceError),
    *(roster.Speaker, roster.Capacity),  # of open connections; of the table
    peers._Told,  # saved as each rank's posts
}

MAKERS = {
    engine.Engine: lambda: engine.Engine(DEFAULT),
    roster.Roster: lambda: roster.Roster(Rulebook(DEFAULT), 1 << 20),
}

SECOND = 1_000_000_000


def attributes(kind):
    """The names of what objects of a class hold."""
    if hasattr(kind, "__slots__"):
        return set(kind.__slots__)
    made = MAKERS.get(kind, kind)
    return set(vars(made()))


def own_classes(module):
    return [
        each
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__
    ]


@pytest.mark.parametrize(
    "kind",
    [each for module in STATEFUL for each in own_classes(module) if each not in PLAIN],
    ids=lambda kind: kind.__name__,
)
def test_no_field_is_forgotten(kind):
    saved = SAVED.get(kind)
    fields = set() if saved is None else set(saved.__struct_fields__)
    known = fields | {f"_{field}" for field in fields}
    known |= DERIVED.get(kind, frozenset()) | BY_HAND.get(kind, frozenset())
    assert attributes(kind) <= known, "neither saved nor derived: a restart forgets it"


def test_the_odd_table_has_every_operator():
    used = {part.operator for rule in EVERYTHING.rules for part in conditions(rule.when)}
    assert used == set(Operator)


def state_of(one, keys):
    """All that an engine knows, but for the order in which steps of ranks were compared."""
    ranks = filter(None, (saved_rank(one, key) for key in keys))
    return [saved_engine(one), *(structs.replace(rank, posts=[]) for rank in ranks)]


def cut_in_two(frames, table, cuts, round_s=0.0):
    """What an engine makes of ``frames``, and one that is killed before each of ``cuts``."""
    keys = sorted({(frame.run, frame.rank) for frame in frames})
    whole, parts = Observed(), Observed()
    left_alone = Engine(table, observer=whole)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        for begin, end in pairwise([0, *cuts, len(frames)]):
            killed = KeptEngine(Path(name), table, parts, round_s)
            stack.callback(killed.kill)
            assert not killed.restored.problem
            assert not killed.restored.unfit
            assert state_of(killed.engine, keys) == state_of(left_alone, keys)
            for state in killed.engine._runs.values():
                state.pace.away_ns = 0  # the times of these frames are no clock's
            parts.changes.clear()
            whole.changes.clear()
            for frame in frames[begin:end]:
                assert killed.judge(frame) == left_alone.observe(frame)
                assert parts.changes == whole.changes
            stack.pop_all().close()
        assert state_of(killed.engine, keys) == state_of(left_alone, keys)


@st.composite
def fleets(draw):
    """Frames of two ranks of a run and of another run, as they come; some steps missing.

    The two ranks are not far apart. The other run is taken over by another process at times.
    """
    frames = []
    steps = {("run", 0): -1, ("run", 1): -1, ("other", 0): -1}
    instances = dict.fromkeys(steps, 0)
    now = 10 * SECOND
    for _ in range(draw(st.integers(2, 40))):
        now += draw(st.sampled_from([SECOND // 10, SECOND, 3 * SECOND, 20 * SECOND]))
        key = draw(st.sampled_from([("run", 0), ("run", 0), ("run", 1), ("other", 0)]))
        if key == ("other", 0) and draw(st.integers(0, 7)) == 0:
            instances[key] += 1
            steps[key] = -1
        beside = max(steps["run", 0], steps["run", 1]) - 2 if key[0] == "run" else 0
        steps[key] = max(steps[key] + draw(st.sampled_from([1, 1, 1, 3])), beside)
        values = {"step": float(steps[key]), **draw(STEP_VALUES)}
        values["loss"] = draw(NUMBERS)
        if draw(st.integers(0, 15)) == 0:
            values["phase"] = float(draw(st.integers(0, 2)))
        seeds = draw(SEED_VALUES)
        run, rank = key
        instance = f"process{instances[key]}"
        frames.append(StepFrame(run, instance, rank, steps[key], now, values, seeds))
    return frames


@settings(deadline=None, max_examples=25)
@given(
    fleets(),
    st.sampled_from(["default", "everything"]),
    st.sets(st.integers(0, 1000), min_size=1, max_size=3),
    st.sampled_from([0.0, 1e9]),
)
def test_an_engine_made_of_what_was_saved_goes_on_alike(frames, table, places, round_s):
    cuts = {1 + place % (len(frames) - 1) for place in places}
    cut_in_two(frames, TABLES[table], sorted(cuts), round_s)


@pytest.mark.parametrize("kind", ["lr_times_50", "straggler"])
@pytest.mark.parametrize("table", TABLES)
def test_a_recorded_training_goes_on_alike_wherever_it_is_cut(kind, table):
    ranks = [
        each for each in read(RECORDINGS / "restore-00.tapes") if each.scenario.kind == kind
    ]
    frames = [frame for each in ranks for frame, _ in each.frames()]
    frames.sort(key=lambda frame: frame.time_unix_nano)
    cut_in_two(frames, TABLES[table], range(11, len(frames) - 1, len(frames) // 3))


def test_silences_and_replaced_processes_are_remembered(tmp_path):
    kept = KeptEngine(tmp_path, EVERYTHING, round_s=1e9)
    kept.judge(StepFrame("run", "first", 0, 1, SECOND, {"step": 1.0, "loss": 1.0}))
    kept.judge(StepFrame("run", "second", 0, 1, 2 * SECOND, {"step": 1.0, "loss": 1.0}))
    kept.engine.silence(SilenceRequest("run", "often", 7))
    kept.turn()
    kept.kill()
    after = KeptEngine(tmp_path, EVERYTHING)
    assert after.engine.overview()["silences"] == [
        {"run": "run", "rule": "often", "until_step": 8}
    ]
    late = StepFrame("run", "first", 0, 9, 9 * SECOND, {"step": 9.0})
    assert after.judge(late).reason == "superseded"
    after.kill()


def test_behind_a_restart_a_streamed_rank_may_have_gone_on(tmp_path):
    def streamed(step):
        return StepFrame("run", "one", 0, step, SECOND * (1 + step), {"step": float(step)})

    kept = KeptEngine(tmp_path, EVERYTHING)
    for step in range(5):
        kept.judge(streamed(step))
    assert kept.judge(streamed(1_000_000)).reason == "protocol_error"
    kept.kill()
    after = KeptEngine(tmp_path, EVERYTHING)
    assert after.judge(streamed(900)).reason != "protocol_error"
    assert after.judge(streamed(1_000_000)).reason == "protocol_error"
    after.kill()


def test_a_silence_is_with_the_writer_before_it_is_confirmed(tmp_path):
    kept = KeptEngine(tmp_path, EVERYTHING, round_s=1e9)
    kept.judge(StepFrame("run", "first", 0, 1, SECOND, {"step": 1.0, "loss": 1.0}))
    ours, theirs = socket.socketpair()
    connection = ClientConnection(ours)

    def keep_order():
        kept.keep_order()
        with pytest.raises(BlockingIOError):  # nobody was told yet
            theirs.recv(1, socket.MSG_DONTWAIT)

    replies = Replies(
        *(kept.engine, Reporter(None, trace_every=1), GarbageSchedule()),
        *(None, dict, keep_order),
    )
    assert replies.reply(connection, SilenceRequest("run", "often", 7), 0)
    assert b"silenced" in theirs.recv(1000)
    kept.kill()  # no turn ends in between
    after = KeptEngine(tmp_path, EVERYTHING)
    assert len(after.engine.overview()["silences"]) == 1
    after.kill()
    connection.close()
    theirs.close()
