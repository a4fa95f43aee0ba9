"""Scoring of scenarios: what shows, what counts as an answer, and what as a false action."""

import re
from math import nan

import pytest
from bench_scenarios_made import recorded

from bench.scenarios.recordings import Wish
from bench.scenarios.scoring import by_kind, outcome, recorded_in, score
from bench.scenarios.showing import REFERENCE, shows
from bench.scenarios.suite import (
    EXTENTS,
    HARMFUL,
    HEALTHY,
    RECORDINGS,
    RIGHT,
    Scenario,
    path,
    scenarios,
)
from esper_otel.leyline.decisions import Proposal, SeedOperation
from esper_tamiyo.language.table_file import load

AT = REFERENCE + 11
"""The step at which what is wrong begins, in all of these."""
STEADY = [1.0 + 0.1 * (step % 3) for step in range(AT - 1)]
FLAT = [1.0] * (AT - 1)
WIDE = [1.0 + 9.0 * (step % 3 == 0) for step in range(AT - 1)]
"""From 1 to 10."""
SPIKE = Scenario("digits", "labels_shuffled", 1)


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        pytest.param(STEADY, [1.1] * 9, None, id="as before"),
        pytest.param(STEADY, [1.1, 1.35, 1.35], None, id="beyond the range, not by its width"),
        pytest.param(STEADY, [1.1, 1.5, 1.5], AT + 1, id="above it by more than its width"),
        pytest.param(STEADY, [1.1, 0.7, 0.7], AT + 1, id="below it by more than its width"),
        pytest.param(WIDE, [1.1, 1.1, 0.09, 0.09], AT + 2, id="below it by as many times"),
        pytest.param(WIDE, [1.1, 1.1, 0.11, 0.11], None, id="below it by fewer times"),
        pytest.param(STEADY, [1.1, 1.5, 1.1, 1.5], None, id="never two steps in a row"),
        pytest.param(STEADY, [1.5, 0.7, 1.1], None, id="two in a row, on two sides"),
        pytest.param(FLAT, [1.0, 1.001, 1.0], AT + 1, id="what stood still has moved"),
        pytest.param(STEADY, [1.1, 1.1, nan], AT + 2, id="what was always there is absent"),
        pytest.param([nan] * (AT - 1), [1.1, 5.0], None, id="nothing to compare with"),
    ],
)
def test_a_trouble_shows_when_a_metric_leaves_its_range(before, after, shown):
    assert shows([recorded(SPIKE, steps={"loss": before + after}, at=AT)]) == shown


def test_it_shows_where_it_shows_first():
    first = recorded(SPIKE, steps={"loss": [*STEADY, 1.1, 1.1, 9.0, 9.0]}, at=AT)
    second = recorded(SPIKE, steps={"loss": [*STEADY, 1.1, 9.0, 9.0, 9.0]}, at=AT)
    assert shows([first, second]) == AT + 1


@pytest.mark.parametrize("key", ["cpu_util_percent", "kasmina.seeds_live"])
def test_the_load_of_the_host_shows_no_trouble(key):
    steps = {"loss": [*STEADY, 1.1, 1.1], key: [*FLAT, 1.0, 2.0]}
    shown = None if key == "cpu_util_percent" else AT + 1
    assert shows([recorded(SPIKE, steps=steps, at=AT)]) == shown


def test_that_a_seed_is_no_longer_isolated_shows_no_trouble():
    seeds = [
        (place, "a-1", {"kasmina.seed.isolation.seed_norm": float(place >= AT)})
        for place in range(AT + 3)
    ]
    steps = {"loss": [*STEADY, 1.1, 1.1, 1.1, 1.1]}
    assert shows([recorded(SPIKE, steps=steps, seeds=seeds, at=AT)]) is None


def table(tmp_path, rule):
    file = tmp_path / "table.yaml"
    file.write_text(f"version: t\nrules:\n  - id: loss_spike\n    severity: HIGH\n{rule}")
    return load(str(file))


