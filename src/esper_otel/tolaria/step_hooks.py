"""Hooks around an optimizer's step, once per step and outside of compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from esper_otel.tolaria.step_guards import GUARDS

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
            self,
        ]

    def register_for_all(self) -> list[Any]:
        """On every optimizer of this process; returns the handles that take them off."""
        # torch.optim deletes its attribute of this name; the module is public all the same.
        hooks = import_module("torch.optim.optimizer")
        return [
            hooks.register_optimizer_step_pre_hook(untraced(self._begins)),
            hooks.register_optimizer_step_post_hook(untraced(self._ended)),
            self,
        ]

    def remove(self) -> None:
        """The hooks have been taken off."""
        GUARDS.leave(self)

    def end(self, optimizer: Any) -> None:
        """A step of ``optimizer`` has raised, so that its hook was not called."""
        self._depth.pop(id(optimizer), None)

    def _begins(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Arguments | None:
        key = id(optimizer)
        depth = self._depth.get(key, 0)
        if depth and _may_nest(type(optimizer)):
            GUARDS.watch(optimizer, self)  # one that raises must not stay deep for ever
            self._depth[key] = depth + 1
            return None
        # Deep and not nested: the step before has raised, of which nobody told.
        self._depth[key] = 1
        return self._before(optimizer, args, kwargs)

    def _ended(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        depth = self._depth.pop(id(optimizer), 1)
        if depth > 1:
            self._depth[id(optimizer)] = depth - 1
        else:
            self._after(optimizer, args, kwargs)


def _may_nest(cls: type) -> bool:
    """Whether several classes of ``cls`` have a ``step`` that torch has put hooks around."""
    hooked = 0
    for owner in cls.__mro__:
        hooked += getattr(owner.__dict__.get("step"), "hooked", False) is True
    return hooked > 1


def untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, not traced when the step it is on is compiled, but called.

    Tracing it would bake its first call into the graph, or fail. Leaving the graph for it
    costs a graph break, of which torch's own optimizers have one at the same place.
    """
    disabled = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    is_compiling = torch.compiler.is_compiling

    def call(optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        # Calling ``disabled`` always would cost every step that is not compiled.
        return (disabled if is_compiling() else hook)(optimizer, args, kwargs)

    return call
