"""Fossils: seeds that have become part of the network, as ordinary submodules of it.

A fossil is a child of its slot's module, called :data:`FOSSIL`: parameters of the host keep
their names, the fossil's stand beside them, and what walks over modules, moves, copies,
saves, prunes or averages them finds it. A forward hook, of which torch's own shortcuts and
tracers know, lets it follow the host's forward, whichever that is; an ``nn.Sequential``
calls it by itself, as its last. It is made of torch alone (:func:`flatten`), with a forward
that tracers and compilers can read: no check, no clock, no gradient of our own.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Tuple  # noqa: UP035  (TorchScript reads Tuple)

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from esper_otel.kasmina.blending import Blend
from esper_otel.kasmina.lifecycle import GardenError

log = logging.getLogger("esper_otel")

FOSSIL = "esper_fossil"
"""Name of a fossil in the module that has it, and so in keys of a ``state_dict``. A second
one, planted into a model that has one, is called ``esper_fossil_2``."""

OURS = __name__.partition(".")[0]
"""The package that a harvested model does without."""

_NO_HOOK = -1

_WALKS = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
"""What a forward uses that calls its children one by one, whichever they are."""


class Fossil(nn.Module):
    """``seed`` as part of the network: its output joins the activation by ``blend``."""

    def __init__(self, seed: nn.Module, blend: Blend, alpha: float) -> None:
        super().__init__()
        self.seed = seed
        self.blend = blend
        self.alpha = alpha

    def forward(self, activation: Tensor) -> Tensor:
        """Shaped like ``activation``."""
        # Under autocast the two may differ.
        made = self.seed(activation).to(activation.dtype)
        joined: Tensor = self.blend(activation, made, self.alpha)
        return joined


def flatten(fossil: Fossil) -> nn.Module:
    """``fossil`` with the same parameters and names, and no class of this package in it.

    Its graph is written by calling its forward once with a stand-in for the activation and
    for all that is not ours. (``fx.symbolic_trace`` patches every module of the process
    while it works, and another thread may be calling one.) Where a module of somebody else's
    has ours inside and cannot be read like that, it is ``fossil`` itself.
    """
    flat: nn.Module = fossil
    tracer = fx.Tracer()
    tracer.root = fossil
    tracer.graph = fx.Graph()
    try:
        given = tracer.create_proxy("placeholder", "activation", (), {})
        made = _stand_in(fossil, "", tracer)(given)
        tracer.create_proxy("output", "output", (made,), {})
        for node in tracer.graph.find_nodes(op="get_attr"):
            next(iter(node.users)).prepend(node)  # so that parameters keep their order
        flat = fx.GraphModule(fossil, tracer.graph, "Fossil")
    except Exception as error:
        log.debug("a fossil stays as it is: %s: %s", type(error).__name__, error)
    flat.train(fossil.training)
    return flat


TENSOR, TUPLE, LIST = "tensor", "tuple", "list"
"""What a module may return; of several it is the first that a seed is about."""


def kind_of(output: Any) -> str:
    """Which of these ``output`` is, and of how many: ``tuple/2``; or what else, and its first
    field: ``Pair/hidden``.
    """
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return f"{type(output).__name__}/{output._fields[0]}"
    if isinstance(output, (tuple, list)):
        return f"{TUPLE if isinstance(output, tuple) else LIST}/{len(output)}"
    return TENSOR


class Joint(NamedTuple):
    """A fossil that was put in: the module that has it, its name there, and its hook."""

    home: nn.Module
    name: str
    handle: Any


def install(module: nn.Module, fossil: nn.Module, returns: str) -> Joint:
    """Let ``fossil`` follow ``module``, in its mode.

    ``returns`` is the kind of what the module returns, empty when that is not known.
    """
    path = home_of(module)
    if path is None:
        raise GardenError(f"{type(module).__name__}: expected a module that can have a fossil")
    home = module.get_submodule(path)
    names = itertools.chain([FOSSIL], (f"{FOSSIL}_{number}" for number in itertools.count(2)))
    name = next(each for each in names if each not in home._modules)
    fossil.train(module.training)
    home.add_module(name, fossil)
    handle = None
    if not calls_in_turn(module):
        hook: Callable[..., Any] = _JoinAt(f"{path}.{name}" if path else name, returns)
        if name == FOSSIL and not path and returns == TENSOR and _takes_one(module):
            hook = join_fossil
        handle = module.register_forward_hook(hook)
    mark(module, Grown)
    return Joint(home, name, handle)


def install_in_copies(
    copies: Iterable[weakref.ref[nn.Module]], path: str, fossil: nn.Module, returns: str
) -> None:
    """Let a copy of ``fossil`` follow the submodule at ``path`` of each of ``copies``."""
    for model in filter(None, (each() for each in copies)):
        try:
            module = model.get_submodule(path)
            own = next(module.parameters(), None)
            twin = copy.deepcopy(fossil).to(None if own is None else own.device)
            install(module, twin, returns)
        except Exception as error:  # it is the user's, and may have changed
            text = "a copy of the model does not get the fossil of slot %r: %s: %s"
            log.warning(text, path, type(error).__name__, error)


def remove(module: nn.Module, joint: Joint) -> None:
    """Take a fossil of ``module`` out again."""
    if joint.handle is not None:
        joint.handle.remove()
    joint.home._modules.pop(joint.name, None)
    if not _fossils(module):
        unmark(module, Grown)


class Grafted(NamedTuple):
    """A fossil that was taken out of a module: its name, and what it followed, how."""

    name: str
    fossil: nn.Module
    returns: str
    by_hook: bool


def take_out(module: nn.Module) -> list[Grafted]:
    """Take all fossils out of ``module``, say of a copy."""
    taken = []
    for key, path, returns in _fossils(module):
        module._forward_hooks.pop(key, None)
        home, _, name = path.rpartition(".")
        fossil = module.get_submodule(home)._modules.pop(name)
        assert fossil is not None
        taken.append(Grafted(name, fossil, returns, key != _NO_HOOK))
    unmark(module, Grown)
    return taken


def _fossils(module: nn.Module) -> list[tuple[int, str, str]]:
    """Of each fossil the number of its hook, its path, and what it follows."""
    found = []
    if isinstance(module, nn.Sequential):
        names = [name for name in module._modules if name.startswith(FOSSIL)]
        found = [(_NO_HOOK, name, TENSOR) for name in names]
    for key, hook in module._forward_hooks.items():
        if hook is join_fossil:
            found.append((key, FOSSIL, TENSOR))
        elif isinstance(hook, _JoinAt):
            found.append((key, hook.path, hook.returns))
    return found


def home_of(module: nn.Module) -> str | None:
    """Path in ``module`` of that which can have a child more; None when there is none.

    Mostly it is the module itself. One that calls whichever children it has is left as it
    is, and a layer inside has the fossil.
    """
    if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
        return None
    if calls_in_turn(module):
        return ""
    path: str
    for path, each in module.named_modules():
        inside = isinstance(each, torch.jit.ScriptModule | fx.GraphModule)
        container = isinstance(each, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if not (inside or container or _walks(each)):
            return path
    return None


def join_fossil(self: Any, given: Tuple[Tensor], output: Tensor) -> Tensor:  # noqa: UP006
    """The hook of a module from one tensor to one; ``torch.jit.script`` can read it."""
    joined: Tensor = self.esper_fossil(output)
    return joined


class _JoinAt:
    """The hook of any other module: the fossil at ``path`` in it follows the first tensor."""

    def __init__(self, path: str, returns: str) -> None:
        self.path = path
        self.returns = returns

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        fossil = module
        for name in self.path.split("."):
            fossil = getattr(fossil, name)
        # Not tuple | list, which the Dynamo of PyTorch 2.4 cannot trace.
        if isinstance(output, (tuple, list)):
            return with_first(output, fossil(output[0]))
        return fossil(output)


def first_tensor(output: Any) -> Tensor | None:
    """What a module returned, or the first of it; None when that is no tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def with_first(output: Any, tensor: Any) -> Any:
    """``output`` with ``tensor`` in the first place, of the same type."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, list):
        return [tensor, *output[1:]]
    if hasattr(output, "_make"):
        return output._make((tensor, *output[1:]))
    return (tensor, *output[1:])


# Classes of modules. torch.compile looks at the class of a module, and not whether it has
# hooks or children more than before: so one with a fossil is of a class of its own, which is
# as its base in all else.


class Grown:
    """What the class of a module with a fossil has besides that of its own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        own, base = type(self), base_of(type(self), Grown)
        made = super().__reduce_ex__(protocol)
        if not isinstance(made, tuple):
            return made
        call, arguments, *rest = made
        arguments = tuple(base if each is own else each for each in arguments)
        return (_grown_again, (call, arguments), *rest)

    def __prepare_scriptable__(self) -> Any:
        for hook in self._forward_hooks.values():  # type: ignore[attr-defined]
            if isinstance(hook, _JoinAt):
                raise GardenError(
                    f"esper-otel: torch.jit.script cannot read the hook of the fossil at "
                    f"{hook.path!r} in a {type(self).__name__}, which takes or returns more "
                    "than one tensor: script garden.harvest()"
                )
        return self