ACTS = "    metric: loss\n    above: 5\n    action: PAUSE\n"
TELLS = "    metric: loss\n    above: 5\n    action: CONTINUE\n"
OBSERVES = ACTS + "    mode: observe\n"
PUTS_OFF = "    metric: loss\n    above: 5\n    action: OPTIMIZER\n    downgrade: true\n"


@pytest.mark.parametrize(
    ("rule", "losses", "answered", "acted", "told"),
    [
        pytest.param(ACTS, [1.1, 9.0, 9.0], AT + 1, 0, 0, id="answered"),
        pytest.param(TELLS, [1.1, 9.0, 9.0], AT + 1, 0, 0, id="telling is an answer"),
        pytest.param(OBSERVES, [1.1, 9.0, 9.0], None, 0, 0, id="observing is none"),
        pytest.param(PUTS_OFF, [1.1, 9.0, 9.0], None, 0, 0, id="nothing to put off"),
        pytest.param(ACTS, [1.1, 1.1, 1.1], None, 0, 0, id="missed"),
    ],
)
def test_a_trouble_is_answered_by_a_right_rule_from_its_beginning_on(
    tmp_path, rule, losses, answered, acted, told
):
    run = recorded(SPIKE, steps={"loss": STEADY + losses}, at=AT)
    found = outcome([run], table(tmp_path, rule))
    assert (found.answered, len(found.acted), len(found.told)) == (answered, acted, told)
    assert found.healthy == AT - 1
    assert found.frames == AT + 2


@pytest.mark.parametrize(
    ("rule", "acted", "told"), [(ACTS, 2, 0), (TELLS, 0, 2), (OBSERVES, 0, 0), (PUTS_OFF, 0, 0)]
)
@pytest.mark.parametrize("at", [None, 6])
def test_what_is_said_while_nothing_is_wrong_is_false(tmp_path, rule, acted, told, at):
    scenario = SPIKE if at else Scenario("digits", "plain", 1)
    run = recorded(scenario, steps={"loss": [1.0, 9.0, 9.0, 1.0, 1.0, 1.0]}, at=at)
    found = outcome([run], table(tmp_path, rule))
    assert (len(found.acted), len(found.told)) == (acted, told)


def test_what_is_put_off_counts_where_something_was_proposed(tmp_path):
    wish = Wish(2, 3, Proposal("a-1", SeedOperation.BLEND))
    run = recorded(steps={"loss": [1.0, 9.0, 9.0, 9.0]}, wishes=[wish])
    found = outcome([run], table(tmp_path, PUTS_OFF))
    assert found.acted == ((3, "loss_spike"),)


def test_a_right_rule_is_right_for_its_kind_only(tmp_path):
    run = recorded(
        Scenario("digits", "hook_slow", 1), steps={"loss": [*STEADY, 9.0, 9.0]}, at=AT
    )
    found = outcome([run], table(tmp_path, ACTS))
    assert found.answered is None
    assert found.others == ("loss_spike",)


def test_the_delay_counts_from_showing_and_is_never_negative(tmp_path):
    late = table(tmp_path, ACTS + "    for: 3\n")
    run = recorded(SPIKE, steps={"loss": [*STEADY, 1.1, 9.0, 9.0, 9.0]}, at=AT)
    assert outcome([run], late).delay == 2
    early = table(tmp_path, "    metric: loss\n    above: 1.15\n    action: PAUSE\n")
    hidden = recorded(SPIKE, steps={"loss": [*FLAT[:-1], 1.1, 1.2, 9.0, 9.0]}, at=AT)
    assert outcome([hidden], early).delay == 0


def test_a_score_sums_outcomes_up(tmp_path):
    rule = table(tmp_path, ACTS)
    outcomes = [
        outcome([recorded(SPIKE, steps={"loss": [*STEADY, 9.0, 9.0]}, at=AT)], rule),
        outcome([recorded(SPIKE, steps={"loss": [*STEADY, 1.1, 1.1]}, at=AT)], rule),
        outcome([recorded(steps={"loss": [1.0, 9.0]})], rule),
    ]
    found = score(outcomes)
    assert (found.troubles, found.answered, found.recall) == (2, 1, 0.5)
    assert found.delay == 0
    assert found.healthy == 2 * (AT - 1) + 2
    assert found.false_actions == pytest.approx(50_000 / found.healthy)
    assert "missed 1" in by_kind(outcomes)


