"""Leaving one workload out: what is moved, who chooses, and who is scored by what."""

import pytest

from bench.left_out import CHOICES, Choice, chosen, left_out, moved, rows, shortfall
from bench.scenarios.scoring import Outcome, score
from bench.scenarios.suite import EXTENTS, Scenario
from esper_tamiyo.language.operators import ON_EARLIER, ON_RECORDS
from esper_tamiyo.language.table import conditions
from esper_tamiyo.language.table_file import load

AS_IT_IS, OTHER = CHOICES[:2]


def numbers(table, operators):
    return [
        part.number
        for rule in table.rules
        for part in conditions(rule.when)
        if part.operator in operators
    ]


def test_the_first_choice_is_the_table_as_it_is():
    table = load("default")
    assert moved(table, AS_IT_IS) == table
    assert all(moved(table, choice) != table for choice in CHOICES[1:])


def test_a_choice_moves_what_it_is_about_and_nothing_else():
    table = load("default")
    made = moved(table, Choice(margin=2.0, budget=3.0, patience=2.0))
    assert numbers(made, ON_RECORDS) == [2 * number for number in numbers(table, ON_RECORDS)]
    assert numbers(made, ON_EARLIER) == [2 * number for number in numbers(table, ON_EARLIER)]
    assert made.record.false_alarm_steps == 3 * table.record.false_alarm_steps
    assert [rule.id for rule in made.rules] == [rule.id for rule in table.rules]
    assert str(Choice(margin=2.0)) == "margin × 2"


def outcome(workload, notices=0):
    told = tuple((step, "loss_shift") for step in range(notices))
    return Outcome(
        *(Scenario(workload, "plain", 0), None, None, None, (), told, ()),
        frames=1000,
        healthy=1000,
        load=1.0,
    )


def test_a_workload_has_no_part_in_the_choice_it_is_scored_by():
    first, *others = EXTENTS
    quiet = {choice: [outcome(each) for each in others] for choice in CHOICES}
    tuning = {
        choice: [*found, outcome(first, notices=0 if choice == OTHER else 9)]
        for choice, found in quiet.items()
    }
    choices = chosen(tuning)
    assert choices[first] == AS_IT_IS
    assert {choices[each] for each in others} == {OTHER}
    found = left_out(tuning, choices)
    assert sorted(each.scenario.workload for each in found) == sorted(EXTENTS)
    assert score(found).told == 9


def test_the_bars_are_twice_as_wide_and_each_figure_counts_in_units_of_its_bar():
    found = [outcome(each, notices=1) for each in EXTENTS]
    told = score(found)
    assert told.false_notices == pytest.approx(50.0)
    assert shortfall(told) == pytest.approx(5.0)
    notices = next(row for row in rows("a half", found) if "false notices" in row.figure)
    assert (notices.bar, notices.holds) == (20.0, False)
