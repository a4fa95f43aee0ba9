"""Objects of the script are looked up without running its code."""

import gc

import pytest

from esper_otel.tolaria.identities import IdentityMap, IdentitySet, ObjectIds


class Hostile:
    """Whose hash reads the disk, and whose comparison raises."""

    def __hash__(self):
        raise AssertionError("hashed")

    def __eq__(self, other):
        raise AssertionError("compared")

    def __bool__(self):
        raise AssertionError("asked whether it is true")

    def __len__(self):
        raise AssertionError("asked for its length")

    def __getattr__(self, name):
        raise AssertionError(f"asked for {name}")


def test_nothing_of_an_object_is_called():
    thing, other = Hostile(), Hostile()
    known, numbers, held = IdentityMap(), ObjectIds(), IdentitySet()
    known[thing] = 1
    held.add(thing)
    held.add(thing)
    assert (known.get(thing), known.get(other)) == (1, None)
    assert thing in held
    assert other not in held
    assert [each is thing for each in held] == [True]
    assert numbers.of(thing) == numbers.of(thing) != numbers.of(other)
    held.discard(thing)
    assert len(held) == 0


def test_an_object_that_is_gone_is_forgotten_and_its_id_means_nothing():
    known = IdentityMap()
    for number in range(100):  # ids come back
        thing = Hostile()
        assert known.get(thing) is None
        known[thing] = number
    del thing
    gc.collect()
    assert len(known) == 0
    assert list(known) == []


def test_what_takes_no_weak_reference_cannot_be_kept():
    with pytest.raises(TypeError):
        IdentityMap()[[1]] = 2
