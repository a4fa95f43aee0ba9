"""What it takes for a rule to fire, and to stop: states by observation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.decisions import Action, Severity
from esper_tamiyo.judging.rule_status import RuleStatus
from esper_tamiyo.judging.rules import compiled
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.table import Condition, Rule

LETTERS = {
    "inactive": ".",
    "pending": "p",
    "firing": "F",
    "recovering": "r",
    "unknown": "?",
}
VERDICTS = {"1": True, "0": False, "_": None}


def entry(persistence=1, of=None, release=None):
    return compiled(
        Rule(
            id="a",
            when=Condition("loss", Operator.ABOVE, 2.0, release=release),
            action=Action.PAUSE,
            severity=Severity.HIGH,
            text="",
            persistence=persistence,
            of=of or persistence,
        )
    )


def states(rule, observations):
    """A letter per observation: above the number (1), between release and it (~), below
    both (0), unknown (_)."""
    status = RuleStatus()
    told = ""
    for observation in observations.replace(" ", ""):
        verdict = VERDICTS.get(observation, False)
        kept = None if observation == "_" else observation in "1~"
        status.enter(status.advance(rule, verdict, kept), 0)
        told += LETTERS[status.state]
    return told


@pytest.mark.parametrize(
    ("rule", "seen", "told"),
    [
        (entry(), "0110", ".FF."),
        (entry(), "_0_1_0", "?.?F?."),
        (entry(persistence=3), "11011110", "pp.ppFF."),
        # unknown neither counts nor starts anew
        (entry(persistence=2), "1_1_0_1", "p?F?.?p"),
        # two of the last four, but only an observation that holds makes it fire
        (entry(persistence=2, of=4), "10011000 0", "pppFFrrp ."),
        (entry(persistence=2, of=4), "10010010", "pppFppFp"),
        (entry(persistence=2, of=3), "1_0_1", "p?p?F"),
        # until it is below the release as well
        (entry(release=1.0), "1~~~0~1", "Frrr..F"),
        (entry(release=1.0), "1_~_0", "F?r?."),
        (entry(persistence=2, release=1.0), "1~11~~1~0 1", "p.pFrrFr. p"),
        (entry(persistence=2, of=4, release=1.0), "11~~~~~~0 1", "pFrrrrrr. p"),
        # what was seen before the release is settled, and makes it fire no second time
        (entry(persistence=2, of=4, release=1.0), "1101", "pF.p"),
    ],
)
def test_states(rule, seen, told):
    assert states(rule, seen) == told.replace(" ", "")


@given(st.text(alphabet="10_", max_size=60), st.integers(1, 5), st.integers(0, 6))
def test_it_fires_when_n_of_the_last_m_hold_and_this_one_does(seen, persistence, more):
    rule = entry(persistence=persistence, of=persistence + more)
    told = states(rule, seen)
    known = ""
    for observation, state in zip(seen, told, strict=True):
        if observation == "_":
            assert state == "?"
            continue
        known += observation
        enough = known[-(persistence + more) :].count("1") >= persistence
        assert (state in "Fr") >= (enough and observation == "1")
        assert (state == "F") == (enough and observation == "1")
        if not enough:
            assert state in ".p"


@given(st.text(alphabet="1~0_", max_size=60), st.integers(1, 3))
def test_with_a_release_it_ends_only_below_it(seen, persistence):
    told = states(entry(persistence=persistence, release=1.0), seen)
    for before, observation, after in zip(told, seen[1:], told[1:], strict=False):
        if before in "Fr" and after in ".p":
            assert observation == "0"


@given(
    st.lists(st.sampled_from("1~0_"), min_size=1, max_size=60),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([None, 1.0]),
)
def test_a_look_ahead_says_what_would_be_and_changes_nothing(seen, persistence, more, release):
    rule = entry(persistence=persistence, of=persistence + more, release=release)
    status, untouched = RuleStatus(), RuleStatus()
    for observation in seen:
        for ahead in "1~0_":
            status.peek(rule, VERDICTS.get(ahead, False), ahead in "1~")
        verdict = VERDICTS.get(observation, False)
        kept = None if observation == "_" else observation in "1~"
        expected = status.peek(rule, verdict, kept)
        for one in (status, untouched):
            assert one.advance(rule, verdict, kept) is expected
            one.enter(expected, 0)
        assert all(
            getattr(status, name) == getattr(untouched, name) for name in RuleStatus.__slots__
        )


def test_what_is_forgotten_begins_anew():
    status, rule = RuleStatus(), entry(persistence=2)
    for _ in range(3):
        status.enter(status.advance(rule, True, None), 0)
    status.reset()
    status.enter(status.advance(rule, True, None), 0)
    assert (status.state, status.active) == ("pending", False)
