"""Who speaks for a rank, how far its steps may go at once, and who is forgotten."""

import gc
import tracemalloc

import pytest
from msgspec import structs

from esper_otel.leyline.decisions import NOMINAL, PROTOCOL_ERROR, SUPERSEDED
from esper_otel.leyline.frames import MAX_NAME, MAX_SEEDS_PER_FRAME, MAX_STEP
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_tamiyo.judging import peers
from esper_tamiyo.judging.admission import FREE_LEAP, HELD_LEAP
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.roster import GONE_AFTER_NS, MAX_RUNS
from esper_tamiyo.judging.rule_status import NEW_AT_ONCE
from esper_tamiyo.language.table_file import TableSource, load, parse
from sidecar.frames_made import frame

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
NOON = 1_700_000_000 * SECOND

TABLE = parse(
    TableSource(
        "t",
        b"version: t\nrules: [{id: up, metric: loss, above: 1, severity: HIGH, action: PAUSE},"
        b" {id: odd, metric: kasmina.seed.alpha, above: 1, severity: HIGH, action: PAUSE}]",
    )
)


def room_for(engine, **most):
    """``engine`` with room for so many."""
    engine.roster.capacity = engine.roster.capacity._replace(**most)
    return engine


class Trainers:
    """Processes of one rank, at 100 steps a second; time is the sum of what happens."""

    def __init__(self):
        self.engine = Engine(TABLE)
        self.now = HOUR  # of the sidecar's own clock
        self.offset = NOON - HOUR

    def connect(self, instance, began=0):
        return self.engine.roster.introduce(("run", 0), instance, began, self.now)

    def hang_up(self, instance):
        self.engine.roster.leave(("run", 0), instance)

    def ask(self, step, instance="one", **values):
        return self._tell(step, instance, asked=True, **values)

    def stream(self, step, instance="one", ago=0, **values):
        return self._tell(step, instance, asked=False, ago=ago, **values)

    def _tell(self, step, instance, *, asked, ago=0, **values):
        self.now += SECOND // 100
        made = frame(step, instance=instance, **{"loss": 0.5} | values)
        made = structs.replace(made, time_unix_nano=self.offset + self.now - ago)
        return self.engine.observe(made, at_ns=self.now, asked=asked).reason

    def wait(self, ns):
        self.now += ns

    def counts(self):
        report = self.engine.overview()
        return {**report["frames"], **report["refused"]}


def trained(steps=50, way="ask", instance="one"):
    """Trainers of whom one has made so many steps, from 1 on."""
    trainers = Trainers()
    if way == "ask":
        assert trainers.connect(instance)
    for step in range(1, steps + 1):
        assert getattr(trainers, way)(step, instance) == NOMINAL
    return trainers


@pytest.mark.parametrize("way", ["ask", "stream"])
@pytest.mark.parametrize("is_open", [True, False])
def test_what_an_earlier_attempt_left_does_not_take_the_place_of_the_living_one(way, is_open):
    trainers = trained(way=way)
    if way == "ask" and not is_open:
        trainers.hang_up("one")
    assert [trainers.stream(step, "before", ago=HOUR) for step in (1, 2, 900)] == (
        [SUPERSEDED] * 3
    )
    assert getattr(trainers, way)(51, loss=2.0) == "up"
    assert trainers.counts()["superseded"] == 3


def test_the_stream_does_not_replace_a_process_that_asks_whenever_it_says_it_began():
    trainers = trained()
    assert trainers.stream(1, "later") == SUPERSEDED
    assert trainers.ask(51, loss=2.0) == "up"


def test_the_stream_adds_to_a_process_that_asks():
    trainers = trained()
    assert trainers.stream(51, loss=2.0) == "up"
    assert trainers.ask(52, loss=2.0) == "up"


@pytest.mark.parametrize("way", ["ask", "stream"])
def test_a_new_attempt_takes_over_at_once(way):
    trainers = trained()
    trainers.hang_up("one")
    if way == "ask":
        trainers.connect("two", NOON)
    assert getattr(trainers, way)(1, "two", loss=2.0) == "up"
    assert trainers.stream(51, "one") == SUPERSEDED


def test_a_new_attempt_that_introduces_itself_wins_over_one_that_is_still_connected():
    trainers = trained()
    assert trainers.connect("two")
    assert trainers.ask(1, "two", loss=2.0) == "up"
    assert trainers.ask(51, "one", loss=2.0) == SUPERSEDED
    assert not trainers.connect("one")  # it was replaced, and a newer one lives
    assert trainers.ask(2, "two", loss=2.0) == "up"


