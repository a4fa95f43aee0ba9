"""Hooks around an optimizer's step, once per step and outside of compiled graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Those of ``step``, its optimizer first."""

BeforeStep = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Arguments | None]
"""Called with the optimizer and the arguments of its ``step``; may return others for it."""

_HOOKS_FILE = torch.optim.Optimizer.profile_hook_step.__code__.co_filename

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
    steps = 0
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _HOOKS_FILE and frame.f_locals.get("self") is optimizer:
            steps += 1
        frame = frame.f_back  # type: ignore[assignment]
    return steps > 1


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
