"""What is beyond a limit, and who has to go, at a real sidecar's socket and receiver."""

import itertools
import socket
from types import SimpleNamespace

import pytest
from msgspec import structs

from esper_otel.leyline.frames import MAX_NAME, MAX_SEEDS_PER_FRAME, MAX_STEP
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.leyline.wire import PROTOCOL, Ask, Hello, Refusal, SeedRow, Welcome
from esper_tamiyo.journaling.reporter import Reporter
from esper_tamiyo.serving.connection import IDLE_NS, idlest
from esper_tamiyo.serving.server import MAX_CONNECTIONS
from sidecar.running import row_of, sidecar

HELLO = Hello(PROTOCOL, "run", "one", 0, 1, list(STEP_KEYS), list(SEED_KEYS))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with sidecar(tmp_path_factory.mktemp("s") / "t.sock") as running:
        yield running


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": "x" * (MAX_NAME + 1)}, "name_too_long"),
        ({"instance": "x" * (MAX_NAME + 1)}, "name_too_long"),
        ({"mode": "x" * (MAX_NAME + 1)}, "name_too_long"),
        ({"step_columns": ["x" * (MAX_NAME + 1)]}, "name_too_long"),
        ({"step_columns": ["x"] * 600}, "too_many_columns"),
        ({"rank": -1}, "rank_out_of_range"),
        ({"world_size": 1 << 40}, "rank_out_of_range"),
        ({"began_unix_nano": -1}, "time_out_of_range"),
    ],
)
def test_a_trainer_beyond_a_limit_is_told_which_one(running, change, reason):
    before = running.status()["engine"]["refused"].get(reason, 0)
    with running.client() as client:
        refusal = client.call(structs.replace(HELLO, **change))
        assert isinstance(refusal, Refusal)
        assert reason in refusal.message
        assert client.receive() is None
    assert running.status()["engine"]["refused"][reason] == before + 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": MAX_STEP + 1}, "step_out_of_range"),
        ({"step": -(1 << 63)}, "step_out_of_range"),
        ({"step": (1 << 64) - 1, "request_id": (1 << 64) - 1}, "step_out_of_range"),
        ({"time_unix_nano": (1 << 64) - 1}, "time_out_of_range"),
        (
            {"seeds": [SeedRow(f"s{n}", []) for n in range(MAX_SEEDS_PER_FRAME + 1)]},
            "too_many_seeds",
        ),
    ],
)
def test_an_ask_beyond_a_limit_is_answered_and_the_next_one_judged(running, change, reason):
    with running.client() as client:
        assert isinstance(
            client.call(structs.replace(HELLO, run=f"{reason} {change}"[:99])), Welcome
        )
        assert client.ask(1, nonfinite=1.0).reason == "nonfinite_loss"
        before = running.status()["engine"]["refused"].get(reason, 0)
        ask = Ask(7, 2, 3, row_of(2, {}))
        answer = client.call(structs.replace(ask, **change))
        assert answer.decision.reason == "protocol_error"
        assert answer.request_id == change.get("request_id", 7)
        assert running.status()["engine"]["refused"][reason] == before + 1
        assert client.ask(3, nonfinite=1.0).reason == "nonfinite_loss"


def test_who_only_connects_keeps_no_trainer_out(tmp_path):
    with sidecar(tmp_path / "t.sock") as running, running.client() as trainer:
        trainer.hello(run="a")
        trainer.ask(1)
        idle = []
        try:
            for number in range(MAX_CONNECTIONS + 20):
                one = socket.socket(socket.AF_UNIX)
                one.connect(str(running.socket))
                if number % 2:
                    one.sendall(b"\x09")  # of a message that never comes
                idle.append(one)
            with running.client() as late:
                late.hello(run="b")
                assert late.ask(1, nonfinite=1.0).reason == "nonfinite_loss"
            assert trainer.ask(2, nonfinite=1.0).reason == "nonfinite_loss"
            connections = trainer.status()["connections"]
            assert connections["open"] <= MAX_CONNECTIONS
            assert connections["gave_up_idle"] > 20
        finally:
            for one in idle:
                one.close()


