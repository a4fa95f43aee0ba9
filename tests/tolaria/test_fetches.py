"""Which fetches a step is charged with, for the ways in which loops fetch."""

from typing import NamedTuple

import pytest

from esper_otel.tolaria.fetches import MAX_FETCH_RUNS, MAX_WAITS, NO_SIZE, Fetches, Size, Source
from esper_otel.tolaria.identities import ObjectIds

TRAIN, VALID, OTHER = (Source(n, n) for n in (1, 2, 3))
UNGRADED = Source(4, 4, graded=False)


class Charged(NamedTuple):
    before: int
    since: int
    outside: bool
    size: Size
    waits: list


class Loop:
    """Fetches one batch of 8 per word, each waited for 2 after 10 of something else."""

    def __init__(self):
        self.fetches = Fetches()
        self.now = 1000
        self.steps = 0

    def fetch(self, *sources, samples=8):
        for source in sources:
            mark, asked_for = self.now, self.now + 10
            self.now = asked_for + 2
            self.fetches.came(source, asked_for, self.now, (samples, 3), mark)

    def end(self, source):
        self.now += 5
        self.fetches.ended(source.iterator, self.now)

    def backward(self):
        charged = Charged(*self.fetches.charge(self.steps))
        self.steps += 1
        return charged


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
    assert (charged.waits, charged.size) == (((1022, 1024),), (8, 3))
    assert not loop.fetches.waiting


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_an_evaluation_before_the_step_is_outside(loop, batches):
    loop.fetch(*[VALID] * batches, TRAIN)
    charged = loop.backward()
    assert charged.outside
    assert charged.size == (8, 3)
    assert len(charged.waits) == 1
    assert charged.since - charged.before == 12 * batches + 10


def test_several_fetches_from_the_training_loader_are_all_the_steps(loop):
    """A trainer that fetches all micro-batches of a step before it computes."""
    loop.fetch(TRAIN, TRAIN, TRAIN, TRAIN)
    charged = loop.backward()
    assert not charged.outside
    assert (len(charged.waits), charged.size) == (4, (32, 3))


def test_loaders_that_are_zipped_are_all_the_steps():
    loop = Loop()
    for _ in range(3):
        loop.fetch(TRAIN, OTHER)
        charged = loop.backward()
        assert not charged.outside
        assert (len(charged.waits), charged.size) == (2, (16, 3))


def test_an_evaluation_before_the_very_first_step_is_known_by_its_length():
    loop = Loop()
    loop.fetch(VALID, VALID, TRAIN)
    charged = loop.backward()
    assert charged.outside
    assert charged.size == (8, 3)


def test_a_new_epoch_has_a_new_iterator_over_the_same_dataset(loop):
    again = Source(7, TRAIN.dataset)
    loop.fetch(VALID, again)
    charged = loop.backward()
    assert charged.outside
    assert charged.size == (8, 3)


@pytest.mark.parametrize("batches", [1, 3])
def test_evaluating_on_the_training_set_is_outside_too(loop, batches):
    evaluating, again = Source(8, TRAIN.dataset), Source(9, TRAIN.dataset)
    loop.fetch(*[evaluating] * batches, again)
    charged = loop.backward()
    assert charged.outside
    assert charged.size == (8, 3)


def test_a_single_batch_without_gradients_is_an_evaluation_whatever_else_is_new(loop):
    loop.fetch(Source(20, 20, graded=False), Source(21, 21))
    charged = loop.backward()
    assert charged.outside
    assert charged.size == (8, 3)


def test_a_loader_that_is_timed_at_two_places_counts_once(loop):
    inner = Source(5, 5)
    for _ in range(2):
        asked_for = loop.now + 10
        loop.fetches.came(inner, asked_for + 1, asked_for + 2, (8, 3), loop.now)
        loop.fetches.came(TRAIN, asked_for, asked_for + 3, (8, 3), asked_for + 2)
        loop.now = asked_for + 3
        charged = loop.backward()
        assert not charged.outside
        assert (list(charged.waits), charged.size) == ([(asked_for, asked_for + 3)], (8, 3))


