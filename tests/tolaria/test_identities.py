"""Objects of the script are looked up without running its code."""

import gc
import weakref

import pytest

from esper_otel.tolaria.identities import IdentityMap, IdentitySet, KnownTensors, ObjectIds


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


class Memory:
    """A storage."""


class Tensor:
    """One that has a storage, or says that it has none."""

    def __init__(self, storage=None):
        self.storage = storage

    def untyped_storage(self):
        if self.storage is None:
            raise NotImplementedError
        return self.storage


def test_a_tensor_gets_no_weak_reference():
    tensor, known, numbers = Tensor(Memory()), KnownTensors(), ObjectIds()
    known.note([tensor])
    assert known.has_any([tensor])
    assert numbers.of(tensor) == numbers.of(tensor) == -id(tensor)
    with pytest.raises(TypeError):
        IdentitySet().add(tensor)
    assert weakref.getweakrefs(tensor) == []


def test_a_tensor_at_the_place_of_one_that_is_gone_is_not_that():
    """As if its ``id`` were given anew: all that differs is the storage."""
    tensor, known = Tensor(Memory()), KnownTensors()
    known.note([tensor])
    tensor.storage = Memory()
    assert not known.has_any([tensor])
    assert not known.has_any([Tensor(tensor.storage)], [tensor])
    assert known.has_any([tensor], [tensor])  # one that lives is known for certain


def test_a_tensor_without_storage_is_known_while_it_lives_for_certain():
    tensor, known = Tensor(), KnownTensors()
    known.note([tensor])
    assert not known.has_any([tensor])
    assert known.has_any([tensor], [tensor])


def test_known_tensors_and_their_storages_are_not_kept_alive():
    storage, known = Memory(), KnownTensors()
    known.note([Tensor(storage)])
    gone = weakref.ref(storage)
    del storage
    gc.collect()
    assert gone() is None