def test_of_two_that_ask_the_one_that_began_later_is_the_rank():
    trainers = Trainers()
    trainers.connect("new", began=NOON)
    trainers.ask(1, "new")
    assert not trainers.connect("old", began=NOON - 1)
    assert trainers.ask(700, "old") == SUPERSEDED
    assert trainers.ask(2, "new", loss=2.0) == "up"
    assert trainers.connect("newest", began=NOON + 1)
    assert trainers.ask(1, "newest", loss=2.0) == "up"


def test_a_clock_that_was_wrong_keeps_no_living_trainer_out():
    trainers = Trainers()
    trainers.connect("ahead", began=NOON + HOUR)
    trainers.ask(1, "ahead")
    trainers.hang_up("ahead")
    assert trainers.connect("right", began=NOON)
    assert trainers.ask(1, "right", loss=2.0) == "up"


def test_a_connection_that_is_open_and_silent_gives_way_to_a_newer_stream():
    trainers = trained()
    trainers.wait(60 * SECOND)
    assert trainers.stream(1, "two", loss=2.0) == "up"
    assert trainers.ask(51, "one") == SUPERSEDED


def test_a_trainer_that_connects_anew_before_its_old_connection_ended_is_the_same():
    trainers = trained()
    trainers.connect("one")
    trainers.hang_up("one")
    assert trainers.stream(1, "two") == SUPERSEDED
    trainers.hang_up("one")
    assert trainers.engine.overview()["asking"] == 0


def test_a_rank_that_was_silent_for_an_hour_is_anybodys():
    trainers = trained(way="stream")
    trainers.wait(GONE_AFTER_NS)
    assert trainers.stream(1, "two", ago=2 * HOUR, loss=2.0) == "up"
    assert trainers.stream(51, "one", loss=2.0) == "up"  # its times are later


def test_nobody_without_a_name_moves_a_rank_of_which_a_process_asks():
    trainers = trained()
    assert [trainers.stream(step, "") for step in (50, 51, MAX_STEP)] == [
        NOMINAL,  # a second copy
        PROTOCOL_ERROR,
        PROTOCOL_ERROR,
    ]
    assert trainers.ask(51, loss=2.0) == "up"
    assert trainers.counts()["unnamed_beside_an_asking_process"] == 2


@pytest.mark.parametrize("way", ["ask", "stream"])
def test_what_came_first_without_a_name_is_no_past_of_a_process_that_is_behind_it(way):
    trainers = Trainers()
    trainers.stream(MAX_STEP, "")
    trainers.connect("one")
    assert getattr(trainers, way)(1, loss=2.0) == "up"


@pytest.mark.parametrize(("way", "most"), [("ask", HELD_LEAP), ("stream", FREE_LEAP)])
def test_a_streamed_step_far_ahead_is_refused_and_the_living_trainer_is_judged(way, most):
    trainers = trained(way=way)
    for step in (MAX_STEP, 50 + most + 1):
        assert trainers.stream(step) == PROTOCOL_ERROR
    assert getattr(trainers, way)(51, loss=2.0) == "up"
    assert trainers.counts()["step_leap"] == 2
    assert trainers.stream(51 + most) == NOMINAL


def test_a_leap_is_no_leap_where_time_and_pace_allow_it():
    trainers = trained(way="stream")
    trainers.wait(9 * SECOND)  # at 100 steps a second
    assert trainers.stream(50 + 901) == NOMINAL
    trainers.wait(HOUR)  # a Collector was away, and has dropped what it had
    assert trainers.stream(360_000) == NOMINAL


