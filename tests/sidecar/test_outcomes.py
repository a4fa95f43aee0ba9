"""What a report says where nothing was done, and where something was what else it says."""

import pytest

from esper_otel.leyline.decisions import Action, Decision, Finding, Severity
from esper_tamiyo.journaling.field_reports import WINDOW, FieldReports
from esper_tamiyo.journaling.outcomes import (
    MAX_EXCURSIONS,
    MAX_RUNS,
    OutcomeReports,
    applied,
)
from sidecar.frames_made import frame

SAW = {"loss": 3.0, "baseline(loss)": 0.5, "scatter(loss)": 0.1}


class Run:
    """A run whose loss is usual but for excursions, and the reports about those."""

    def __init__(self, name="run", reports=None, ranks=1):
        self.reports = reports or OutcomeReports()
        self.fields = FieldReports()
        self.name = name
        self.step = 0
        self.ranks = ranks
        self.made = []
        self.usual(WINDOW)

    def usual(self, steps, loss=0.5, **values):
        for _ in range(steps):
            self._see(loss, **values)

    def excursion(
        self, after=0.5, mode="advise", action=Action.OPTIMIZER, then=None, seeds=None, **values
    ):
        """A loss of 3 that is decided about; ``then`` is how updates behind it are made."""
        step = self.step
        for seen in self._see(3.0, seeds, **values):
            finding = Finding("spike", action, Severity.HIGH, "", SAW)
            decision = Decision(
                f"{self.name}/{seen.rank}/{step}",
                self.name,
                step,
                step,
                action,
                Severity.HIGH,
                "nominal" if action is Action.CONTINUE else "spike",
                [finding],
                parameters={"lr_scale": 0.5} if action is Action.OPTIMIZER else {},
            )
            self.fields.add_decision(decision, seen, mode)
        made = len(self.made)
        self.usual(WINDOW, after, **(then or {"lr_scale": 1.0}))
        self.usual(WINDOW)
        return self.made[made]

    def _see(self, loss, seeds=None, **values):
        told = {"lr_scale": 1.0, **values}
        if told["lr_scale"] is None:
            del told["lr_scale"]
        seen = [
            frame(
                self.step,
                seeds,
                run=self.name,
                rank=rank,
                loss=loss * (1 + 0.01 * (self.step % 3)),
                **told,
            )
            for rank in range(self.ranks)
        ]
        for each in seen:
            self.made += map(self.reports.report, self.fields.add_frame(each, 0.0))
        self.step += 1
        return seen


SCALED = {"lr_scale": 0.5}


@pytest.mark.parametrize(
    ("after", "outcome"), [(0.5, "came_back"), (3.0, "stayed"), (9.0, "got_worse")]
)
@pytest.mark.parametrize("action", [Action.OPTIMIZER, Action.PAUSE, Action.CONTINUE])
def test_where_nothing_was_done_nothing_improved(after, outcome, action):
    report = Run().excursion(after, action=action)
    assert (report.outcome, report.applied, report.comparison) == (outcome, False, "")
    assert (report.rule, report.saw) == ("spike", SAW)


@pytest.mark.parametrize(
    ("after", "outcome"), [(0.5, "improved"), (3.0, "neutral"), (9.0, "worse")]
)
def test_without_excursions_that_were_left_alone_nobody_can_say(after, outcome):
    report = Run().excursion(after, mode="enforce", then=SCALED)
    assert (report.outcome, report.applied) == (outcome, True)
    assert report.comparison == (
        "no such excursion of this run was without an action, so the effect of the action is "
        "unknown"
    )
    assert (report.left_alone, report.came_back) == (0, 0)


def test_an_action_is_compared_with_what_excursions_did_when_left_alone():
    run = Run()
    for after in (0.5, 0.5, 3.0, 0.5):
        run.excursion(after)
    run.excursion(0.5, action=Action.CONTINUE)
    report = run.excursion(0.5, mode="enforce", then=SCALED)
    assert report.outcome == "improved"
    assert report.comparison == "4 of 5 such excursions of this run came back by themselves"
    assert (report.left_alone, report.came_back) == (5, 4)
    assert run.excursion(0.5, mode="enforce", then=SCALED).left_alone == 5, "it was not"


def test_each_run_is_compared_with_itself():
    reports = OutcomeReports()
    Run("one", reports).excursion()
    assert Run("two", reports).excursion(mode="enforce", then=SCALED).left_alone == 0


def test_an_excursion_of_several_ranks_rules_and_steps_counts_once():
    run = Run(ranks=3)
    run.excursion()
    assert run.excursion(mode="enforce", then=SCALED).left_alone == 1


