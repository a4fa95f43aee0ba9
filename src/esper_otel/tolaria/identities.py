"""Objects of the script, known by their identity: looking one up runs none of its code.

A class of the script's own may have a ``__hash__`` that reads a whole data set, an ``__eq__``
that raises, or neither. Nothing here calls them, and nothing here keeps an object alive.

A tensor takes no weak reference of ours: ``torch.utils.swap_tensors``, by which ``model.to()``
may convert a model, raises for a tensor that has one. It is known by its ``id``, together with
its storage, which takes weak references and is never given to another tensor by chance.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

V = TypeVar("V")


TensorMark = tuple[int, weakref.ref[Any] | None]
"""What a tensor is known by: its ``id`` and its storage, None where it has none, as a sparse
one. A plain tuple, as one is made at every step."""


def mark_of(tensor: Any) -> TensorMark:
    """That of ``tensor``, as it is now."""
    try:
        return id(tensor), weakref.ref(tensor.untyped_storage())
    except Exception:
        return id(tensor), None


def has_mark(tensor: Any, mark: TensorMark) -> bool:
    """Whether ``tensor`` is the one of ``mark``; of one without storage the ``id`` decides.

    One whose storage was replaced since is taken for another.
    """
    known, storage = mark
    if id(tensor) != known:
        return False
    return storage is None or storage() is tensor.untyped_storage()


class IdentityMap(Generic[V]):
    """Values by the object they belong to, for as long as that lives.

    Raises ``TypeError`` where a value is set for an object that takes no weak reference, and
    for a tensor.
    """

    __slots__ = ("__weakref__", "_entries")

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], V]] = {}

    def get(self, thing: object) -> V | None:
        """The value of ``thing``, None when it has none."""
        entry = self._entries.get(id(thing))
        # An id is given anew once its owner is gone.
        return entry[1] if entry is not None and entry[0]() is thing else None

    def __setitem__(self, thing: object, value: V) -> None:
        key, entries = id(thing), self._entries

        def gone(reference: weakref.ref[Any]) -> None:
            entry = entries.get(key)
            if entry is not None and entry[0] is reference:
                del entries[key]

        if hasattr(type(thing), "untyped_storage"):
            raise TypeError("a tensor takes no weak reference of ours")
        entries[key] = weakref.ref(thing, gone), value

    def __contains__(self, thing: object) -> bool:
        entry = self._entries.get(id(thing))
        return entry is not None and entry[0]() is thing

    def __iter__(self) -> Iterator[Any]:
        """The objects that live, in the order in which they came."""
        for reference, _ in list(self._entries.values()):
            thing = reference()
            if thing is not None:
                yield thing

    def __len__(self) -> int:
        return len(self._entries)

    def discard(self, thing: object) -> None:
        """Forget ``thing``."""
        if thing in self:
            del self._entries[id(thing)]


class KnownTensors:
    """Tensors, known again for as long as they live and keep their storage."""

    def __init__(self) -> None:
        self._marks: dict[int, TensorMark] = {}

    def note(self, tensors: Iterable[Any]) -> None:
        """``tensors`` are of these, as they are now."""
        self._marks.update((id(each), mark_of(each)) for each in tensors)

    def has_any(self, tensors: Iterable[Any], living: Iterable[Any] = ()) -> bool:
        """Whether one of ``tensors`` is of these, or of ``living``.

        Of one that is not it, the ``id`` alone says nothing: its owner may be gone. Hence none
        without storage is of these.
        """
        ids, marks = {id(each) for each in living}, self._marks
        for each in tensors:
            mark = marks.get(id(each))
            if id(each) in ids or (mark and mark[1] and has_mark(each, mark)):
                return True
        return False


class IdentitySet(IdentityMap[None]):
    """Objects, for as long as they live."""

    __slots__ = ()

    def add(self, thing: object) -> None:
        """One more, unless it is here already."""
        if thing not in self:
            self[thing] = None


class ObjectIds:
    """Numbers for objects. None is given twice, as an ``id`` is once its owner is gone."""

    def __init__(self) -> None:
        self._given: IdentityMap[int] = IdentityMap()
        self._next: Callable[[], int] = itertools.count(1).__next__

    def of(self, thing: object) -> int:
        """Its number; the ``id``, below zero, of what takes no weak reference of ours."""
        entry = self._given._entries.get(id(thing))
        if entry is not None and entry[0]() is thing:  # as get() does, at every batch
            return entry[1]
        try:
            number = self._given[thing] = self._next()
        except TypeError:  # a list or a tensor, for example
            return -id(thing)
        return number
