"""Which streamed steps come too late, whatever the clocks of their hosts say."""

import pytest

from esper_tamiyo.receiving.staleness import (
    MAX_LATER_NS,
    MAX_PRODUCERS,
    REMEMBERED_NS,
    StalenessFilter,
)

S = 1_000_000_000
MADE = 1_700_000_000 * S


class Here:
    """This host's clock, and a producer whose clock differs from it by ``ahead``."""

    def __init__(self, ahead=0):
        self.now = 5 * S
        self.ahead = ahead
        self.punctuality = StalenessFilter(lambda: self.now)

    def is_old(self, late=0, producer="rank 0"):
        """Of a step that ended ``late`` ago."""
        return self.punctuality.is_old(producer, MADE + self.ahead + self.now - late)


@pytest.mark.parametrize("ahead", [0, 3600 * S, -3600 * S])
def test_what_a_hang_kept_is_old_and_what_comes_after_it_is_not(ahead):
    here = Here(ahead)
    assert not here.is_old(late=S // 10)
    here.now += 30 * S
    assert here.is_old(late=30 * S)
    assert here.is_old(late=11 * S)
    assert not here.is_old(late=9 * S)
    assert not here.is_old(late=S // 10)


def test_the_bound_is_what_it_says():
    here = Here()
    assert not here.is_old()
    assert not here.is_old(late=MAX_LATER_NS)
    assert here.is_old(late=MAX_LATER_NS + 1)


def test_a_hang_however_long_makes_nothing_forgotten():
    here = Here()
    assert not here.is_old()
    here.now += 100 * REMEMBERED_NS
    assert here.is_old(late=100 * REMEMBERED_NS)
    here.now += REMEMBERED_NS
    assert here.is_old(late=20 * S)


def test_a_clock_that_is_set_back_is_believed_after_a_while():
    here = Here()
    assert not here.is_old()
    here.ahead = -3600 * S
    old = []
    for _ in range(3 * REMEMBERED_NS // S):
        here.now += S
        old.append(here.is_old())
    assert old[0]
    assert not old[-1]
    assert sum(old) <= 2 * REMEMBERED_NS // S + 1
    assert old == sorted(old, reverse=True)


def test_a_quicker_step_is_what_later_ones_are_held_against():
    here = Here()
    assert not here.is_old(late=60 * S), "the first, of which nobody can know"
    assert not here.is_old(late=5 * S)
    assert here.is_old(late=60 * S)


def test_producers_are_each_for_themselves():
    here = Here()
    assert not here.is_old()
    assert here.is_old(late=60 * S)
    assert not here.is_old(late=60 * S, producer="rank 1")


def test_a_step_without_a_time_is_never_old():
    here = Here()
    for _ in range(3):
        here.now += 60 * S
        assert not here.punctuality.is_old("rank 0", 0)


def test_producers_are_bounded_and_the_one_not_heard_of_for_longest_goes():
    here = Here()
    for number in range(MAX_PRODUCERS):
        here.is_old(producer=number)
    here.is_old(producer=0)
    here.is_old(producer="one more")
    assert here.is_old(late=60 * S, producer=0)
    assert not here.is_old(late=60 * S, producer=1), "forgotten, so this is its first"
