"""Living: how a seed that is not a fossil yet takes part in a host's forward.

A forward hook calls it. Whoever copies, saves or replicates the module meanwhile, or writes
down what it does, gets all of it or an error that says what to do, and never the host
alone: the class of the module, while the hook is there, sees to that.
"""

from __future__ import annotations

import copy
import copyreg
import sys
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from esper_otel.kasmina.blending import Blend
from esper_otel.kasmina.fossils import Fossil, base_of, flatten, home_of, install
from esper_otel.kasmina.lifecycle import GardenError

UNBROKEN = (
    "runs in a graph that allows no break (torch.compile(fullgraph=True)), in which no seed "
    "can take part"
)
"""Reason when Dynamo must compile a slot's module and all around it into one graph."""

ADVICE = (
    "use garden.harvest(), which gives a model with it as it is now, or wait until it is "
    "FOSSILIZED, or remove it with garden.cull()"
)
"""What to do when a seed is in the way of a tool."""

_SYMBOLIC = {
    "ProxyTorchDispatchMode": "make_fx",
    "FakeTensorMode": "a trace with fake tensors",
    "FunctionalTensorMode": "a trace with functional tensors",
}


class Part(Protocol):
    """A slot's hook on the host, as far as it has to do with one forward."""

    name: str

    @property
    def occupant(self) -> str:
        """The seed in it and its stage, in words."""

    @property
    def takes_part(self) -> bool:
        """Whether the seed in it changes what the host computes."""

    @property
    def seed(self) -> nn.Module | None:
        """The seed's module."""

    @property
    def blend(self) -> Blend | None:
        """How it joins the host."""

    @property
    def alpha(self) -> float:
        """How much of it there is in the output."""

    @property
    def returns(self) -> str:
        """The kind of what the module returns, empty when nobody knows yet."""

    def alter_output(self, module: nn.Module, output: Any) -> Any:
        """What takes the place of ``output``; None when it stays."""

    def refuse(self, reason: str, remedy: str) -> None:
        """No seed can take part in how the host is called."""


class ForwardHook:
    """The forward hook of a slot in which there is a seed, or nobody knows yet what fits."""

    def __init__(self, owner: Part | None) -> None:
        self.owner = owner

        def stays_out() -> bool:
            return self._stays_out()

        # Dynamo calls it while it reads __call__, and takes the answer for a constant.
        stays_out._dynamo_marked_constant = True  # type: ignore[attr-defined]
        self.stays_out = stays_out

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """What takes the place of ``output``; None when it stays."""
        if torch.compiler.is_dynamo_compiling() and self.stays_out():
            return None
        return self._call(module, output)

    # What a seed does is its own affair: Dynamo neither traces it nor guards on it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _call(self, module: nn.Module, output: Any) -> Any:
        return None if self.owner is None else self.owner.alter_output(module, output)

    def _stays_out(self) -> bool:
        """Whether what Dynamo compiles just now allows no break, as each call of a seed is."""
        try:
            from torch._dynamo.symbolic_convert import InstructionTranslator

            now: Any = InstructionTranslator.current_tx()
            whole, exporting = bool(now.one_graph), bool(now.export)
        except Exception:  # another version of torch: a break is what there was before
            return False
        if whole and self.owner is not None:
            tool = "torch.export" if exporting else "torch.compile(fullgraph=True)"
            refuse_trace(self.owner, tool)
            if not exporting:
                self.owner.refuse(UNBROKEN, "compile without fullgraph=True")
        return whole

    # The module's class leaves the hook out of copies; this is for a module that has none.
    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHook:
        if self.owner is not None:
            refuse_trace(self.owner, "a copy")
        return ForwardHook(None)

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[None]]:
        if self.owner is not None:
            refuse_trace(self.owner, "a copy")
        return ForwardHook, (None,)


