"""Conditions on records in rules: when they are known, what they compare, what they keep."""

import pytest

from esper_otel.leyline.decisions import NOMINAL, WARMING_UP
from esper_tamiyo.journaling.entries import table_entry
from esper_tamiyo.journaling.expectations import as_yaml, expected, passing
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.excursions import AGO
from esper_tamiyo.language.lint import doubts
from esper_tamiyo.language.table import Condition, Group, conditions
from esper_tamiyo.language.table_file import TableError, TableSource, parse
from sidecar.frames_made import frame
from sidecar.records_made import KNOWN_AFTER, TOP, steady, wobble

QUIET = (NOMINAL, WARMING_UP)
"""Reasons of a decision where no rule fired."""

FAR = "id: far, metric: loss, above_record: 1"


def table(*rules, top=TOP):
    rest = "severity: HIGH, action: PAUSE"
    lines = "".join(f"- {{{rule}, {rest}}}\n" for rule in rules)
    head = f"version: t\nbaseline: {{window: 8, warmup: 4}}\n{top}"
    return parse(TableSource("t", f"{head}\nrules:\n{lines}".encode()))


def faults(*rules, top=TOP):
    try:
        table(*rules, top=top)
    except TableError as error:
        return [line.split(": ", 1)[1] for line in str(error).splitlines()]
    return []


def warm(*rules, top=TOP, steps=KNOWN_AFTER):
    """An engine to which a run is known."""
    engine = Engine(table(*rules, top=top))
    for one in steady(steps):
        assert engine.observe(one).reason in QUIET
    return engine


def reasons(engine, losses, start=KNOWN_AFTER, **also):
    found = (
        engine.observe(frame(step, loss=loss, **also)).reason
        for step, loss in enumerate(losses, start)
    )
    return [NOMINAL if reason in QUIET else reason for reason in found]


def excursions(engine, below=False):
    return engine._runs["run", 0]._rank.history.excursions["loss", below]


# What fires.


def test_unknown_during_warm_up_and_then_not():
    engine = Engine(table(FAR))
    assert reasons(engine, [1.0, 50.0] * 10, 0) == [NOMINAL] * 20
    assert {rule["state"] for rule in engine.overview()["runs"][0]["rules"]} <= {"unknown"}
    assert reasons(warm(FAR), [50.0]) == ["far"]


def test_what_is_within_the_record_does_not_fire():
    engine = warm(FAR)
    bound = excursions(engine).bound((1, 1), 1.0)
    assert reasons(engine, [bound]) == [NOMINAL]
    engine = warm(FAR)
    assert reasons(engine, [bound * 1.001]) == ["far"]


def test_the_number_counts_times_what_the_record_explains():
    one, three = warm(FAR), warm(FAR.replace("above_record: 1", "above_record: 3"))
    level = excursions(one).level
    way = excursions(one).bound((1, 1), 1.0) - level
    assert reasons(one, [level + 2.9 * way]) == ["far"]
    assert reasons(three, [level + 2.9 * way, level + 3.1 * way]) == [NOMINAL, "far"]


def test_below_looks_at_the_other_side():
    engine = warm("id: sunk, metric: loss, below_record: 1", FAR)
    bound = excursions(engine, below=True).bound((1, 1), 1.0)
    assert bound < excursions(engine, below=True).level < excursions(engine).bound((1, 1), 1.0)
    assert reasons(engine, [bound + 0.001, bound - 0.001]) == [NOMINAL, "sunk"]


def test_a_rule_looks_at_the_record_of_as_many_values_at_once_as_it_wants():
    """One outlier, however large, says nothing of three of four."""
    alone, lasting = FAR, "id: lasting, metric: loss, above_record: 1, for: 3, of: 4"
    (rule,) = table(lasting).rules
    assert rule.when.hold == (3, 4)
    engine = Engine(table(alone, lasting))
    for one in steady(400):
        outlier = 60.0 if one.step > KNOWN_AFTER and not one.step % 20 else 0.0
        engine.observe(frame(one.step, loss=one.values["loss"] + outlier))
    records = excursions(engine).records
    assert records[1, 1].bound > 20 > 6 > records[3, 4].bound
    level, scatter = excursions(engine).level, excursions(engine).scatter
    value = level + scatter * 1.1 * records[3, 4].bound
    assert reasons(engine, [value] * 3, 400) == [NOMINAL, NOMINAL, "lasting"]


def test_conditions_in_groups_know_the_hold_of_their_rule():
    (rule,) = table(
        "id: a, for: 2, of: 5, any: [{metric: loss, above_record: 1}, {all: [{metric: loss, "
        "below_record: 1}, {metric: loss, above: 1}]}]"
    ).rules
    assert [part.hold for part in conditions(rule.when)] == [(2, 5), (2, 5), (1, 1)]


