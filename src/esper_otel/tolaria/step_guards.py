"""Tells of an optimizer's step that raises: torch calls no hook then."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any, Protocol

log = logging.getLogger("esper_otel")


class Listener(Protocol):
    """Who wants to know."""

    def end(self, optimizer: Any) -> None:
        """``optimizer`` has stepped, or has failed to."""


class StepGuards:
    """Wraps ``step`` of the classes of optimizers, once for all listeners of the process.

    What the optimizer raises goes on as it is. The wrappers come off with the last listener.
    """

    def __init__(self) -> None:
        self._listeners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        """The wrappers. Not an attribute of theirs: who wraps one copies its attributes."""
        self._undo: list[Callable[[], None]] = []

    def watch(self, optimizer: Any, listener: Listener) -> None:
        """From its next step on, tell ``listener`` when ``optimizer`` raises.

        Its class is wrapped, and the optimizer itself where a scheduler has put a ``step``
        of its own there.
        """
        self._listeners.add(listener)
        if optimizer in self._known:
            return
        self._known.add(optimizer)
        for owner in type(optimizer).__mro__:
            if "step" in owner.__dict__:
                self._wrap_class(owner)
                break
        if "step" in vars(optimizer):
            self._wrap_instance(optimizer)

    def leave(self, listener: Listener) -> None:
        """``listener`` wants to know no more."""
        self._listeners.discard(listener)
        if not self._listeners:
            while self._undo:
                self._undo.pop()()
            self._known.clear()

    def _wrap_class(self, owner: Any) -> None:
        step = owner.__dict__["step"]
        if step in self._made or not callable(step):
            return
        raised = self._raised

        @functools.wraps(step)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            except BaseException:
                raised(args[0])
                raise

        self._made.add(guarded)
        owner.step = guarded

        def restore() -> None:
            if owner.__dict__.get("step") is guarded:
                owner.step = step

        self._undo.append(restore)

    def _wrap_instance(self, optimizer: Any) -> None:
        step = vars(optimizer)["step"]
        held, raised = weakref.ref(optimizer), self._raised

        @functools.wraps(step)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            except BaseException:
                raised(held())
                raise

        optimizer.step = guarded

        def restore() -> None:
            own = held()
            if own is not None and vars(own).get("step") is guarded:
                own.step = step

        self._undo.append(restore)

    def _raised(self, optimizer: Any) -> None:
        """The script's exception is on its way: nothing of ours may take its place."""
        for listener in list(self._listeners):
            try:
                listener.end(optimizer)
            except Exception:
                log.warning("esper-otel: an update could not be taken back", exc_info=True)


GUARDS = StepGuards()
"""Those of this process."""