# Dynamo would compile the frame for each slot anew where it is not part of a larger one.
with suppress(ImportError):  # another version of torch: then it does
    from torch._dynamo.eval_frame import skip_code

    skip_code(ForwardHook.__call__.__code__)


class Seeded:
    """What the class of a module has besides that of its own while a hook is there."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = frozen(self).__reduce_ex__(protocol)  # type: ignore[arg-type]
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            # The same without that name, by which pickle expects the class of ``self``.
            return (object.__new__, *made[1:])
        return made

    def __prepare_scriptable__(self) -> Any:
        for part in _hooks(self):  # type: ignore[arg-type]
            # It replaces the modules of a model by what this returns, in the model itself.
            has, advice = f"has {part.occupant}", ADVICE
            if part.seed is None:
                has, advice = "has not been called yet", "call the model once"
            raise GardenError(
                f"esper-otel: slot {part.name!r} {has}, and torch.jit.script cannot read its "
                f"hook: {advice}"
            )
        return self

    def _replicate_for_data_parallel(self) -> Any:
        """A replica for ``nn.DataParallel``, as if there were no slot."""
        for part in _hooks(self):  # type: ignore[arg-type]
            refuse_trace(part, "nn.DataParallel")
            part.refuse(REPLICATED, "use DistributedDataParallel")
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica._forward_hooks = _others(replica)
        return replica


REPLICATED = "runs in replicas of nn.DataParallel, in which no seed can take part"
"""Reason when the host is replicated: what trains in a copy is thrown away with it."""


def frozen(module: nn.Module) -> nn.Module:
    """``module`` as a copy of it has to be: what it computes now, and no hook of a slot.

    A seed that takes part is a fossil in it, with the alpha that it has now; one that does
    not, because it is isolated, is left out. Nothing of ``module`` changes; parameters are
    shared.
    """
    base: type[nn.Module] = base_of(type(module), Seeded)
    twin: nn.Module = base.__new__(base)
    twin.__dict__.update(module.__dict__)
    twin._forward_hooks = _others(module)
    for part in _hooks(module):
        if not part.takes_part:
            continue
        seed, blend = part.seed, part.blend
        if home_of(module) != "" or seed is None or blend is None:
            refuse_trace(part, "a copy")
            continue
        twin._modules = dict(twin._modules)
        fossil = flatten(Fossil(seed, blend, part.alpha))
        install(twin, fossil, part.returns)
    return twin


def refuse_trace(part: Part, tool: str) -> None:
    """Raise :class:`GardenError` where ``tool`` would exclude a seed that takes part."""
    if part.takes_part:
        raise GardenError(
            f"esper-otel: slot {part.name!r} has {part.occupant}, which {tool} would "
            f"exclude: {ADVICE}"
        )


def tracer_at_work(output: Any) -> str:
    """Which tool writes down what is computed instead of computing it; empty when none does."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    exporting = getattr(torch.compiler, "is_exporting", None)
    if exporting is not None and exporting():
        return "torch.export"
    symbolic = sys.modules.get("torch.fx.proxy")
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if symbolic is not None and isinstance(first, symbolic.Proxy):
        return "torch.fx.symbolic_trace"
    for mode in _get_current_dispatch_mode_stack():
        tool = _SYMBOLIC.get(type(mode).__name__)
        if tool is not None:
            return tool
    return ""


def is_transformed(tensor: Tensor) -> bool:
    """Whether it is one of ``torch.func``: of ``vmap``, ``grad`` and the like."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _hooks(module: nn.Module) -> list[Part]:
    hooks = [each for each in module._forward_hooks.values() if isinstance(each, ForwardHook)]
    return [each.owner for each in hooks if each.owner is not None]


def _others(module: nn.Module) -> dict[int, Any]:
    """Its forward hooks but ours."""
    kept = copy.copy(module._forward_hooks)
    for key, hook in module._forward_hooks.items():
        if isinstance(hook, ForwardHook):
            del kept[key]
    return kept