@pytest.mark.parametrize(
    ("losses", "fired"),
    [
        ([5.0] * 12, []),  # jumps and stays
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], []),  # jumps and falls
        ([5.0, 5.1, 5.2, 9.0, 9.0], [3, 4]),  # goes on
        ([9.0, 5.0, 5.0, 8.0, 9.01, 12.0], [5]),  # beyond the farthest of the first, not before
        ([5.0, 5.0, wobble(42), 9.0, 9.5], [3, 4]),  # with one in between
        ([5.0] * 3 + [9.0] * 30, [*range(3, 4 + AGO)]),  # stays where it has come to
        ([5.0] * 3 + [12.0] * 2 + [9.0] * 30, [*range(3, 4 + AGO)]),  # falls back from there
        ([5.0] * 3 + [9.0] * 30 + [9.5] * 2, [*range(3, 4 + AGO), 33, 34]),  # goes on after all
    ],
)
def test_rising_is_what_goes_on_beyond_the_first_values_of_an_excursion(losses, fired):
    engine = warm(FAR.replace("above_record: 1", "above_record: 1, rising: true"))
    found = reasons(engine, losses)
    assert [place for place, reason in enumerate(found) if reason != NOMINAL] == fired


def test_what_was_done_is_not_repeated_while_the_loss_comes_back():
    """It is far out for a long time, and each step of it is better than the one before."""
    rule = "id: far, metric: loss, above_record: 1, rising: true, for: 3, of: 4, cooldown: 19"
    there = [5.0, 5.0, 5.0, *(9.0 + place for place in range(6))]
    back = [14.0 - 0.2 * place for place in range(40)]
    engine = warm(rule)
    cut = [place for place, why in enumerate(reasons(engine, there + back)) if why == "far"]
    assert cut == [5]


def test_what_sinks_goes_on_rising_downwards():
    engine = warm("id: sunk, metric: loss, below_record: 1, rising: true")
    assert reasons(engine, [-5.0] * 5) == [NOMINAL] * 5
    engine = warm("id: sunk, metric: loss, below_record: 1, rising: true")
    assert reasons(engine, [-5.0, -5.0, -5.0, -9.0]) == [*[NOMINAL] * 3, "sunk"]


def test_a_release_lets_it_go_on_until_a_nearer_bound():
    engine = warm(f"{FAR}, release: 0.5")
    level = excursions(engine).level
    way = excursions(engine).bound((1, 1), 1.0) - level
    assert reasons(engine, [level + 2 * way, level + 0.6 * way, level + 0.4 * way]) == [
        *("far", "far", NOMINAL)
    ]


# What is kept.


def test_a_reloaded_table_keeps_the_records_it_still_looks_at():
    engine = warm(FAR, steps=100)
    before = excursions(engine)
    engine.reload(table(FAR, "id: other, metric: accuracy, above: 1"))
    assert reasons(engine, [50.0], 100) == ["far"]
    assert excursions(engine) is before


@pytest.mark.parametrize(
    ("rule", "top"),
    [
        (FAR, TOP.replace("window: 8", "window: 16")),
        (FAR, TOP.replace("1000", "2000")),
        (f"{FAR}, for: 2", TOP),
    ],
)
def test_a_record_with_other_spans_or_another_hold_begins_anew(rule, top):
    engine = warm(FAR, steps=100)
    engine.reload(table(rule, top=top))
    assert reasons(engine, [50.0, 50.0], 100) == [NOMINAL] * 2
    assert excursions(engine).level is None


def test_a_new_phase_begins_levels_and_baselines_anew_and_keeps_records():
    slow = "id: high, metric: loss, above_baseline: 2"
    engine = Engine(table(FAR, slow))
    for one in steady(200):
        outlier = 9.0 if one.step > KNOWN_AFTER and not one.step % 20 else 0.0
        engine.observe(frame(one.step, loss=one.values["loss"] + outlier, phase=0.0))
    peaks, bound = (
        excursions(engine).records[1, 1].peaks,
        excursions(engine).records[1, 1].bound,
    )
    assert peaks > 5
    assert reasons(engine, [50.0], 200, phase=1.0) == [NOMINAL]  # both are unknown
    assert excursions(engine).level is None
    for step in range(201, 201 + KNOWN_AFTER):
        assert reasons(engine, [50.0 * wobble(step)], step, phase=1.0) == [NOMINAL]
    after = excursions(engine)
    assert after.level == pytest.approx(50.0, rel=0.1)
    assert after.records[1, 1].peaks >= peaks
    assert after.records[1, 1].bound == pytest.approx(bound, rel=0.3)


def test_a_phase_that_stays_changes_nothing():
    plain, phased = warm(FAR), Engine(table(FAR))
    for one in steady(KNOWN_AFTER, phase=0.0):
        phased.observe(one)
    assert excursions(phased).bound((1, 1), 1.0) == excursions(plain).bound((1, 1), 1.0)


# What the reader and the lint say.


