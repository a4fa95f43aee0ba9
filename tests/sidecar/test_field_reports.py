"""What a run did after a decision: the outcome of a report, and when it is due."""

import pytest
from msgspec import structs

from esper_otel.leyline.decisions import Action, Decision, Severity
from esper_tamiyo.journaling.field_reports import QUIET_S, WINDOW, FieldReports
from esper_tamiyo.journaling.outcomes import OutcomeReports
from sidecar.frames_made import frame

NONE = None


def report_of(due):
    """The report of a run that nothing else is known of."""
    return OutcomeReports().report(due)


def decision(step, action=Action.PAUSE):
    return Decision(f"run/0/{step}", "run", step, step, action, Severity.HIGH, "loss_spike")


def values(step, loss, latency=5.0, nonfinite=0.0):
    """A frame with this loss, a little unsteady; None leaves it out."""
    told = {"step_latency_ms": latency, "loss_volatility": 0.01, "nonfinite": nonfinite}
    if loss is not None:
        told["loss"] = loss * (1 + 0.01 * (step % 3))
    return frame(step, **told)


def followed(before, during, after, at=40, **options):
    """The report about step ``at`` of a run whose loss was so; options are of the frames."""
    reports = FieldReports()
    done = []
    for step in range(at):
        done += reports.add_frame(values(step, before), 0.0)
    culprit = values(at, during, **options)
    done += reports.add_frame(culprit, 0.0)
    reports.add_decision(decision(at), culprit, "enforce")
    for step in range(at + 1, at + WINDOW + 1):
        done += reports.add_frame(values(step, after, **options), 0.0)
    (due,) = done
    return report_of(due)


@pytest.mark.parametrize(
    ("before", "during", "after", "outcome"),
    [
        (0.5, 3.0, 0.5, "improved"),  # back to what it was
        (0.5, 3.0, 1.5, "improved"),  # not back yet, and far better than it had been
        (0.5, 3.0, 3.0, "neutral"),
        (0.5, 3.0, 9.0, "worse"),
        (0.5, 0.5, 0.5, "neutral"),  # the loss was not what the decision was about
        (0.5, 0.5, 0.3, "improved"),
        (0.5, 0.5, 0.9, "worse"),
        (0.5, 0.5, 0.52, "neutral"),  # within a tenth
        (11.0, 70.0, 11.5, "improved"),
        (0.001, 0.009, 0.001, "improved"),
        (-2.0, 1.0, -2.0, "improved"),  # a log likelihood
        (0.5, 3.0, NONE, "inconclusive"),
        (NONE, NONE, NONE, "neutral"),  # the step time is all there is
    ],
)
def test_the_outcome(before, during, after, outcome):
    report = followed(before, during, after)
    assert report.outcome == outcome
    assert (report.observed, report.window) == (WINDOW, WINDOW)


def test_a_loss_that_is_not_finite_is_worse_while_it_lasts():
    assert followed(0.5, None, None, nonfinite=1.0).outcome == "worse"
    healed = followed(0.5, None, 0.5, nonfinite=1.0)
    assert (healed.outcome, healed.because) == ("improved", "loss is back to its earlier value")


def test_what_was_out_of_the_ordinary_is_what_the_report_is_about():
    reports = FieldReports()
    for step in range(40):
        reports.add_frame(values(step, 0.5), 0.0)
    slow = values(40, 0.5, latency=50.0)
    reports.add_frame(slow, 0.0)
    reports.add_decision(decision(40), slow, "advise")
    done = []
    for step in range(41, 73):
        done += reports.add_frame(values(step, 0.1, latency=48.0), 0.0)
    report = report_of(*done)
    assert (report.outcome, report.because) == ("stayed", "step_latency_ms is much the same")
    assert report.mode == "advise"


def test_the_medians_are_told():
    report = followed(0.5, 3.0, 0.7)
    assert report.before["loss"] == pytest.approx(0.505, rel=0.01)
    assert report.during["loss"] == pytest.approx(3.0, rel=0.05)
    assert report.after["loss"] == pytest.approx(0.705, rel=0.02)
    assert report.before.keys() == {"loss", "loss_volatility", "step_latency_ms"}