def test_of_those_who_asked_only_one_that_is_silent_for_long_has_to_go(monkeypatch):
    now = 10**12
    monkeypatch.setattr("time.perf_counter_ns", lambda: now)
    asked, idle = (SimpleNamespace(asks=asks, heard_ns=now - 1) for asks in (True, False))
    older = SimpleNamespace(asks=False, heard_ns=now - 2)
    assert idlest([asked, idle, older]) is older
    assert idlest([asked]) is None
    asked.heard_ns = now - IDLE_NS - 1
    assert idlest([asked, idle]) is idle
    assert idlest([asked]) is asked
    assert idlest([]) is None


class FailingWriter:
    """Takes no message about step 13."""

    orders = SimpleNamespace(journal=None)
    pipe = object()
    lost = 0
    is_due = False

    def __init__(self):
        self.sent = []

    def due_in(self):
        return None

    def status(self):
        return {}

    def send(self, messages):
        if any(getattr(each, "step", 0) == 13 for each in messages):
            raise OverflowError("no message can carry that")
        self.sent += messages
        return True


def test_what_cannot_be_written_down_ends_nothing_and_is_said_once(caplog, monkeypatch):
    from esper_tamiyo.journaling import reporter as reporter_module
    from esper_tamiyo.judging.engine import Engine
    from esper_tamiyo.language.table_file import load
    from sidecar.frames_made import frame

    now = itertools.count(100.0)
    monkeypatch.setattr(reporter_module.time, "monotonic", lambda: next(now))
    writer = FailingWriter()
    reporter = Reporter(writer)
    engine = Engine(load("default"), observer=reporter.decision_log)
    for step in (12, 13, 13, 14):
        engine.observe(frame(step, nonfinite=1.0))
        reporter.write_down(engine.table, lambda: iter([{}]))
    engine.observe(frame(13, instance="two", nonfinite=1.0))
    reporter.write_down(engine.table, lambda: 1 / 0)
    kinds = {type(each).__name__ for each in writer.sent if getattr(each, "step", 0) == 14}
    assert "Decided" in kinds
    failed = reporter.status()["recording_failed"]
    assert failed >= 2
    assert 1 <= len(caplog.records) <= 2


def test_a_heartbeat_is_gathered_over_turns_between_which_asks_are_answered():
    from esper_tamiyo.judging.engine import Engine
    from esper_tamiyo.language.table_file import load
    from sidecar.frames_made import frame

    writer = FailingWriter()
    reporter = Reporter(writer)
    engine = Engine(load("default"), observer=reporter.decision_log)
    for run in range(5):
        engine.observe(frame(1, run=f"run-{run}"))

    def turns_until_it_is_sent():
        turns = 0
        while not [each for each in writer.sent if type(each).__name__ == "Heartbeat"]:
            engine.observe(frame(turns + 2, run="run-0"))
            engine.observe(frame(1, run=f"other-{turns}"))
            reporter.write_down(engine.table, lambda: engine.overview_in_parts(None, 2))
            assert reporter.due_in() == 0.0 or turns == 3
            turns += 1
        return turns

    assert turns_until_it_is_sent() == 4
    (beat,) = [each for each in writer.sent if type(each).__name__ == "Heartbeat"]
    names = {rank["run"] for rank in beat.report["runs"]}
    assert names == {*(f"run-{run}" for run in range(5)), "other-0"}


def test_an_overview_in_parts_is_the_overview():
    from esper_tamiyo.judging.engine import Engine
    from esper_tamiyo.language.table_file import load
    from sidecar.frames_made import frame

    engine = Engine(load("default"))
    for run in range(7):
        engine.observe(frame(1, run=f"run-{run}", nonfinite=float(run % 2)))
    *parts, whole = engine.overview_in_parts(10**12, 3)
    assert parts == [None, None, None]
    assert whole == engine.overview(10**12)
    assert sum(whole["states"].values()) == 7


def test_a_rank_with_many_seeds_is_several_in_an_overview_in_parts():
    from esper_tamiyo.judging.engine import Engine
    from esper_tamiyo.language.table_file import load
    from sidecar.frames_made import frame

    engine = Engine(load("default"))
    for run in range(4):
        for step in range(1, 5):
            seeds = {f"{step}-{seed}": {"seed_alpha": 0.5} for seed in range(16)}
            engine.observe(frame(step, run=f"run-{run}", seeds=seeds if run % 2 else {}))
    *parts, whole = engine.overview_in_parts(10**12, 4)
    assert len(parts) == 3  # a rank of weight 1, one of 5 by itself, 1, and 5 again
    assert whole == engine.overview(10**12)