@pytest.mark.parametrize(
    ("rule", "top", "fault"),
    [
        (
            "id: a, metric: loss, above: 1, rising: true",
            TOP,
            "rules[0].rising: has a meaning only beside above_record or below_record",
        ),
        (
            "id: a, metric: loss, above_baseline: 2, rising: true",
            TOP,
            "rules[0].rising: has a meaning only beside above_record or below_record",
        ),
        (
            f"{FAR}, baseline: lowest",
            TOP,
            "rules[0].baseline: has a meaning only beside above_baseline or below_baseline",
        ),
        (f"{FAR}, baseline_of: grad_var", TOP, "rules[0].baseline_of: has a meaning only"),
        (f"{FAR}, rising: much", TOP, "rules[0].rising: expected true or false"),
        (FAR.replace(": 1", ": 0"), TOP, "rules[0].above_record: expected more than 0"),
        (f"{FAR}, release: 2", TOP, "rules[0].release: contradicts above_record"),
        (FAR, "record: {window: 4}", "record.window: "),
        (FAR, "record: {warmup: 4}", "record.warmup: "),
        (FAR, "record: {window: 16, warmup: 32}", "record.warmup: "),
        (FAR, "record: {false_alarm_steps: 10}", "record.false_alarm_steps: "),
        (FAR, "record: {false_alarms: 9000}", "record.false_alarms: "),
        (FAR, "record: often", "record: "),
    ],
)
def test_what_makes_no_sense_is_named(rule, top, fault):
    (found,) = faults(rule, top=top)
    assert found.startswith(fault), found


@pytest.mark.parametrize(
    ("rule", "doubted"),
    [
        ("metric: loss, above_record: 1", ""),
        # factors of a record are not factors of one reference: both may hold
        ("all: [{metric: loss, above_record: 4}, {metric: loss, above_record: 1}]", ""),
        ("all: [{metric: loss, above_record: 4}, {metric: loss, below: 1}]", ""),
        ("all: [{metric: accuracy, above_record: 4}, {metric: accuracy, above: 2}]", "never"),
    ],
)
def test_what_can_never_fire_is_told(rule, doubted):
    found = [doubt.message for doubt in doubts(table(f"id: a, {rule}"))]
    assert all(doubted and doubted in message for message in found)
    assert bool(found) is bool(doubted)


@pytest.mark.parametrize(
    ("stricter", "easier", "implied"),
    [
        ("above_record: 4", "above_record: 1", True),
        ("above_record: 1", "above_record: 4", False),
        ("below_record: 4", "below_record: 1", True),
        ("above_record: 4, rising: true", "above_record: 1", True),
        ("above_record: 4", "above_record: 1, rising: true", False),
    ],
)
def test_a_rule_that_is_never_heard_is_told(stricter, easier, implied):
    found = doubts(
        table(
            f"id: a, metric: loss, {easier}, inhibits: [b]", f"id: b, metric: loss, {stricter}"
        )
    )
    assert [doubt.rule for doubt in found] == (["b"] if implied else [])


def test_a_usual_norm_beside_no_condition_on_the_norm_is_told():
    rest = "parameters: {usual_norm: true}"
    known = table(f"id: a, metric: gradient_norm, above_record: 1, {rest}")
    unknown = table(f"id: a, metric: loss, above_record: 1, {rest}")
    assert doubts(known) == []
    assert ["usual_norm without effect" in doubt.message for doubt in doubts(unknown)] == [True]


# What explains it.


def finding(rule, *losses):
    engine = warm(rule)
    for step, loss in enumerate(losses, KNOWN_AFTER):
        decision = engine.observe(frame(step, loss=loss))
    (found,) = decision.findings
    return found.values


def test_a_finding_says_what_was_expected_and_why():
    one = table(FAR)
    seen = finding(FAR, 50.0)
    assert seen.keys() == {
        *("loss", "level(loss)", "scatter(loss)", "expected(loss)"),
        *("excursions(loss)", "farthest(loss)"),
    }
    (sentence,) = expected(one.rules[0].when, seen, table_entry(one, ""))
    assert sentence.startswith(
        f"loss 50, expected at most {seen['expected(loss)']:.4g}: 1 × its record; "
        f"level {seen['level(loss)']:.4g}; scatter {seen['scatter(loss)']:.4g}; "
    )


@pytest.mark.parametrize(
    "rule",
    [
        FAR,
        "id: far, metric: loss, above_record: 0.5, rising: true",
        "id: far, all: [{metric: loss, above_record: 2}, {metric: loss, above: 1.5}]",
        "id: far, any: [{metric: loss, above_record: 2}, {metric: loss, above_baseline: 3}]",
        "id: far, metric: loss, above_record: 1, for: 2",
    ],
)
def test_the_number_lets_the_same_step_pass(rule):
    losses = [5.0, 5.5, 5.2, 11.0] if "rising" in rule else [5.0, 11.0]
    last = finding(rule, *losses)
    (own,) = table(rule).rules
    easier = passing(own.when, last)
    assert isinstance(easier, Condition | Group)
    more = ", for: 2" if "for: 2" in rule else ""
    again = f"id: far, {', '.join(as_yaml(easier))}{more}"
    assert table(again).rules[0].when == easier
    assert reasons(warm(again), losses)[-1] == NOMINAL
