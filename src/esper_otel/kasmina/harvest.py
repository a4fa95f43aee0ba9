"""Harvest: the grown model as a plain one, without hooks and without this package."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterable
from typing import Any, get_type_hints

import torch
from torch import Tensor, fx, nn

from esper_otel.kasmina.fossils import (
    LIST,
    OURS,
    TUPLE,
    Grafted,
    is_ours,
    take_out,
)
from esper_otel.kasmina.lifecycle import GardenError

_NAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)
_SIMPLE = (Tensor, bool, int, float, str)
"""Types of arguments that ``torch.jit.script`` has to know of."""


def harvest(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """A copy of ``model`` in which the fossils at submodules ``paths`` are plain modules.

    In the place of such a submodule is a module that has it as ``host`` and its fossil beside
    it; an ``nn.Sequential`` has the fossil as its last. Raises :class:`GardenError` where
    that cannot be.
    """
    grown = copy.deepcopy(model)
    for key in list(model._load_state_dict_pre_hooks):
        if is_ours(getattr(model._load_state_dict_pre_hooks[key], "hook", None)):
            del grown._load_state_dict_pre_hooks[key]
    for path, module in [(path, grown.get_submodule(path)) for path in paths]:
        joined = module
        for each in take_out(module):
            if any(map(is_ours, each.fossil.modules())):
                raise GardenError(
                    f"slot {path!r}: its fossil needs {OURS}: expected modules of a blueprint "
                    "that torch.fx can trace, or none of this package in them"
                )
            if each.by_hook:
                joined = _joined(path, joined, each)
            else:
                module.add_module(each.name, each.fossil)
        if module is grown:
            grown = joined
        elif joined is not module:
            _put_in_place(grown, module, joined)
    return grown


def _hints(host: nn.Module) -> dict[str, Any]:
    try:
        return get_type_hints(type(host).forward)
    except Exception:  # names that only a type checker knows
        return {}


def _put_in_place(model: nn.Module, module: nn.Module, joined: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module and parent is not joined:
                parent._modules[name] = joined


def _joined(path: str, host: nn.Module, grafted: Grafted) -> nn.Module:
    """A module that calls ``host``, and the fossil with what comes out of it."""
    graph = fx.Graph()
    arguments: list[Any] = []
    options: dict[str, Any] = {}
    hints = _hints(host)
    for each in inspect.signature(host.forward).parameters.values():
        if each.kind not in _NAMED:
            raise GardenError(
                f"slot {path!r}: its forward takes {each}: expected named arguments only"
            )
        hint = hints.get(each.name)
        node = graph.placeholder(
            each.name, hint if hint in _SIMPLE else None, default_value=each.default
        )
        if each.kind is inspect.Parameter.KEYWORD_ONLY:
            options[each.name] = node
        else:
            arguments.append(node)
    output = graph.call_module("host", tuple(arguments), options)
    name, fossil, returns, _ = grafted
    kind, _, size = returns.partition("/")
    if kind in (TUPLE, LIST):
        first, *rest = (
            graph.call_function(operator.getitem, (output, at)) for at in range(int(size))
        )
        # What there is more of, another time, must not be lost without a word.
        length = graph.call_function(len, (output,))
        same = graph.call_function(operator.eq, (length, int(size)))
        text = f"slot {path!r} returned {size} when it was harvested: expected as many"
        graph.call_function(torch._assert, (same, text))
        made: Any = (graph.call_module(name, (first,)), *rest)
        made = list(made) if kind == LIST else made
    elif size:
        first = graph.call_function(operator.getitem, (output, 0))
        made = graph.call_method(
            "_replace", (output,), {size: graph.call_module(name, (first,))}
        )
    else:
        made = graph.call_module(name, (output,))
    graph.output(made)
    joined = fx.GraphModule({"host": host, name: fossil}, graph, "Grown")
    joined.training = host.training
    return joined
