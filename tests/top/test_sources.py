"""What a sidecar tells becomes curves and decisions, whatever happens in between."""

from math import nan

import pytest

from esper_otel.leyline.tool_requests import NoAnswerError
from esper_otel.leyline.wire import DecisionNote, RankNow, Recent, Refusal
from esper_otel.top import sources
from esper_otel.top.sources import SidecarSource

COLUMNS = ["loss", "nonfinite"]


def now(step, run="r", rank=0, at=0, loss=1.0):
    words = ("healthy", "", "advise", "CONTINUE", "nominal")
    return RankNow(run, rank, step, at or step, *words, loss, nan)


def recent(*rows, ranks=(), run="r", instance="one", more=False, seeds=(), decisions=()):
    return Recent(
        ranks=list(ranks) or [now(rows[-1][0] if rows else 0)],
        of=1,
        run=run,
        rank=0,
        instance=instance,
        columns=COLUMNS,
        rows=[[step, step * 1e9, loss, broken] for step, loss, broken in rows],
        more=more,
        seeds=dict(seeds),
        decisions=list(decisions),
    )


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Runs of a sidecar that replies what ``replies`` has, and what it was asked."""
    replies, asked = [], []

    def reply_to(request, path, patience_s):
        asked.append(request)
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(sources, "reply_to", reply_to)
    return SidecarSource(tmp_path / "t.sock"), replies, asked


def losses(runs, name="r"):
    run = next(run for run in runs.runs() if run.name == name)
    steps, values = run.lead.curve("loss").points()
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def test_it_asks_until_there_are_no_more_and_then_for_what_is_new(told):
    runs, replies, asked = told
    replies += [recent((1, 2.0, 0), (2, 1.5, 0), more=True), recent((3, 1.0, 0))]
    assert runs.refresh("", 0, 0.0)
    assert (asked[1].run, asked[1].instance, asked[1].step) == ("r", "one", 2)
    assert losses(runs) == {1: 2.0, 2: 1.5, 3: 1.0}
    replies.append(recent(ranks=[now(3)]))
    assert not runs.refresh("", 0, 0.5)
    assert asked[-1].step == 3


def test_a_value_that_was_not_finite_is_a_gap_and_one_that_is_absent_is_none(told):
    runs, replies, _ = told
    replies.append(recent((1, 2.0, 0), (2, nan, 1), (3, nan, 0), (4, 1.0, 0)))
    runs.refresh("", 0, 0.0)
    found = losses(runs)
    assert list(found) == [1, 2, 4]
    assert found[2] != found[2]


def test_values_of_the_scripts_own_are_curves_without_gaps_that_come_next_to_the_first(told):
    runs, replies, _ = told
    rows = [(1, 2.0, 0.0, nan), (2, 1.0, 0.0, 0.5), (3, nan, 1.0, nan), (4, 1.0, 0.0, 0.25)]
    replies.append(
        Recent(
            ranks=[now(4)],
            of=1,
            run="r",
            rank=0,
            instance="one",
            columns=[*COLUMNS, "custom.val_loss"],
            rows=[[row[0], row[0] * 1e9, *row[1:]] for row in rows],
            more=False,
            seeds={},
            decisions=[],
        )
    )
    runs.refresh("", 0, 0.0)
    lead = runs.runs()[0].lead
    steps, values = lead.curve("custom.val_loss").points()
    assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == {2: 0.5, 4: 0.25}
    assert lead.keys() == ["loss", "custom.val_loss", "nonfinite"]


def test_another_process_has_curves_of_its_own(told):
    runs, replies, _ = told
    replies += [recent((1, 2.0, 0)), recent((0, 9.0, 0), instance="two")]
    runs.refresh("", 0, 0.0)
    runs.refresh("", 0, 0.5)
    assert losses(runs) == {0: 9.0}


def test_until_somebody_chooses_it_is_the_run_that_was_heard_of_last(told):
    runs, replies, asked = told
    replies += [recent((1, 2.0, 0), ranks=[now(1, at=5), now(7, "s", at=9)])] * 2
    runs.refresh("", 0, 0.0)
    assert [run.name for run in runs.runs()] == ["r", "s"]
    runs.refresh("", 0, 0.5)
    assert asked[-1].run == "s"


def test_decisions_are_kept_with_what_the_trainer_does_with_them(told):
    runs, replies, asked = told
    note = DecisionNote(7, 0, 1, 5, "PAUSE", "HIGH", "spike", False, "It leapt.", {"loss": 2.0})
    replies += [recent((1, 2.0, 0), decisions=[note]), recent(ranks=[now(1)])]
    runs.refresh("r", 0, 0.0)
    (ruling,) = runs.runs()[0].rulings
    assert (ruling.step, ruling.action, ruling.mode) == (1, "PAUSE", "advise")
    assert ruling.findings[0].values == {"loss": 2.0}
    runs.refresh("r", 0, 0.5)
    assert asked[-1].decision == 7
    assert runs.runs()[0].decided == 1


def test_seeds_are_known_from_step_to_step(told):
    runs, replies, _ = told
    replies += [
        recent((1, 2.0, 0), seeds={"a": (3.0, 0.0)}),
        recent((2, 2.0, 0), seeds={"a": (4.0, 0.5)}),
    ]
    runs.refresh("", 0, 0.0)
    runs.refresh("", 0, 0.5)
    (seed,) = runs.runs()[0].lead.seeds()
    assert [(stage.name, since) for stage, since in seed.stages] == [
        ("TRAINING", 1),
        ("BLENDING", 2),
    ]
    assert seed.alpha == 0.5


def test_a_sidecar_that_does_not_answer_is_a_problem_until_it_does(told):
    runs, replies, _ = told
    replies.append(recent((1, 2.0, 0)))
    runs.refresh("", 0, 0.0)
    replies += [NoAnswerError("it hangs"), NoAnswerError("it hangs")]
    assert runs.refresh("", 0, 0.5)
    assert runs.problem == "it hangs"
    assert not runs.refresh("", 0, 1.0)
    assert losses(runs) == {1: 2.0}
    replies.append(recent(ranks=[now(1)]))
    assert runs.refresh("", 0, 1.5)
    assert runs.problem == ""


def test_an_older_sidecar_is_told_apart_from_none(told):
    runs, replies, _ = told
    replies.append(Refusal("not a message of protocol 1"))
    runs.refresh("", 0, 0.0)
    assert "older than this esper-otel, restart it" in runs.problem