def test_what_is_compared_is_the_metric_that_the_outcome_rests_on():
    run = Run()
    run.excursion()
    run.usual(WINDOW, step_latency_ms=5.0)
    step = run.step
    (seen,) = run._see(0.5, step_latency_ms=90.0)
    decision = Decision(
        f"run/0/{step}", "run", step, step, Action.OPTIMIZER, Severity.HIGH, "slow"
    )
    run.fields.add_decision(decision, seen, "enforce")
    run.usual(WINDOW, step_latency_ms=5.0, lr_scale=0.5)
    report = run.made[-1]
    assert (report.outcome, report.because) == (
        "improved",
        "step_latency_ms is back to its earlier value",
    )
    assert report.left_alone == 0


def test_where_nothing_was_out_of_the_ordinary_there_is_nothing_to_compare():
    run = Run()
    run.excursion()
    step = run.step
    (seen,) = run._see(0.5)
    decision = Decision(
        f"run/0/{step}", "run", step, step, Action.OPTIMIZER, Severity.HIGH, "slow"
    )
    run.fields.add_decision(decision, seen, "enforce")
    run.usual(WINDOW, 0.3, lr_scale=0.5)
    report = run.made[-1]
    assert report.outcome == "improved"
    assert report.comparison.startswith("no value was unusual, so the effect")


def test_a_better_loss_without_an_excursion_did_not_come_back():
    run = Run()
    step = run.step
    (seen,) = run._see(0.5)
    finding = Finding("hint", Action.CONTINUE, Severity.WARNING, "", SAW)
    decision = Decision(
        f"run/0/{step}",
        "run",
        step,
        step,
        Action.CONTINUE,
        Severity.NORMAL,
        "nominal",
        [finding],
    )
    run.fields.add_decision(decision, seen, "enforce")
    run.usual(WINDOW, 0.3)
    assert run.made[-1].outcome == "got_better"
    assert run.excursion(mode="enforce", then=SCALED).left_alone == 0


@pytest.mark.parametrize(
    ("mode", "action", "how", "expected"),
    [
        ("advise", Action.OPTIMIZER, {}, False),
        ("advise", Action.PAUSE, {"seeds": {"s": {}}}, False),
        ("enforce", Action.OPTIMIZER, {"then": SCALED}, True),
        ("enforce", Action.OPTIMIZER, {}, False),  # it was at its lowest bound
        ("enforce", Action.OPTIMIZER, {"then": {"update_skipped": 1.0}}, True),
        ("enforce", Action.OPTIMIZER, {"lr_scale": 0.5, "then": SCALED}, True),
        ("enforce", Action.PAUSE, {}, False),
        ("enforce", Action.PAUSE, {"seeds": {"s": {}}}, True),
        ("enforce", Action.CONTINUE, {}, False),
        ("enforce", Action.CONTINUE, {"then": SCALED}, True),  # by another decision
        ("", Action.OPTIMIZER, {}, False),
        ("", Action.OPTIMIZER, {"lr_scale": None, "then": {"lr_scale": None}}, None),
    ],
)
def test_what_counts_as_done(mode, action, how, expected):
    report = Run().excursion(mode=mode, action=action, **how)
    assert report.applied is expected
    if expected is None:
        assert (report.outcome, report.comparison) == (
            "improved",
            "whether anything was applied is not known",
        )


def test_a_run_that_ended_teaches_nothing():
    run = Run()
    step = run.step
    (seen,) = run._see(3.0)
    decision = Decision(
        f"run/0/{step}", "run", step, step, Action.OPTIMIZER, Severity.HIGH, "spike"
    )
    run.fields.add_decision(decision, seen, "advise")
    (due,) = run.fields.close()
    assert applied(due) is False
    report = run.reports.report(due)
    assert (report.outcome, report.because) == ("inconclusive", "the sidecar ended")
    run.usual(WINDOW)
    assert run.excursion(mode="enforce", then=SCALED).left_alone == 0


def test_what_is_remembered_is_bounded():
    run = Run()
    for _ in range(MAX_EXCURSIONS + 3):
        run.excursion()
    assert run.excursion(mode="enforce", then=SCALED).left_alone == MAX_EXCURSIONS
    for number in range(MAX_RUNS):
        Run(f"other-{number}", run.reports, ranks=0).reports.report(_due_of(f"other-{number}"))
    assert run.excursion(mode="enforce", then=SCALED).left_alone == 0


def _due_of(name):
    run = Run(name)
    step = run.step
    (seen,) = run._see(3.0)
    decision = Decision(
        f"{name}/0/{step}", name, step, step, Action.OPTIMIZER, Severity.HIGH, "spike"
    )
    run.fields.add_decision(decision, seen, "advise")
    return run.fields.close()[0]
