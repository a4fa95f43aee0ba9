"""What a tool that watches is shown of each rank: recent steps whole, older ones by choice."""

import math
from itertools import pairwise

import pytest

from esper_otel.leyline.decisions import Action
from esper_otel.leyline.wire import RecentRequest, encode
from esper_tamiyo.journaling.decision_log import DecisionLog
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import load
from esper_tamiyo.serving.recent_steps import (
    CHOSEN,
    CHOSEN_CUSTOM,
    FROM,
    GONE_NS,
    MOST_CUSTOM,
    MOST_RANKS,
    MOST_SEEDS,
    NEWEST,
    RecentSteps,
)
from sidecar.frames_made import frame


class Judged:
    """An engine that tells recent steps of what it judges."""

    def __init__(self, table="prototype"):
        self.log = DecisionLog()
        self.steps = RecentSteps(self.log)
        self.engine = Engine(load(table), observer=self.steps)

    def judge(self, *frames):
        for each in frames:
            self.engine.observe(each)

    def told(self, **request):
        return self.steps.recent(RecentRequest(**request), self.engine.roster.ranks, 10**6)


@pytest.fixture
def judged():
    return Judged()


def steps(told):
    return [int(row[0]) for row in told.rows]


def caught_up(judged, **request):
    """All the steps that somebody who asks until there are no more is told."""
    found, known, more = [], {}, True
    while more:
        told = judged.told(**request, **known)
        found += steps(told)
        known, more = {"instance": told.instance, "step": found[-1]}, told.more
    return found


def test_a_tool_is_told_each_step_once(judged):
    judged.judge(*(frame(step, loss=step / 2, forward_ms=3.0) for step in range(5)))
    told = judged.told()
    assert (told.run, told.rank, told.instance, told.more) == ("run", 0, "one", False)
    assert steps(told) == [0, 1, 2, 3, 4]
    row = dict(zip(told.columns, told.rows[3][2:], strict=True))
    assert (row["loss"], row["forward_ms"]) == (1.5, 3.0)
    assert math.isnan(row["gradient_norm"])
    assert told.rows[3][1] == 4.0  # when it ended
    judged.judge(frame(5, loss=1.0))
    assert steps(judged.told(instance="one", step=4)) == [5]
    assert steps(judged.told(instance="one", step=5)) == []


def test_the_newest_steps_are_all_there_and_of_the_older_ones_an_even_choice(judged):
    count = 20 * NEWEST
    judged.judge(*(frame(step) for step in range(count)))
    found = caught_up(judged)
    assert found == sorted(set(found))
    assert found[0] == 0
    assert found[-NEWEST:] == [*range(count - NEWEST, count)]
    older = found[:-NEWEST]
    gaps = {after - before for before, after in pairwise(older)}
    assert len(gaps) == 1
    assert CHOSEN / 4 <= len(older) <= CHOSEN


def test_another_process_of_the_rank_begins_anew(judged):
    judged.judge(*(frame(step) for step in range(5)))
    judged.judge(frame(1, instance="two"))
    told = judged.told(instance="one", step=4)
    assert (told.instance, steps(told)) == ("two", [1])


def test_ranks_are_told_of_with_the_run_that_was_asked_for_first(judged):
    judged.judge(frame(7, run="a", loss=0.5), frame(3, run="b", rank=1), frame(4, run="b"))
    told = judged.told()
    assert (told.run, told.rank, told.of) == ("b", 0, 3)
    assert [(each.run, each.rank, each.step) for each in told.ranks] == [
        ("b", 0, 4),
        ("b", 1, 3),
        ("a", 0, 7),
    ]
    assert told.ranks[2].loss == 0.5
    assert math.isnan(told.ranks[0].loss)
    assert [(each.state, each.action) for each in told.ranks] == [("healthy", "CONTINUE")] * 3
    assert judged.told(run="b", rank=5).rank == 0
    nobody = judged.told(run="c")
    assert (nobody.run, nobody.rows, nobody.decisions) == ("c", [], [])


def test_decisions_are_told_once_with_what_the_rule_saw(judged):
    judged.judge(frame(0, loss=1.0), frame(1, loss=1.5, loss_delta=0.5))
    (note,) = judged.told().decisions
    assert (note.number, note.step, note.action) == (1, 1, "PAUSE")
    assert (note.reason, note.of_update) == ("loss_spike", False)
    assert note.values == {"loss_delta": 0.5}
    assert judged.told(decision=1).decisions == []
    pause = judged.engine.latest()
    assert pause.action is Action.PAUSE
    judged.steps.note_check(pause, frame(2))
    assert [each.of_update for each in judged.told(decision=1).decisions] == [True]