def followed_up_to(reports, at=10):
    for step in range(at + 1):
        reports.add_frame(values(step, 0.5), 0.0)
    reports.add_decision(decision(at), values(at, 3.0), "enforce")


def test_a_run_that_ends_is_inconclusive_and_says_how():
    ended = FieldReports()
    followed_up_to(ended)
    assert ended.expire(QUIET_S) == []
    report = report_of(*ended.expire(QUIET_S + 1))
    assert (report.outcome, report.because) == ("inconclusive", "the run sent no more steps")
    assert ended.pending == 0

    closed = FieldReports()
    followed_up_to(closed)
    assert [due.ended for due in closed.close()] == ["the sidecar ended"]

    replaced = FieldReports()
    followed_up_to(replaced)
    report = report_of(*replaced.add_frame(frame(0, instance="two"), 0.0))
    assert report.because == "the process was replaced by another"


def test_a_slow_run_has_more_time():
    reports = FieldReports()
    for step in range(11):
        reports.add_frame(values(step, 0.5, latency=30_000.0), 0.0)
    reports.add_decision(decision(10), values(10, 3.0), "enforce")
    assert reports.expire(QUIET_S * 5) == []
    assert len(reports.expire(20 * 30.0 + 1)) == 1


def test_of_many_runs_that_end_at_once_some_are_given_up_at_a_time():
    """Each call is made between two answers."""
    reports = FieldReports()
    for run in range(40):
        for step in range(4):
            reports.add_frame(structs.replace(values(step, 0.5), run=f"r{run}"), float(run))
        made = structs.replace(decision(3), run=f"r{run}")
        reports.add_decision(made, structs.replace(values(3, 3.0), run=f"r{run}"), "enforce")
    assert reports.pending == 40
    assert [due.run for due in reports.expire(QUIET_S + 2.5)] == ["r0", "r1", "r2"]
    for run in (3, 5):  # these go on
        reports.add_frame(structs.replace(values(4, 0.5), run=f"r{run}"), 30.0)
    given_up = [[due.run for due in reports.expire(QUIET_S + 50.0)] for _ in range(11)]
    assert [len(runs) for runs in given_up] == [4] * 9 + [1, 0]
    assert given_up[0][:3] == ["r4", "r6", "r7"]
    assert given_up[8][3:] + given_up[9] == ["r3", "r5"]
    assert reports.pending == 0


def test_steps_that_were_not_seen_are_not_invented():
    reports = FieldReports()
    followed_up_to(reports)
    reports.add_frame(values(11, 0.5), 0.0)
    report = report_of(*reports.add_frame(values(500, 0.5), 0.0))
    assert (report.outcome, report.observed) == ("inconclusive", 1)
    assert report.because == f"only 1 of {WINDOW} steps were seen"


def test_every_decision_has_its_own_report_and_a_continue_has_none():
    reports = FieldReports()
    done = []
    for step in range(120):
        seen = values(step, 0.5)
        done += reports.add_frame(seen, 0.0)
        if step in (50, 51):
            reports.add_decision(decision(step), seen, "enforce")
        else:
            reports.add_decision(decision(step, Action.CONTINUE), seen, "enforce")
    assert [report.step for report in done] == [50, 51]
    assert reports.pending == 0


def test_a_silence_behind_a_step_takes_nothing_from_its_report():
    reports = FieldReports()
    culprit = values(0, 1.0)
    reports.add_frame(culprit, 0.0)
    reports.add_decision(decision(0), culprit, "enforce")
    empty = structs.replace(culprit, values={}, time_unix_nano=99)
    reports.add_decision(decision(0, Action.CONTINUE), empty, "enforce")
    assert reports.pending == 1
    (due,) = reports.add_frame(values(WINDOW, 1.0), 0.0)
    assert (due.decision, due.action) == ("run/0/0", Action.PAUSE)


def test_the_last_word_about_a_step_counts():
    reports = FieldReports()
    followed_up_to(reports)
    reports.add_decision(decision(10, Action.SEED), values(10, 3.0), "enforce")
    assert reports.pending == 1
    report = report_of(*reports.close())
    assert report.action is Action.SEED