def test_an_evaluation_without_end_takes_no_memory_without_end(loop):
    loop.fetch(*[VALID, OTHER] * 1000, TRAIN)
    assert len(loop.fetches._runs) == MAX_FETCH_RUNS
    assert loop.backward().size == (8, 3)


def test_a_loader_without_end_takes_no_memory_without_end(loop):
    loop.fetch(*[TRAIN] * 10_000)
    (stretch,) = loop.fetches._runs
    assert len(stretch.waits) == MAX_WAITS
    charged = loop.backward()
    assert charged.size == (80_000, 3)
    # Each was waited for for 2, after 10 of something else.
    assert sum(came - asked_for for asked_for, came in charged.waits) == 20_000
    assert charged.waits[-1][1] - charged.waits[0][0] == 12 * 9_999 + 2
    ends = [mark for wait in charged.waits for mark in wait]
    assert ends == sorted(ends)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("before", [(), (TRAIN,)])
def test_an_evaluation_before_a_step_that_fetches_nothing_is_all_outside(before, batches):
    """Training on tensors, by a thread that fetches ahead, or on the last batch of a loader."""
    loop = Loop()
    for source in before:
        loop.fetch(source)
        loop.backward()
    began = loop.now
    loop.fetch(*[UNGRADED] * batches)
    charged = loop.backward()
    assert charged == (began, loop.now, True, NO_SIZE, ())
    assert not loop.fetches.waiting


def test_several_evaluations_are_outside_as_one_is(loop):
    began = loop.now
    loop.fetch(UNGRADED, UNGRADED._replace(iterator=5), Source(6, 6, graded=False))
    assert loop.backward() == (began, loop.now, True, NO_SIZE, ())


@pytest.mark.parametrize("batches", [1, 3])
def test_an_evaluation_lasts_until_its_loader_has_no_more(loop, batches):
    loop.fetch(*[UNGRADED] * batches)
    loop.now += 10  # what is computed on the last batch
    loop.end(UNGRADED)
    assert loop.backward().since == loop.now


def test_the_end_of_another_loader_says_nothing_of_the_evaluations(loop):
    loop.fetch(UNGRADED)
    came = loop.now
    loop.end(TRAIN)
    assert loop.backward().since == came


def test_after_an_evaluation_the_training_loader_is_still_known(loop):
    loop.fetch(UNGRADED)
    loop.backward()
    loop.fetch(OTHER, TRAIN)
    charged = loop.backward()
    assert charged.outside
    assert charged.size == (8, 3)


def test_a_loop_that_records_no_gradients_while_it_fetches_is_known_by_going_on():
    loop = Loop()
    loop.fetch(UNGRADED)
    loop.backward()
    for source in (UNGRADED, UNGRADED, UNGRADED._replace(iterator=5)):
        loop.fetch(source)
        charged = loop.backward()
        assert not charged.outside
        assert charged.size == (8, 3)


def test_an_evaluation_at_every_step_does_not_go_on(loop):
    """Workers that persist give every pass over their loader the same iterator."""
    for _ in range(3):
        loop.fetch(UNGRADED, UNGRADED)
        loop.end(UNGRADED)
        charged = loop.backward()
        assert charged.outside
        assert charged.waits == ()


def test_an_evaluation_now_and_then_does_not_go_on(loop):
    """One batch of a loader that is never asked for all."""
    for _ in range(3):
        loop.fetch(UNGRADED)
        assert loop.backward().outside
        loop.steps += 1  # one that fetches nothing


class Dataset:
    pass


def test_a_name_is_never_given_twice():
    names = ObjectIds()
    one = Dataset()
    assert names.of(one) == names.of(one)
    given = {names.of(Dataset()) for _ in range(100)}  # each gone before the next is made
    assert len(given) == 100
    assert names.of(one) not in given


def test_what_takes_no_weak_reference_has_a_name_as_well():
    names = ObjectIds()
    rows = [1, 2]
    assert names.of(rows) == names.of(rows) != names.of([1, 2])
