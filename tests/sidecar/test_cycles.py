"""Cycles of rules, against a sorter that finds out whether there are any."""

from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from esper_tamiyo.language.table_reader import cycles

IDS = "abcdefg"
INHIBITED = st.fixed_dictionaries({name: st.lists(st.sampled_from(IDS)) for name in IDS})


def has_cycles(inhibited):
    try:
        TopologicalSorter(inhibited).prepare()
    except CycleError:
        return True
    return False


@given(INHIBITED)
def test_cycles_are_found_where_there_are_any(inhibited):
    assert any(cycles(inhibited)) is has_cycles(inhibited)


@given(INHIBITED)
def test_each_rule_of_a_cycle_inhibits_the_next(inhibited):
    for cycle in cycles(inhibited):
        assert all(after in inhibited[rule] for rule, after in pairwise([*cycle, cycle[0]]))


def test_a_long_way_round():
    ids = [str(number) for number in range(10_000)]
    inhibited = {rule: [after] for rule, after in pairwise([*ids, ids[0]])}
    assert list(cycles(inhibited)) == [ids]