# What updates were made with.


def made(scales, skipped=(), at=40):
    """The report about step 40 of a run whose updates had these factors, the last of them to
    the end, and of which these were left out."""
    reports = FieldReports()
    done = []
    for step in range(at + WINDOW + 1):
        scale = scales[min(max(step - at, 0), len(scales) - 1)]
        told = {} if scale is None else {"lr_scale": scale}
        told["update_skipped"] = float(step in skipped)
        seen = frame(step, loss=1.0, **told)
        done += reports.add_frame(seen, 0.0)
        if step == at:
            reports.add_decision(decision(at, Action.OPTIMIZER), seen, "enforce")
    return report_of(*done)


@pytest.mark.parametrize(
    ("scales", "of_the_step", "since", "after"),
    [
        ((1.0,), 1.0, None, 1.0),
        ((1.0, 0.25), 1.0, 41, 0.25),
        ((1.0, 1.0, 0.25), 1.0, 42, 0.25),  # several ranks come to agree
        ((0.25, 0.0625), 0.25, 41, 0.0625),
        ((0.25,), 0.25, None, 0.25),
        ((0.25, 0.25, 0.5), 0.25, 42, 0.5),  # given back
        ((None,), None, None, None),
        ((None, 0.25), None, 41, 0.25),
    ],
)
def test_a_report_says_what_updates_were_made_with(scales, of_the_step, since, after):
    report = made(scales)
    assert (report.lr_scale, report.scaled_from, report.lr_scale_after) == (
        of_the_step,
        since,
        after,
    )
    assert (report.skipped, report.skipped_after, report.update) == (False, 0, False)


def test_a_report_counts_updates_that_were_left_out():
    report = made((1.0,), skipped=(3, 40, 41, 45))
    assert (report.skipped, report.skipped_after) == (True, 2)


def check(step):
    one = decision(step, Action.OPTIMIZER)
    return structs.replace(one, id=f"{one.id}/update", parameters={"skip_step": 1.0})


def test_a_decision_about_an_update_is_reported_with_the_step_it_was_about():
    reports = FieldReports()
    done = []
    for step in range(10 + WINDOW + 1):
        if step == 10:
            known = frame(step, loss=9.0, lr_scale=0.25)
            reports.add_check(check(step), known, "enforce")
            assert reports.pending == 1
        seen = frame(step, loss=1.0, lr_scale=1.0, update_skipped=float(step == 10))
        done += reports.add_frame(seen, 0.0)
        if step == 10:  # the step itself has a decision of its own
            reports.add_decision(decision(step), seen, "enforce")
    of_update, of_step = map(report_of, done)
    assert (of_update.decision, of_update.update) == ("run/0/10/update", True)
    assert (of_update.skipped, of_update.lr_scale) == (True, 1.0)
    assert (of_step.decision, of_step.update, of_step.skipped) == ("run/0/10", False, True)


def test_of_an_update_whose_step_never_came_nothing_is_known():
    reports = FieldReports()
    reports.add_frame(values(0, 1.0), 0.0)
    reports.add_check(check(1), frame(1, loss=1.0, lr_scale=0.25), "enforce")
    reports.add_check(check(1), frame(1, loss=1.0, lr_scale=0.25), "enforce")  # once more
    (due,) = reports.expire(QUIET_S + 1)
    report = report_of(due)
    assert (report.outcome, report.lr_scale, report.skipped) == ("inconclusive", None, None)
    assert reports.pending == 0

    passed = FieldReports()
    passed.add_frame(values(0, 1.0), 0.0)
    passed.add_check(check(1), frame(1, loss=1.0, lr_scale=0.25), "enforce")
    passed.add_frame(values(2, 1.0), 0.0)
    (report,) = map(report_of, passed.add_frame(values(40, 1.0), 0.0))
    assert (report.step, report.lr_scale, report.skipped) == (1, None, None)


def test_a_check_of_a_rank_that_is_not_known_has_no_report():
    reports = FieldReports()
    reports.add_check(check(1), frame(1, loss=1.0), "enforce")
    assert reports.pending == 0