@pytest.mark.parametrize("apart", [1, 7, 1000, 100_000])
def test_a_stream_that_is_sampled_loses_no_step(apart):
    trainers = Trainers()
    for sample in range(1, 30):
        trainers.wait((apart - 1) * SECOND // 100)
        assert trainers.stream(sample * apart) == NOMINAL


def test_steps_of_a_tenth_of_a_millisecond_are_no_leaps_behind_a_hang():
    trainers = Trainers()
    for step in range(1, 20_000, 37):  # what a Collector passed on of each batch, all at once
        trainers.now += 3_700_000 - SECOND // 100
        assert trainers.stream(step) == NOMINAL


def test_what_goes_on_elsewhere_is_believed_when_nothing_else_comes():
    trainers = trained(way="stream")
    for step in range(10**9, 10**9 + 1100):  # eleven seconds of a process that resumed
        last = trainers.stream(step)
    assert last == NOMINAL
    assert trainers.counts()["judged"] >= 150


def test_whoever_asks_says_where_it_is():
    trainers = trained()
    assert trainers.ask(10**9, loss=2.0) == "up"
    assert trainers.ask(10**9 + 1, loss=2.0) == "up"


def test_an_ask_about_a_step_that_was_passed_over_is_told_that_nobody_judged_it():
    trainers = trained()
    assert trainers.stream(60) == NOMINAL
    assert trainers.ask(55) == PROTOCOL_ERROR
    assert trainers.ask(50) == NOMINAL  # it was judged
    assert trainers.counts()["late"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": -1}, "step_out_of_range"),
        ({"step": MAX_STEP + 1}, "step_out_of_range"),
        ({"time_unix_nano": -1}, "time_out_of_range"),
        ({"time_unix_nano": 1 << 62}, "time_out_of_range"),
        ({"rank": -1}, "rank_out_of_range"),
        ({"rank": 1 << 31}, "rank_out_of_range"),
        ({"run": "x" * (MAX_NAME + 1)}, "name_too_long"),
        ({"instance": "x" * (MAX_NAME + 1)}, "name_too_long"),
        ({"seeds": {"x" * (MAX_NAME + 1): {}}}, "name_too_long"),
        ({"seeds": {f"s{n}": {} for n in range(MAX_SEEDS_PER_FRAME + 1)}}, "too_many_seeds"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_by_name_and_leaves_nothing(change, reason):
    engine = Engine(TABLE)
    decision = engine.observe(structs.replace(frame(1, loss=2.0), **change))
    assert decision.reason == PROTOCOL_ERROR
    report = engine.overview()
    refused = {why: count for why, count in report["refused"].items() if count}
    assert (refused, report["ranks"], report["frames"]["bad"]) == ({reason: 1}, 0, 1)


def test_seeds_of_a_rank_are_bounded_also_when_all_of_them_change():
    engine = Engine(TABLE)
    for step in range(MAX_SEEDS_PER_FRAME):
        seeds = {f"{step}.{n}": {} for n in range(MAX_SEEDS_PER_FRAME)}
        engine.observe(frame(step, seeds))
        assert engine.overview()["seeds"] == min((step + 1) * NEW_AT_ONCE, MAX_SEEDS_PER_FRAME)


def test_of_very_many_new_seeds_some_are_judged_at_each_step_and_in_the_end_all():
    engine = Engine(TABLE)
    seeds = {f"s{n}": {"kasmina.seed.alpha": 0.0} for n in range(3 * NEW_AT_ONCE)}
    seeds[f"s{3 * NEW_AT_ONCE - 1}"] = {"kasmina.seed.alpha": 2.0}
    found = [engine.observe(frame(step, seeds)).reason for step in range(4)]
    assert found == [NOMINAL, NOMINAL, "odd", "odd"]


def test_seeds_of_all_ranks_are_bounded_and_those_who_ask_keep_theirs():
    engine = room_for(Engine(TABLE), seeds=25)
    engine.roster.introduce(("asks", 0), "one", 0, 0)
    seeds = {f"s{n}": {"kasmina.seed.alpha": 2.0} for n in range(10)}
    engine.observe(frame(1, seeds, run="asks"), asked=True)
    for number in range(20):
        assert engine.observe(frame(1, seeds, run=f"r{number}")).reason == "odd"
        assert engine.overview()["seeds"] <= 25
    assert engine.observe(frame(2, seeds, run="asks"), asked=True).reason == "odd"
    engine.roster.introduce(("r19", 0), "one", 0, 0)
    more = {f"t{n}": {} for n in range(10)}
    assert engine.observe(frame(1, more, run="late")).reason == PROTOCOL_ERROR


def test_a_flood_of_runs_forgets_neither_whoever_asks_nor_first_those_who_go_on():
    engine = room_for(Engine(TABLE), ranks=8)
    engine.roster.introduce(("asks", 0), "one", 0, 0)
    engine.observe(frame(1, run="asks"), asked=True)
    for step in (1, 2):
        engine.observe(frame(step, run="streams"))
    for number in range(100):
        engine.observe(frame(1, run=f"r{number}"))
    assert engine.latest("asks") is not None
    assert engine.latest("streams") is not None
    assert engine.overview()["ranks"] == 8
    assert engine.overview()["frames"]["runs_forgotten"] == 94


def test_steps_kept_for_the_other_ranks_are_bounded(monkeypatch):
    monkeypatch.setattr(peers, "MAX_POSTS", 400)
    engine = room_for(Engine(load("default")), peer_steps=1000)
    for run in range(9):
        for step in range(300):
            for rank in range(2):
                made = frame(step, run=f"r{run}", rank=rank, step_latency_ms=1.0)
                engine.observe(structs.replace(made, time_unix_nano=NOON))
        assert sum(board.posts for board in engine.roster._boards.values()) <= 402 * (run + 1)
    engine.tick(NOON)
    assert engine.overview()["peer_steps"] <= 1000
    assert engine.latest("r8") is not None


def test_a_run_that_is_forgotten_leaves_nothing():
    engine = room_for(Engine(load("default")), ranks=4)
    for number in range(200):
        for rank in range(3):
            engine.observe(frame(1, run=f"r{number}", rank=rank, step_latency_ms=1.0))
    kept = engine.roster
    assert len(kept.ranks) == 4
    assert set(kept._boards) == {run for run, _ in kept.ranks}
    assert sum(board.posts for board in kept._boards.values()) == 4


def test_there_is_room_for_fewer_ranks_where_a_table_looks_further_back():
    plain, longer = Engine(load("default")), Engine(load("default"), 96 << 20)
    room, half = plain.roster.capacity, longer.roster.capacity
    assert (room.ranks // 2, room.seeds // 2) == (half.ranks, half.seeds)
    assert room.ranks > 900
    assert Engine(TABLE).roster.capacity.ranks == MAX_RUNS
    for number in range(20):
        plain.observe(frame(1, run=f"r{number}"))
    plain.roster.capacity = room._replace(ranks=5)
    plain.tick(0)
    assert plain.overview()["ranks"] == 5
    assert plain.latest("r19") is not None


def test_of_more_ranks_than_there_is_room_for_those_there_are_keep_their_past():
    engine = room_for(Engine(TABLE), ranks=4)
    for step in range(1, 4):
        for number in range(4):
            assert engine.observe(frame(step, run=f"r{number}")).reason == NOMINAL
    for step in range(4, 7):
        for number in range(6):
            engine.observe(frame(step, run=f"r{number}"))
    report = engine.overview()
    assert report["frames"]["judged"] == 4 * 6
    assert report["refused"]["too_many_ranks"] == 2 * 3
    late = structs.replace(frame(7, run="r5"), time_unix_nano=HOUR)
    assert engine.observe(late).reason == NOMINAL  # the others have ended
    engine.roster.introduce(("asks", 0), "one", 0, HOUR)
    assert engine.observe(frame(1, run="asks"), at_ns=HOUR, asked=True).reason == NOMINAL


def test_what_is_kept_takes_no_more_memory_than_it_may():
    allowed = 3 << 18
    engine = Engine(load("default"), allowed)
    values = {key: 1.0 for key in STEP_KEYS if key not in ("step", "phase")}
    seeds = {f"s{n}": dict.fromkeys(SEED_KEYS, 0.5) for n in range(10)}
    for rank in range(5):  # one after the other, as many as there is room for
        engine.observe(frame(0, seeds, run="before", rank=rank, **values))
    tracemalloc.start()
    try:
        for step in range(1, 190):
            for rank in range(4):
                own = {key: value + (step * 37 + rank) % 101 for key, value in values.items()}
                engine.observe(frame(step, seeds if step > 186 else {}, rank=rank, **own))
        engine.tick(0)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 1.25 * allowed
    finally:
        tracemalloc.stop()
    room = engine.overview()["room_for"]
    assert engine.overview()["ranks"] <= room["ranks"] <= 4
    assert engine.overview()["seeds"] <= room["seeds"]


def test_ranks_come_and_go_while_all_are_gone_through():
    engine = Engine(TABLE)
    for number in range(6):
        engine.observe(frame(1, run=f"r{number}"))
    ranks = engine.roster.ranks
    parts = ranks.in_parts(2)
    seen = [run for (run, _), _ in next(parts)]
    for run in ("r0", "r3"):
        engine.roster._forget((run, 0))
    for run in ("new", "newer", "newest"):  # two of them where the others were
        engine.observe(frame(1, run=run))
    engine.observe(frame(2, run="r2"))  # heard of last now, and in its place
    for part in parts:
        assert all(ranks[key] is state for key, state in part)
        seen += [run for (run, _), _ in part]
    assert seen == ["r0", "r1", "r2", "new", "r4", "r5"]
    everything = [run for part in ranks.in_parts(3) for (run, _), _ in part]
    assert sorted(everything) == sorted(run for run, _ in ranks)
    assert len(everything) == len(ranks) == 7
