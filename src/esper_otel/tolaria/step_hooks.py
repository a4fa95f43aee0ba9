"""Hooks on an optimizer's step, and wrappers around it within all hooks.

torch's own hooks tell of a step that begins and of one that ends well; :class:`StepHooks` calls
ours once per step and outside of compiled graphs. Of a step that raises torch tells nobody, and
hooks of the script's own run beside ours: :class:`AroundSteps` is nearest to the step. torch is
imported by whoever calls, never by this module.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Those of ``step``, its optimizer first."""

BeforeStep = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Arguments | None]
"""Called with the optimizer and the arguments of its ``step``; may return others for it."""

AfterStep = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], None]


class StepHooks:
    """Calls ``before`` and ``after`` around the outermost step of an optimizer.

    A class that extends another optimizer's, and calls its ``step``, has hooks around both:
    that is one step all the same.
    """

    def __init__(self, before: BeforeStep, after: AfterStep) -> None:
        self._before = before
        self._after = after
        self._depth: dict[int, int] = {}
        """Of optimizers within a step, by ``id``: how many steps deep."""

    def register(self, optimizer: Any) -> list[Any]:
        """On ``optimizer``; returns the handles that take them off."""
        return [
            optimizer.register_step_pre_hook(untraced(self._begins)),
            optimizer.register_step_post_hook(untraced(self._ended)),
        ]

    def register_for_all(self) -> list[Any]:
        """On every optimizer of this process; returns the handles that take them off."""
        # torch.optim deletes its attribute of this name; the module is public all the same.
        hooks = import_module("torch.optim.optimizer")
        return [
            hooks.register_optimizer_step_pre_hook(untraced(self._begins)),
            hooks.register_optimizer_step_post_hook(untraced(self._ended)),
        ]

    def _begins(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Arguments | None:
        key = id(optimizer)
        depth = self._depth.get(key, 0)
        if depth and _is_nested(optimizer):
            self._depth[key] = depth + 1
            return None
        self._depth[key] = 1  # a step before that raised has left it deep
        return self._before(optimizer, args, kwargs)

    def _ended(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        depth = self._depth.pop(id(optimizer), 1)
        if depth > 1:
            self._depth[id(optimizer)] = depth - 1
        else:
            self._after(optimizer, args, kwargs)


def _is_nested(optimizer: Any) -> bool:
    """Whether this is within a step of ``optimizer`` already, by the frames of torch's hooks.

    Looked at where a step seems to be nested only: it may as well be that the one before has
    raised, of which torch tells nobody.
    """
    steps, hooks_file = 0, _hooks_file()
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == hooks_file and frame.f_locals.get("self") is optimizer:
            steps += 1
        frame = frame.f_back  # type: ignore[assignment]
    return steps > 1


@functools.cache
def _hooks_file() -> str:
    """The file whose functions torch puts around the ``step`` of every optimizer."""
    import torch

    return torch.optim.Optimizer.profile_hook_step.__code__.co_filename


def untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, not traced when the step it is on is compiled, but called.

    Tracing it would bake its first call into the graph, or fail. Leaving the graph for it
    costs a graph break, of which torch's own optimizers have one at the same place.
    """
    import torch

    disabled = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    is_compiling = torch.compiler.is_compiling

    def call(optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        # Calling ``disabled`` always would cost every step that is not compiled.
        return (disabled if is_compiling() else hook)(optimizer, args, kwargs)

    return call


class AroundStep(Protocol):
    """Who does something around the steps of optimizers."""

    def is_prepared(self, optimizer: Any) -> bool:
        """Whether there is anything to do around the coming step of ``optimizer``."""

    def run(
        self,
        step: Callable[..., Any],
        optimizer: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call ``step``, or not; returns and raises what it does."""


class AroundSteps:
    """Calls others around the very ``step`` of optimizers' classes, within all hooks of torch.

    torch puts a function around each class's ``step``, which calls the hooks. What that one
    calls is exchanged in its closure, and not the attribute of the class: a scheduler, for
    example, has got hold of the function before. It is put back with the last who leaves.
    """

    def __init__(self) -> None:
        self._others: tuple[AroundStep, ...] = ()
        self._classes: weakref.WeakSet[type] = weakref.WeakSet()
        self._exchanged: list[tuple[Any, Any, Any]] = []
        """Cells, what was in them, and what is."""

    def watch(self, optimizer: Any, other: AroundStep) -> bool:
        """Call ``other`` around steps of ``optimizer``'s class; False where it cannot be."""
        if other not in self._others:
            self._others = (*self._others, other)
        cls = type(optimizer)
        if cls in self._classes:
            return True
        cells = [
            cell
            for owner in cls.__mro__
            if (cell := _cell_of(owner.__dict__.get("step"))) is not None
        ]
        for cell in cells:
            if not any(cell is known for known, _, _ in self._exchanged):
                step = cell.cell_contents
                cell.cell_contents = ours = self._around(step)
                self._exchanged.append((cell, step, ours))
        if cells:
            self._classes.add(cls)
        return bool(cells)

    def leave(self, other: AroundStep) -> None:
        """``other`` is called no more."""
        self._others = tuple(each for each in self._others if each is not other)
        if self._others:
            return
        for cell, step, ours in self._exchanged:
            if cell.cell_contents is ours:
                cell.cell_contents = step
        self._exchanged.clear()
        self._classes.clear()

    def _around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        @functools.wraps(step)
        def around(*args: Any, **kwargs: Any) -> Any:
            if is_compiling():  # this is not for the graph; the step itself is
                return uncompiled(*args, **kwargs)
            for other in self._others:
                if other.is_prepared(args[0]):
                    return other.run(step, args[0], args, kwargs)
            return step(*args, **kwargs)

        is_compiling = torch.compiler.is_compiling
        uncompiled = torch.compiler.disable(around, recursive=False)  # type: ignore[no-untyped-call]
        return around


def _cell_of(step: Any) -> Any:
    """The cell in which torch's function around a class's step holds it, None without one."""
    while step is not None:
        code = getattr(step, "__code__", None)
        if code is not None and code.co_filename == _hooks_file() and step.__closure__:
            cells = dict(zip(code.co_freevars, step.__closure__, strict=True))
            if "func" in cells and getattr(step, "hooked", False):
                return cells["func"]
        step = getattr(step, "__wrapped__", None)
    return None


AROUND_STEPS = AroundSteps()
"""Those of this process."""
