"""Hooks on an optimizer's step that stay outside the graphs of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

StepHook = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], None]
"""Called with the optimizer and the arguments of its ``step``, the optimizer first."""


def untraced(hook: StepHook) -> StepHook:
    """``hook``, not traced when the step it is on is compiled, but called.

    Tracing it would bake its first call into the graph, or fail. Leaving the graph for it
    costs a graph break, of which torch's own optimizers have one at the same place.
    """
    disabled = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    is_compiling = torch.compiler.is_compiling

    def call(optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Calling ``disabled`` always would cost every step that is not compiled.
        (disabled if is_compiling() else hook)(optimizer, args, kwargs)

    return call
