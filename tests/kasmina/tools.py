"""What people do with a model, and a model whose seed is in a stage, to do it to.

Run as a script, with the names of stages, slots and tools, it prints what came of each tool at
each stage: some tools have ended the process.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from unittest.mock import patch

import torch
from kasmina.driven import MLP, QUICK, AtOnce, Driven, idle
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune

from esper_otel.kasmina.garden import Garden, GardenError
from esper_otel.kasmina.lifecycle import NEXT
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings

STAGES = ("DORMANT", "TRAINING", "BLENDING", "FOSSILIZED")

Made = Callable[[Tensor], Tensor]


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _scripted(model: nn.Module) -> Made:
    return torch.jit.script(model)


def _traced(model: nn.Module, x: Tensor) -> Made:
    with torch.no_grad():
        return torch.jit.trace(model, x)


def _old_onnx(model: nn.Module, x: Tensor) -> Made:
    """What the old exporter makes before it writes: its graph of the model."""
    graph, parameters, _ = torch.onnx.utils._model_to_graph(model, (x,))
    assert graph is not None
    # A number for each parameter that is in it: the host's and, as a constant, the fossil's.
    held = sum(each.numel() for each in parameters.values())
    assert held == sum(each.numel() for each in model.parameters()), held
    return model


def _exported(model: nn.Module, x: Tensor) -> Made:
    return torch.export.export(model, (x,), strict=False).module()


def _strictly_exported(model: nn.Module, x: Tensor) -> Made:
    return torch.export.export(model, (x,), strict=True).module()


def _exported_and_saved(model: nn.Module, x: Tensor) -> Made:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    return torch.export.load(file).module()


def _made_fx(model: nn.Module, x: Tensor) -> Made:
    return make_fx(model)(x)


def _fake_fx(model: nn.Module, x: Tensor) -> Made:
    parameters = dict(model.named_parameters())
    graph = make_fx(lambda given, x: functional_call(model, given, x), tracing_mode="fake")(
        parameters, x
    )
    return lambda x: graph(parameters, x)


def _symbolic(model: nn.Module) -> Made:
    return torch.fx.symbolic_trace(model)


def _mapped(model: nn.Module) -> Made:
    return vmap(lambda x: model(x[None])[0])


def _ensemble(model: nn.Module) -> Made:
    parameters, buffers = stack_module_state([copy.deepcopy(model), copy.deepcopy(model)])
    base = copy.deepcopy(model).to("meta")
    run = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), in_dims=(0, 0, None))
    return lambda x: run(parameters, buffers, x)[1]


def _called_functionally(model: nn.Module) -> Made:
    state = {name: each.detach().clone() for name, each in model.state_dict().items()}
    return lambda x: functional_call(model, state, (x,))


def _averaged(model: nn.Module) -> Made:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    if [*averaged.module.state_dict()] == [*model.state_dict()]:
        averaged.update_parameters(model)
    return averaged.eval()


def _compiled(model: nn.Module) -> Made:
    return torch.compile(model, backend="eager")


def _compiled_whole(model: nn.Module) -> Made:
    return torch.compile(model, backend="eager", fullgraph=True)


def _quantized(model: nn.Module) -> Made:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _pruned(model: nn.Module) -> Made:
    """All linear layers, by nothing, so that the result is the model's own."""
    model = copy.deepcopy(model)
    layers = [(each, "weight") for each in model.modules() if isinstance(each, nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0)
    for layer, name in layers:
        prune.remove(layer, name)
    return model


def _moved(model: nn.Module) -> Made:
    """All of it: what is left behind computes in another dtype, or not at all."""
    model = copy.deepcopy(model).double()
    assert {each.dtype for each in model.parameters()} == {torch.float64}
    return lambda x: model(x.double()).float()


def _replicated(model: nn.Module) -> Made:
    """As ``nn.DataParallel`` does where there are devices for it."""
    replicas = {each: each._replicate_for_data_parallel() for each in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            replica._parameters[name] = parameter.detach().clone()
    return replicas[model]


TOOLS: dict[str, Callable[..., Made]] = {
    "copy.deepcopy": copy.deepcopy,
    "copy.copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save(model)": _saved,
    "nn.DataParallel's replicas": _replicated,
    "torch.func.functional_call": _called_functionally,
    "torch.func.vmap": _mapped,
    "torch.func.stack_module_state": _ensemble,
    "make_fx": _made_fx,
    "make_fx, fake tensors": _fake_fx,
    "torch.fx.symbolic_trace": _symbolic,
    "torch.export": _exported,
    "torch.export, strict": _strictly_exported,
    "torch.export, saved": _exported_and_saved,
    "torch.jit.trace": _traced,
    "torch.jit.script": _scripted,
    "torch.onnx, the old exporter": _old_onnx,
    "torch.compile": _compiled,
    "torch.compile, fullgraph": _compiled_whole,
    "AveragedModel": _averaged,
    "quantize_dynamic": _quantized,
    "prune": _pruned,
    ".to": _moved,
    "garden.harvest": _as_it_is,
}
"""Tool → what it makes of a model, which must compute what the model does."""

NEEDS_INPUT = {
    _traced,
    _old_onnx,
    _exported,
    _strictly_exported,
    _exported_and_saved,
    _made_fx,
    _fake_fx,
}

ROUGHLY = {"quantize_dynamic": 0.2}
"""By how much more than rounding a result may differ, over the largest of the model's."""


class Block(nn.Module):
    """A module that is no layer, with two arguments and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        made = self.inner(x) * scale
        return made, x


class Host(nn.Module):
    """With a slot of each kind: a layer, a sequence, and a block that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.middle = nn.Sequential(nn.Tanh(), nn.Linear(8, 8))
        self.block = Block()
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x))
        x, _ = self.block(x)
        return self.last(x)