def test_seeds_and_modes_are_told(judged):
    judged.steps.note_mode(("run", 0), "enforce")
    seeds = {"a": {"kasmina.seed.stage": 4.0, "kasmina.seed.alpha": 0.5}, "odd": {}}
    judged.judge(frame(1, seeds=seeds))
    told = judged.told()
    assert told.seeds == {"a": (4.0, 0.5)}
    assert told.ranks[0].mode == "enforce"
    judged.judge(frame(2, seeds={f"{nth}": seeds["a"] for nth in range(MOST_SEEDS + 1)}))
    assert judged.told().seeds == {}


def test_values_beyond_the_registry_take_no_memory(judged):
    many = {f"custom {nth}": 1.0 for nth in range(100)}
    judged.judge(frame(1, loss=0.5, **many))
    (kept,) = judged.steps._frames
    assert kept.values == {"loss": 0.5}
    assert judged.told().rows[0][2] == 0.5


def own(step, **values):
    """A step with values of the script's own."""
    return frame(step, custom_nonfinite=0.0, **{f"custom.{k}": v for k, v in values.items()})


def curve(judged, key):
    """All that somebody who asks until there is no more is told of one value."""
    found, known, more = [], {}, True
    while more:
        told = judged.told(**known)
        known, more = {"instance": told.instance, "step": int(told.rows[-1][0])}, told.more
        place = 2 + told.columns.index(key)
        found += [(int(r[0]), r[place]) for r in told.rows if not math.isnan(r[place])]
    return found


def test_values_of_the_scripts_own_are_told_however_rare_they_are(judged):
    count = 3 * NEWEST
    judged.judge(
        *(
            own(step, kl=step / 2, **({"val_loss": 9.0 + step} if step % 500 == 1 else {}))
            for step in range(count)
        )
    )
    told = curve(judged, "custom.val_loss")
    assert told == [(step, 9.0 + step) for step in range(1, count, 500)]
    often = curve(judged, "custom.kl")
    assert often[-NEWEST:] == [(step, step / 2) for step in range(count - NEWEST, count)]
    assert 0 < len(often) - NEWEST <= CHOSEN_CUSTOM
    # What else is told of these steps is what it was.
    assert steps(judged.told(instance="one", step=count - 3)) == [count - 2, count - 1]


def test_the_first_values_of_the_scripts_own_are_kept_and_of_another_process_its_own(judged):
    many = {f"nth {nth}": float(nth) for nth in range(100)}
    judged.judge(own(1, **many), own(2, **many))
    own_columns = [key for key in judged.told().columns if key.startswith("custom.")]
    assert own_columns == [f"custom.nth {nth}" for nth in range(MOST_CUSTOM)]
    assert [row[-1] for row in judged.told().rows] == [MOST_CUSTOM - 1.0] * 2
    judged.judge(frame(1, instance="two", custom_nonfinite=0.0, **{"custom.other": 1.0}))
    told = judged.told()
    assert told.columns[-1] == "custom.other"
    assert told.rows[0][-1] == 1.0


def test_of_many_ranks_the_first_are_told_and_the_number_of_all(judged):
    judged.judge(*(frame(1, rank=rank) for rank in range(MOST_RANKS + 1)))
    told = judged.told()
    assert [each.rank for each in told.ranks] == [*range(MOST_RANKS)]
    assert told.of == MOST_RANKS + 1


def test_what_is_kept_of_ranks_that_are_gone_makes_room(judged):
    for rank in range(MOST_RANKS):
        judged.judge(frame(FROM, rank=rank))
    later = FROM * (GONE_NS // FROM + 10)
    judged.judge(*(frame(step, run="later") for step in range(later, later + 4 * NEWEST)))
    assert len(judged.steps._chosen) == MOST_RANKS
    assert caught_up(judged, run="later")[0] == later


def test_the_longest_reply_fits_into_a_message(judged):
    name = "x" * 255
    seeds = {
        f"{nth}{name}"[:256]: {"kasmina.seed.stage": 4.0, "kasmina.seed.alpha": 0.5}
        for nth in range(64)
    }
    for step in range(200):
        own_values = {f"custom.{nth}{chr(0x10FFFF) * 99}": step / 7 for nth in range(9)}
        values = {"loss": step / 7, "loss_delta": 0.5, "custom_nonfinite": 0.0, **own_values}
        judged.judge(frame(step, run="r", seeds=seeds, **values))
    for rank in range(1, MOST_RANKS):
        judged.judge(frame(1, run="r", rank=rank))
    assert len(encode(judged.told())) < 64 * 1024


def test_what_hears_after_it_hears_all(judged):
    judged.judge(frame(0, loss=1.0), frame(1, loss=1.5, loss_delta=0.5))
    assert judged.log.waiting > 2
    assert judged.log.decisions["PAUSE", "HIGH", "loss_spike"] == 1
