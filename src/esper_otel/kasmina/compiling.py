"""Compiling a seed in another process, without delaying a step.

``torch.compile`` cannot do it on a thread of the trainer: Dynamo, AOTAutograd and Inductor
each save the process's random state when they begin and put it back when they are done,
which takes back every number that training drew meanwhile, and they hold the interpreter
for tens of seconds. So a process of its own compiles forward and backward ahead of time
(:mod:`esper_otel.kasmina.compile_child`); what comes back is machine code, which is loaded
here in milliseconds and draws and restores nothing.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from esper_otel.kasmina.compile_child import BACKWARD, FORWARD, MODULE, PLAN
from esper_otel.kasmina.kernels import CompileError

LONGEST_S = 600.0
"""After which a compilation is given up."""

COMMAND = ["-m", "esper_otel.kasmina.compile_child"]
"""What the other process is to run; the folder comes behind it."""

TOLERANCE = 1e-3
"""By how much compiled and eager may differ, relative and absolute: code that is wrong is
wrong by more, and rounding in float32 by less."""


OLDEST = Version("2.6")
"""The oldest PyTorch that makes a package of compiled code in one file, as it is read here."""


def compile_apart(module: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """What computes as ``module`` does on inputs like ``example``, faster.

    Takes many seconds of another process and a C++ compiler. Parameters stay those of
    ``module``. An input of another shape or dtype, under autocast, or without gradients
    goes through ``module`` itself. Raises :class:`CompileError` with the cause.
    """
    if Version(torch.__version__) < OLDEST:
        raise CompileError(
            f"PyTorch {torch.__version__} cannot: {OLDEST} is the oldest that can"
        )
    if example.device.type != "cpu":
        raise CompileError(f"it computes on {example.device}: only the CPU's are compiled")
    if any(True for _ in module.buffers()):
        raise CompileError("it has buffers, which the compiled code could not change")
    if not all(parameter.requires_grad for parameter in module.parameters()):
        raise CompileError("it has parameters that are not trained")
    with tempfile.TemporaryDirectory(prefix="esper-seed-") as name:
        folder = Path(name)
        _run_child(module, example, folder)
        code = _Code(folder)
    # Of a copy: the training thread changes the parameters in the meantime.
    twin = copy.deepcopy(module).train()
    compiled = CompiledCall(twin, code, example)
    _compare(twin, compiled, example)
    if not is_faster(compiled, twin, example):
        raise CompileError("compiled, it is no faster")
    return CompiledCall(module, code, example)


CALLS = 20
"""Of each, to find out which is faster."""


class CompiledCall:
    """Calls a module by its compiled code where that is possible, and as it is elsewhere."""

    def __init__(self, module: nn.Module, code: _Code, example: Tensor) -> None:
        self._module = module
        self._code = code
        self._parameters = list(module.parameters())
        self._shape = example.shape
        self._dtype = example.dtype
        self.compiled_calls = 0
        """Calls that went through the compiled code."""

    def __call__(self, given: Tensor) -> Tensor:
        """What the module gives for ``given``."""
        if not self._suits(given):
            return cast(Tensor, self._module(given))
        self.compiled_calls += 1
        return cast(Tensor, _Compiled.apply(self._code, given, *self._parameters))

    def _suits(self, given: Tensor) -> bool:
        return (
            given.shape == self._shape
            and given.dtype == self._dtype == self._parameters[0].dtype
            and given.device.type == self._parameters[0].device.type == "cpu"
            and torch.is_grad_enabled()
            and self._module.training
            and not torch.is_autocast_enabled("cpu")
        )


class _Code:
    """Machine code of forward and backward."""

    def __init__(self, folder: Path) -> None:
        plan = json.loads((folder / PLAN).read_text())
        self._backward_wants: list[tuple[str, int]] = [
            (kind, place) for kind, place in plan["backward"]
        ]
        self._forward = _loaded(folder / FORWARD)
        self._backward = _loaded(folder / BACKWARD)

    def forward(self, primals: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The output, and what backward wants besides the primals."""
        made, *saved = self._forward.boxed_run(list(primals))
        return made, saved

    def backward(
        self, primals: list[Tensor], saved: list[Tensor], tangent: Tensor
    ) -> list[Tensor]:
        """Gradients of all primals."""
        at_hand = {"primal": primals, "saved": saved, "tangent": [tangent]}
        wanted = [at_hand[kind][place] for kind, place in self._backward_wants]
        gradients: list[Tensor] = self._backward.boxed_run(wanted)
        return gradients


class _Compiled(Function):
    @staticmethod
    def forward(ctx: Any, code: _Code, given: Tensor, *parameters: Tensor) -> Tensor:
        primals = [*parameters, given.contiguous()]
        made, saved = code.forward(primals)
        ctx.code, ctx.primals = code, len(primals)
        ctx.save_for_backward(*primals, *saved)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        held = list(ctx.saved_tensors)
        primals, saved = held[: ctx.primals], held[ctx.primals :]
        *parameters, given = ctx.code.backward(primals, saved, tangent.contiguous())
        return None, given, *parameters


def _run_child(module: nn.Module, example: Tensor, folder: Path) -> None:
    try:
        torch.save((module, example), folder / MODULE)
    except Exception as error:
        raise CompileError(f"it cannot be handed to another process: {error}") from None
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # One compiler at a time, and none of our own instrumentation in there.
    environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OTEL_SDK_DISABLED": "true"}
    with (
        (folder / "said").open("w+") as said,
        subprocess.Popen(
            [sys.executable, *COMMAND, str(folder)],
            stdin=subprocess.PIPE,  # by which it knows that we live
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=environ,
        ) as process,
    ):
        try:
            status = process.wait(LONGEST_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise CompileError(f"took longer than {LONGEST_S:g} s") from None
        said.seek(0)
        told = said.read().strip().splitlines()
    if status != 0:
        raise CompileError(told[-1] if told else f"the compiler ended with status {status}")


def _loaded(path: Path) -> Any:
    # What torch._inductor.aoti_load_package gives back is this with an importer of
    # hundreds of modules around it, and importing them holds the interpreter.
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)


def is_faster(
    one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], example: Tensor
) -> bool:
    """Whether ``one`` takes less time than ``other`` there and back; the best of some calls.

    In turns, so that a busy machine is as unkind to both.
    """
    given = example.detach().requires_grad_()
    best = [inf, inf]
    with torch.enable_grad():
        for _ in range(CALLS):
            for place, call in enumerate((one, other)):
                began = perf_counter()
                torch.autograd.grad(call(given).sum(), given)
                best[place] = min(best[place], perf_counter() - began)
    return best[0] < best[1]


def _compare(module: nn.Module, compiled: CompiledCall, example: Tensor) -> None:
    """Raise unless ``compiled`` gives what ``module`` gives, forward and backward."""
    given = example.detach().requires_grad_()
    with torch.enable_grad():
        inputs = [given, *module.parameters()]
        outcomes = [
            [made, *torch.autograd.grad(made.square().sum(), inputs)]
            for made in (module(given), compiled(given))
        ]
    for ours, theirs in zip(*outcomes, strict=True):
        if not torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE):
            raise CompileError("compiled, it computes something else")