SLOTS = ("first", "middle", "block")


def grown(
    stage: str,
    slots: tuple[str, ...] = SLOTS,
    make_host: Callable[[], nn.Module] = Host,
) -> Driven:
    """A run with seeds in all ``slots``, which have come to ``stage``."""
    driven = Driven(garden=False)
    with (
        torch.random.fork_rng(devices=[]),
        patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce),
    ):
        torch.manual_seed(0)
        driven.host = make_host()
        driven.optimizer = torch.optim.SGD(driven.host.parameters(), lr=0.02)
        settings = {**QUICK, "plateau_steps": 1_000_000}
        driven.garden = Garden(driven.host, slots, settings=EsperSettings().changed(**settings))
    driven.step()
    for slot in slots if stage != "DORMANT" else ():
        driven.garden.germinate(slot, MLP)
    while set(driven.garden.slots.values()) != {Stage[stage]}:
        for _ in range(6):  # all dwell, and blend to the end
            driven.step(idle)
        for slot in slots:
            there = driven.garden.slot(slot)
            there.advance(NEXT[there.stage])
    if stage == "BLENDING":
        for _ in range(2):
            driven.step(idle)
    driven.host.eval()
    with torch.no_grad():
        for path in driven.garden.slots:
            for each in driven.garden.slot(path).hook.parameters():
                each.add_(0.3)  # or one could hardly tell the host alone
    return driven


def outcome(tool: str, stage: str, slots: tuple[str, ...] = SLOTS) -> str:
    """``equal``, ``differs by …``, or the error, of ``tool`` on a model in ``stage``."""
    warnings.simplefilter("ignore")
    torch.compiler.reset()
    return made_of(grown(stage, slots), tool)


def made_of(driven: Driven, tool: str) -> str:
    """What :func:`outcome` says, of a run that came to its stage."""
    model = driven.garden.harvest() if tool == "garden.harvest" else driven.host
    x, _ = driven.batch()
    expected = driven.host(x).detach()
    make = TOOLS[tool]
    try:
        made = make(model, x) if make in NEEDS_INPUT else make(model)
        got = made(x).detach()
    except GardenError as error:
        return f"GardenError: {error}"
    except Exception as error:
        garden_error = next((e for e in _chain(error) if isinstance(e, GardenError)), None)
        said = error if garden_error is None else garden_error
        text = " ".join(str(said).split())
        known = type(said).__name__ if "garden.harvest()" not in text else "GardenError"
        return f"{known}: {text[:300]}"
    now = driven.host(x).detach()
    if not torch.equal(now, expected):
        return f"the model itself changed by {float((now - expected).abs().max()):g}"
    allowed = 1e-5 + ROUGHLY.get(tool, 0.0) * float(expected.abs().max())
    difference = float((got - expected).abs().max())
    return "equal" if difference <= allowed else f"differs by {difference:g}"


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def print_in_a_fork(driven: Driven, tool: str) -> None:
    """What came of a tool, whose process it may end, and whose model is nobody's afterwards."""
    child = os.fork()
    if child == 0:
        try:
            print(made_of(driven, tool), flush=True)
        finally:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"{tool} ended its process: {status}")


def main(stages: list[str], slots: tuple[str, ...], tools: list[str]) -> None:
    """Print a line for each tool at each stage."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    x = torch.zeros(1, 1)
    for strict in () if tools else (True, False):  # import once what the first export does
        torch.export.export(nn.Linear(1, 1), (x,), strict=strict)
    for stage in stages:
        torch.compiler.reset()
        driven = grown(stage, slots)
        for tool in tools or TOOLS:
            print(f"{stage}\t{tool}\t", end="", flush=True)
            print_in_a_fork(driven, tool)


if __name__ == "__main__":
    main(sys.argv[1].split(","), tuple(sys.argv[2].split(",")), sys.argv[3:])
