"""Which fetches a step is charged with, for the ways in which loops fetch."""

from typing import NamedTuple

import pytest

from esper_otel.tolaria.fetches import MAX_STRETCHES, Fetches, Names, Source

TRAIN, VALID, OTHER = (Source(n, n) for n in (1, 2, 3))


class Charged(NamedTuple):
    before: int
    since: int
    outside: bool
    samples: int
    waits: list


class Loop:
    """Fetches one batch of 8 per word, each waited for 2 after 10 of something else."""

    def __init__(self):
        self.fetches = Fetches()
        self.now = 1000

    def fetch(self, *sources, samples=8):
        for source in sources:
            mark, asked_for = self.now, self.now + 10
            self.now = asked_for + 2
            self.fetches.came(source, asked_for, self.now, samples, mark)

    def backward(self):
        return Charged(*self.fetches.charge())


@pytest.fixture
def loop():
    """One that has trained a step."""
    loop = Loop()
    loop.fetch(TRAIN)
    loop.backward()
    return loop


def test_one_fetch_is_one_wait(loop):
    loop.fetch(TRAIN)
    charged = loop.backward()
    assert not charged.outside
    assert (charged.before, charged.since) == (1012, 1022)
    assert (charged.waits, charged.samples) == (((1022, 1024),), 8)
    assert not loop.fetches.waiting


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_an_evaluation_before_the_step_is_outside(loop, batches):
    loop.fetch(*[VALID] * batches, TRAIN)
    charged = loop.backward()
    assert charged.outside
    assert charged.samples == 8
    assert len(charged.waits) == 1
    assert charged.since - charged.before == 12 * batches + 10


def test_several_fetches_from_the_training_loader_are_all_the_steps(loop):
    """A trainer that fetches all micro-batches of a step before it computes."""
    loop.fetch(TRAIN, TRAIN, TRAIN, TRAIN)
    charged = loop.backward()
    assert not charged.outside
    assert (len(charged.waits), charged.samples) == (4, 32)


def test_loaders_that_are_zipped_are_all_the_steps():
    loop = Loop()
    for _ in range(3):
        loop.fetch(TRAIN, OTHER)
        charged = loop.backward()
        assert not charged.outside
        assert (len(charged.waits), charged.samples) == (2, 16)


def test_an_evaluation_before_the_very_first_step_is_known_by_its_length():
    loop = Loop()
    loop.fetch(VALID, VALID, TRAIN)
    charged = loop.backward()
    assert charged.outside
    assert charged.samples == 8


def test_a_new_epoch_has_a_new_iterator_over_the_same_dataset(loop):
    again = Source(7, TRAIN.dataset)
    loop.fetch(VALID, again)
    charged = loop.backward()
    assert charged.outside
    assert charged.samples == 8


@pytest.mark.parametrize("batches", [1, 3])
def test_evaluating_on_the_training_set_is_outside_too(loop, batches):
    evaluating, again = Source(8, TRAIN.dataset), Source(9, TRAIN.dataset)
    loop.fetch(*[evaluating] * batches, again)
    charged = loop.backward()
    assert charged.outside
    assert charged.samples == 8


def test_a_single_batch_without_gradients_is_an_evaluation_whatever_else_is_new(loop):
    loop.fetch(Source(20, 20, graded=False), Source(21, 21))
    charged = loop.backward()
    assert charged.outside
    assert charged.samples == 8


def test_a_loader_that_is_timed_at_two_places_counts_once(loop):
    inner = Source(5, 5)
    for _ in range(2):
        asked_for = loop.now + 10
        loop.fetches.came(inner, asked_for + 1, asked_for + 2, 8, loop.now)
        loop.fetches.came(TRAIN, asked_for, asked_for + 3, 8, asked_for + 2)
        loop.now = asked_for + 3
        charged = loop.backward()
        assert not charged.outside
        assert (list(charged.waits), charged.samples) == ([(asked_for, asked_for + 3)], 8)


def test_an_evaluation_without_end_takes_no_memory_without_end(loop):
    loop.fetch(*[VALID, OTHER] * 1000, TRAIN)
    assert len(loop.fetches._stretches) == MAX_STRETCHES
    assert loop.backward().samples == 8


class Dataset:
    pass


def test_a_name_is_never_given_twice():
    names = Names()
    one = Dataset()
    assert names.of(one) == names.of(one)
    given = {names.of(Dataset()) for _ in range(100)}  # each gone before the next is made
    assert len(given) == 100
    assert names.of(one) not in given


def test_what_takes_no_weak_reference_has_a_name_as_well():
    names = Names()
    rows = [1, 2]
    assert names.of(rows) == names.of(rows) != names.of([1, 2])
