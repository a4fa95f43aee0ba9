"""Rings of rules, against a sorter that finds out whether there are any."""

from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from esper_tamiyo.language.rings import rings

IDS = "abcdefg"
SILENCED = st.fixed_dictionaries({name: st.lists(st.sampled_from(IDS)) for name in IDS})


def has_rings(silenced):
    try:
        TopologicalSorter(silenced).prepare()
    except CycleError:
        return True
    return False


@given(SILENCED)
def test_rings_are_found_where_there_are_any(silenced):
    assert any(rings(silenced)) is has_rings(silenced)


@given(SILENCED)
def test_each_rule_of_a_ring_silences_the_next(silenced):
    for ring in rings(silenced):
        assert all(after in silenced[rule] for rule, after in pairwise([*ring, ring[0]]))


def test_a_long_way_round():
    ids = [str(number) for number in range(10_000)]
    silenced = {rule: [after] for rule, after in pairwise([*ids, ids[0]])}
    assert list(rings(silenced)) == [ids]
