"""What a report says of many ranks, of silent ones first."""

import pytest

from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.commands import sidecar
from esper_tamiyo.journaling.own_metrics import OWN_METRICS
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.liveness import TOLD_RANKS
from esper_tamiyo.language.table_file import TableSource, parse

SECOND = 1_000_000_000
START = 1_800_000_000 * SECOND
TABLE = parse(
    TableSource(
        "t",
        b"""
version: t
rules:
  - {id: high, metric: loss, above: 5, severity: HIGH, action: PAUSE, conservative: true}
  - {id: later, metric: loss, above: 5, for: 500, severity: WARNING, action: OPTIMIZER}
  - {id: quiet, metric: step, missing_for: 50, severity: HIGH, action: CONTINUE}
""",
    )
)
RANKS, DEAD, HIGH = 40, 5, 7


@pytest.fixture
def engine():
    """Many ranks, of which one is high and says no more, and one is high."""
    engine = Engine(TABLE)
    for step in range(100):
        for rank in range(RANKS):
            if rank == DEAD and step >= 10:
                continue
            values = {"step": float(step), "loss": 9.0 if rank in (DEAD, HIGH) else 1.0}
            engine.observe(StepFrame("r", "", rank, step, START + step * SECOND, values))
    engine.tick(START + 99 * SECOND)
    return engine


def told(engine):
    return engine.overview(START + 99 * SECOND)


def counted(report, name):
    """The values of one of Tamiyo's metrics, by their attributes."""
    (metric,) = (metric for metric in OWN_METRICS if metric.name == name)
    values = metric.read({"engine": report})
    return {tuple(attributes.values()): value for value, attributes in values}


def test_all_ranks_are_counted_however_many_are_told_of(engine):
    report = told(engine)
    assert len(report["runs"]) == TOLD_RANKS < RANKS
    assert counted(report, "tamiyo.runs") == {("healthy",): RANKS - 1, ("stale",): 1}
    assert counted(report, "tamiyo.conservative") == {(): 2}
    assert counted(report, "tamiyo.rules") == {
        ("high", "firing"): 1,
        ("high", "unknown"): 1,
        ("later", "pending"): 1,
        ("later", "unknown"): 1,
        ("quiet", "firing"): 1,
    }


def test_silent_ranks_are_told_of_first_and_then_those_for_which_a_rule_acts(engine):
    report = told(engine)
    assert [run["rank"] for run in report["runs"][:3]] == [DEAD, HIGH, RANKS - 1]


def test_the_rules_of_a_silent_rank_are_unknown_with_what_they_were(engine):
    silent, heard = told(engine)["runs"][:2]
    assert silent["rules"] == [
        {"rule": "high", "state": "unknown", "since_step": 0, "last_state": "firing"},
        {"rule": "later", "state": "unknown", "since_step": 0, "last_state": "pending"},
        {"rule": "quiet", "state": "firing", "since_step": 9},
    ]
    assert [rule["state"] for rule in heard["rules"]] == ["firing", "pending"]
    back = StepFrame("r", "", DEAD, 99, START + 100 * SECOND, {"step": 99.0, "loss": 1.0})
    engine.observe(back)
    (again,) = (run for run in told(engine)["runs"] if run["rank"] == DEAD)
    assert (again["state"], again["rules"]) == ("healthy", [])


def test_people_are_shown_how_many_and_who(engine, capsys):
    nothing = {name: {} for name in ("table", "connections", "answers", "answer_ms")}
    report = {"pid": 1, "uptime_s": 1.0, "last_frame_age_s": 0.0, "missed_steps": 0, **nothing}
    sidecar._show({**report, "ingest": None, "scribe": None, "engine": told(engine)})
    shown = capsys.readouterr().out
    assert f"ranks: healthy {RANKS - 1}, stale 1" in shown
    assert "r/5: step 9, CONTINUE (quiet), conservative; stale, no data for 90 s" in shown


def test_between_two_parts_of_a_look_for_silent_ranks_the_ranks_go_on():
    engine = Engine(TABLE)
    for step in range(100):
        for rank in range(4):
            values = {"step": float(step), "loss": 1.0}
            engine.observe(StepFrame("r", "", rank, step, START + step * SECOND, values))
    late = START + 1000 * SECOND
    parts = engine.tick_in_parts(late, 1)
    for _ in range(5):  # what is kept has been counted, and one rank been looked at
        next(parts)
    engine.observe(StepFrame("r", "", 2, 100, late, {"step": 100.0, "loss": 1.0}))
    engine.roster._forget(("r", 1))
    assert len([*parts]) == 3  # behind each place
    rules = {run["rank"]: run["rules"] for run in engine.overview(late)["runs"]}
    assert {rank: [rule["rule"] for rule in told] for rank, told in rules.items()} == {
        0: ["quiet"],
        2: [],
        3: ["quiet"],
    }
