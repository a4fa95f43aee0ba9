"""Harvest: the grown model as a plain one, without hooks and without this package."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from esper_otel.kasmina.fossils import (
    LIST,
    NAMED,
    OURS,
    TUPLE,
    Grafted,
    calls_in_turn,
    is_ours,
    take_out,
)
from esper_otel.kasmina.lifecycle import GardenError

_NAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


def harvest(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """A copy of ``model`` in which the fossils at submodules ``paths`` are plain modules.

    In the place of such a submodule is a module that has it as ``host`` and its fossil beside
    it; an ``nn.Sequential`` has the fossil as its last. Raises :class:`GardenError` where
    that cannot be.
    """
    grown = copy.deepcopy(model)
    for path, module in [(path, grown.get_submodule(path)) for path in paths]:
        joined = module
        for each in take_out(module):
            if any(map(is_ours, each.fossil.modules())):
                raise GardenError(
                    f"slot {path!r}: its fossil needs {OURS}: expected modules of a blueprint "
                    "that torch.fx can trace, or none of this package in them"
                )
            if calls_in_turn(module):
                module.add_module(each.name, each.fossil)
            else:
                joined = _joined(path, joined, each)
        if module is grown:
            grown = joined
        elif joined is not module:
            _put_in_place(grown, module, joined)
    return grown


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
    for each in inspect.signature(host.forward).parameters.values():
        if each.kind not in _NAMED:
            raise GardenError(
                f"slot {path!r}: its forward takes {each}: expected named arguments only"
            )
        node = graph.placeholder(each.name, default_value=each.default)
        if each.kind is inspect.Parameter.KEYWORD_ONLY:
            options[each.name] = node
        else:
            arguments.append(node)
    output = graph.call_module("host", tuple(arguments), options)
    name, fossil, returns = grafted
    if returns in (TUPLE, LIST, NAMED):
        first = graph.call_function(operator.getitem, (output, 0))
        made: Any = graph.call_module(name, (first,))
        rest = graph.call_function(operator.getitem, (output, slice(1, None)))
        head: Any = [made] if returns == LIST else (made,)
        made = graph.call_function(operator.add, (head, rest))
    else:
        made = graph.call_module(name, (output,))
    graph.output(made)
    joined = fx.GraphModule({"host": host, name: fossil}, graph, "Grown")
    joined.training = host.training
    return joined