HARM = Scenario("digits", "lr_times_50", 1)


@pytest.mark.parametrize(
    ("rule", "acted_on", "told_soon", "acted_on_soon"),
    [
        pytest.param(ACTS, AT + 1, 1, 1, id="at once"),
        pytest.param(ACTS + "    for: 21\n", AT + 21, 1, 1, id="after 20 steps"),
        pytest.param(ACTS + "    for: 22\n", AT + 22, 0, 1, id="after 21 steps"),
        pytest.param(ACTS + "    for: 52\n", AT + 52, 0, 0, id="after 51 steps"),
        pytest.param(TELLS, None, 1, 0, id="told and not acted on"),
    ],
)
def test_telling_has_twenty_steps_and_acting_fifty(
    tmp_path, rule, acted_on, told_soon, acted_on_soon
):
    run = recorded(HARM, steps={"loss": [*STEADY, 1.1, *[9.0] * 60]}, at=AT)
    found = outcome([run], table(tmp_path, rule))
    assert found.acted_on == acted_on
    told = score([found])
    assert (told.harmful, told.told_soon, told.acted_on_soon) == (1, told_soon, acted_on_soon)


def test_only_what_an_action_can_help_is_harmful(tmp_path):
    run = recorded(SPIKE, steps={"loss": [*STEADY, 1.1, 9.0, 9.0]}, at=AT)
    told = score([outcome([run], table(tmp_path, ACTS))])
    assert (told.troubles, told.told_soon, told.harmful) == (1, 1, 0)


def test_the_share_of_healthy_runs_that_were_touched_counts_runs(tmp_path):
    rule = table(tmp_path, ACTS)
    runs = [
        recorded(steps={"loss": [1.0, 9.0, 9.0]}),
        recorded(steps={"loss": [1.0, 1.0, 1.0]}),
        recorded(SPIKE, steps={"loss": [9.0, *STEADY[1:], 1.1]}, at=AT),
    ]
    told = score([outcome([run], rule) for run in runs])
    assert (told.healthy_runs, told.touched, told.touch) == (2, 1, 0.5)


def test_odd_seeds_are_held_out_and_all_ranks_of_a_scenario_come_together(tmp_path):
    from bench.scenarios.recordings import append

    for seed in range(2):
        scenario = Scenario("digits", "ranks", seed)
        ranks = [recorded(scenario, steps={"loss": [1.0]}, rank=rank) for rank in range(3)]
        append(path(scenario, tmp_path), ranks)
    found = list(recorded_in(tmp_path, held_out=True))
    assert [[each.rank for each in ranks] for ranks in found] == [[0, 1, 2]]
    assert found[0][0].scenario.seed == 1
    assert len(list(recorded_in(tmp_path))) == 2


def test_as_much_is_planned_as_was_promised():
    every = list(scenarios())
    assert len(every) == len(set(every))
    assert len(RIGHT) >= 12
    for workload, extent in EXTENTS.items():
        mine = [each for each in every if each.workload == workload]
        for kind in extent.healthy_kinds:
            assert sum(each.kind == kind for each in mine) == extent.healthy_seeds >= 4
        for kind in extent.troubled_by:
            assert sum(each.kind == kind for each in mine) == extent.seeds >= 2
    assert {each.kind for each in every} == {*RIGHT, *HEALTHY}
    assert set(RIGHT) >= HARMFUL


def test_as_much_is_recorded_as_the_page_says():
    page = (RECORDINGS.parents[2] / "docs" / "scenarios.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| about [^|]+\| (\d+) \|", page, re.MULTILINE)
    assert [name for name, _ in told] == list(EXTENTS)
    for workload, seeds in told:
        files = {path(Scenario(workload, "plain", seed)) for seed in range(int(seeds))}
        assert set(RECORDINGS.glob(f"{workload}-*.tapes")) == files


def test_every_trouble_has_a_right_answer_in_the_default_table():
    ids = {rule.id for rule in load("default").rules}
    for kind, rules in RIGHT.items():
        assert ids.intersection(rules), kind
