"""Cycles of rules, against a sorter that finds out whether there are any."""

from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from esper_tamiyo.language.cycles import cycles

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


@given(INHIBITED)
def test_rules_that_inhibit_one_another_have_one_cycle_for_all(inhibited):
    def reached(first):
        seen, waiting = set(), [first]
        while waiting:
            for name in inhibited[waiting.pop()]:
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return seen

    ways = {rule: reached(rule) for rule in IDS}
    groups = {frozenset(b for b in ways[a] if a in ways[b]) for a in IDS if a in ways[a]}
    found = list(cycles(inhibited))
    assert len(found) == len(groups)
    assert all(any(set(cycle) <= group for group in groups) for cycle in found)


def test_the_work_grows_with_what_is_inhibited_and_no_faster():
    class Counted(list):
        looked_at = 0

        def __iter__(self):
            for name in list.__iter__(self):
                Counted.looked_at += 1
                yield name

    ids = [str(number) for number in range(200)]
    inhibited = {rule: Counted(name for name in ids if name != rule) for rule in ids}
    (cycle,) = cycles(inhibited)
    assert len(cycle) == 2
    assert Counted.looked_at <= 3 * 200 * 199
