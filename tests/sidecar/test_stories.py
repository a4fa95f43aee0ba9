"""Finding a decision in the journal, with all that belongs to it."""

import pytest

from esper_otel.leyline.decisions import Action
from esper_tamiyo.journaling.stories import UnknownDecisionError, find_decision
from sidecar.entries_made import changed, decided, found, table
from sidecar.journals_made import JOURNAL, NOTICED, notice


def test_the_latest_is_that_of_the_journal_or_of_a_run():
    assert find_decision(JOURNAL, "latest").decision.id == "another/0/7"
    assert find_decision(JOURNAL, "latest", "run").decision.id == "run/0/61"


def test_of_two_decisions_with_one_id_the_last_is_explained():
    again = decided(61, mode="advise")
    story = find_decision([*JOURNAL, again], "run/0/61")
    assert story.decision == again
    assert story.report is None


def test_another_seed_that_is_let_go_of_does_not_end_it():
    about_s1 = decided(61, target_seed="s1")
    of_s2, of_s1 = changed(70, seed_id="s2"), changed(80, seed_id="s1")
    assert find_decision([about_s1, of_s2], "run/0/61").ended is None
    assert find_decision([about_s1, of_s2, of_s1], "run/0/61").ended == 80


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("run/0/22", "similar ids are run/0/20, run/0/61"),
        ("rum/0/61", "run/0/61"),
        ("another/0/9", "similar ids are another/0/7"),
        ("", "similar ids are"),
        ("run/0/x", "similar ids are run/0/61, run/0/20"),
        ("run/0/" + "9" * 5000, "similar ids are"),
        ("run/0/²", "similar ids are"),
    ],
)
def test_an_unknown_id_is_told_with_those_near_it(wanted, near):
    with pytest.raises(UnknownDecisionError, match="no such decision") as caught:
        find_decision(JOURNAL, wanted)
    assert near in str(caught.value)


def test_an_id_without_a_step_is_no_worse_than_another():
    with pytest.raises(UnknownDecisionError, match="similar ids are run/0/x, run/0/20"):
        find_decision([*JOURNAL, decided(5, id="run/0/x")], "run/0/3")


def test_a_decision_about_an_update_is_among_those_that_are_known():
    update = decided(61, id="run/0/61/update", update=True)
    with pytest.raises(UnknownDecisionError, match="similar ids are run/0/61/update, run/0/20"):
        find_decision([decided(20), update], "run/0/60")
    with pytest.raises(UnknownDecisionError, match=r"it knows run$"):
        find_decision([update], "latest", "nobody")


def test_where_there_is_nothing_to_explain_the_runs_that_are_known_are_told():
    with pytest.raises(UnknownDecisionError, match="no decision other than CONTINUE yet"):
        find_decision([table()], "latest")
    with pytest.raises(UnknownDecisionError, match="about run nobody; it knows another, run"):
        find_decision(JOURNAL, "latest", "nobody")


def test_a_notice_is_explained_at_each_step_at_which_it_goes_on():
    for step in (40, 41, 59):
        assert find_decision(NOTICED, f"run/0/{step}").decision.step == 40
    for wanted in ("run/0/39", "run/0/60", "run/1/41", "other/0/41", "run/0/41/update"):
        with pytest.raises(UnknownDecisionError):
            find_decision(NOTICED, wanted)
    acted = [*NOTICED[:2], decided(50), *NOTICED[2:]]
    assert find_decision(acted, "run/0/50").decision.action is Action.PAUSE
    assert find_decision(acted, "run/0/51").decision.step == 40


def test_a_notice_of_silence_does_not_hide_what_was_decided_about_its_step():
    behind = [decided(40), notice(40, "quiet")]
    assert find_decision(behind, "run/0/40").decision.action is Action.PAUSE
    again = [decided(40), notice(40, "quiet", instance="two")]
    assert find_decision(again, "run/0/40").decision.action is Action.CONTINUE


def test_the_latest_is_not_that_a_run_fell_silent_where_there_is_anything_else():
    silent = notice(80, "quiet", findings=[found("quiet", **{"step": 80.0, "silent(s)": 12.0})])
    assert find_decision([silent], "latest").decision == silent
    assert find_decision([silent, decided(81)], "latest").decision.step == 81
    assert find_decision([decided(79), silent], "latest").decision.step == 79
    assert find_decision([decided(79), silent], "run/0/80").decision == silent
    assert find_decision([decided(79), notice(80, "jump")], "latest").decision.step == 80