_made: dict[tuple[type, type], type] = {}


def marked(base: type, mark: type) -> type:
    """The class that has ``mark`` besides ``base``: for one base always the same."""
    made = _made.get((base, mark))
    if made is None:
        about = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        made = _made[base, mark] = type(base.__name__, (mark, base), about)
    return made


def base_of(marked_class: type, mark: type) -> type:
    """The class that has been given ``mark``."""
    return next(each for each in marked_class.__mro__ if each.__bases__[0] is mark).__bases__[1]


def mark(module: nn.Module, mark: type) -> None:
    """Let ``module`` be of the class that has ``mark`` besides its own."""
    if isinstance(module, mark):
        return
    try:
        # torch makes the class of a parametrized module, and takes it away by its base.
        if not parametrize.is_parametrized(module):
            module.__class__ = marked(type(module), mark)
            return
    except TypeError as error:  # a class that cannot be had with another
        log.debug("%s keeps its class: %s", type(module).__name__, error)
    _compile_again()


def unmark(module: nn.Module, mark: type) -> None:
    """Undo :func:`mark`, unless somebody has given the module another class since."""
    if type(module).__bases__[0] is mark:
        module.__class__ = type(module).__bases__[1]
    elif not isinstance(module, mark):
        _compile_again()


def _grown_again(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    module = call(*arguments)
    mark(module, Grown)
    return module


def _compile_again() -> None:
    """What was compiled does not see what has changed."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def calls_in_turn(module: nn.Module) -> bool:
    """Whether it calls its children one after the other: a fossil is the last of them."""
    own = type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__
    return own and isinstance(module, nn.Sequential)


def _takes_one(module: nn.Module) -> bool:
    try:
        return len(inspect.signature(module.forward).parameters) == 1
    except ValueError:  # one that Python cannot look into
        return False


def _walks(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not _WALKS.isdisjoint(code.co_names)


# Stand-ins, with which a forward of ours is written down.


def is_ours(thing: object) -> bool:
    """Whether its class is one of this package."""
    return type(thing).__module__.partition(".")[0] == OURS


class _Leaf(nn.Module):
    """Stands for the module at ``path``: a call of it is a call of that one."""

    def __init__(self, path: str, tracer: fx.Tracer) -> None:
        super().__init__()
        self.path = path
        self.tracer = tracer

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.tracer.create_proxy("call_module", self.path, arguments, options)


def _stand_in(module: nn.Module, path: str, tracer: fx.Tracer) -> nn.Module:
    if not any(map(is_ours, module.modules())):
        return _Leaf(path, tracer)
    within = f"{path}." if path else ""
    own = {**module._parameters, **module._buffers}
    stand_in = copy.copy(module)
    stand_in.__dict__.update(_parameters={}, _buffers={}, _modules={})
    for name, value in own.items():
        proxy = (
            None if value is None else tracer.create_proxy("get_attr", within + name, (), {})
        )
        stand_in.__dict__[name] = proxy
    for name, child in module._modules.items():
        if child is not None:
            stand_in._modules[name] = _stand_in(child, within + name, tracer)
    return stand_in
