"""Compiling a seed in another process, while this one trains and draws random numbers."""

from __future__ import annotations

import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kasmina.driven import Driven, host
from packaging.version import Version
from torch import Tensor, nn

from esper_otel.kasmina import compile_child, compiling
from esper_otel.kasmina.blueprints import lookup
from esper_otel.kasmina.compiling import compile_apart
from esper_otel.kasmina.garden import Garden
from esper_otel.kasmina.kernels import (
    Activation,
    Compilation,
    CompileError,
    KernelFetcher,
)
from esper_otel.leyline import events
from esper_otel.settings import EsperSettings
from testkit.fork_server import fork_server
from testkit.patience import PATIENCE_S

pytestmark = pytest.mark.torch

SHAPE = torch.Size((6, 8))
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or Version(torch.__version__) < compiling.OLDEST,
    reason=f"compiling a seed needs g++ and PyTorch {compiling.OLDEST}",
)


def built() -> nn.Module:
    return lookup("residual_mlp").build(SHAPE, seed=3)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws(count: int) -> list[Any]:
    """From all three generators that a training loop uses."""
    return [
        (random.random(), float(np.random.random()), float(torch.rand(())))
        for _ in range(count)
    ]


def seed_all() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


NOT_LAST = """
import os, sys
sys.argv[0] = "compile_child"
os.nice = lambda steps: 0
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"
from esper_otel.kasmina.compile_child import main
main()
"""
"""The child with the priority of a test: on a machine whose processors others want as well,
what comes after everybody takes minutes. One process compiles, a fork that has torch, and not a
pool of them that import it. The code around the kernels is not optimized: it is most."""


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Any]]:
    """One seed, compiled by a fetcher's thread while this one draws; it takes a while."""
    with pytest.MonkeyPatch.context() as patch:
        forked = [*fork_server().prefix[1:], sys.executable]
        patch.setattr(compiling, "COMMAND", [*forked, "-c", NOT_LAST])
        yield _compiled()


def _compiled() -> dict[str, Any]:
    seed_all()
    fetcher = KernelFetcher(compiler=compile_apart)
    module = built()
    compilation = fetcher.compile(module, Activation(SHAPE))
    drawn: list[Any] = []
    looks = 0
    while not compilation.done():
        drawn += draws(1)
        looks += 1
        time.sleep(0.02)  # the compiler wants a processor, too
    after = draws(50)
    fetcher.stop()
    return {
        "module": module,
        "call": compilation.call,
        "reason": compilation.reason,
        "drawn": drawn + after,
        "looks": looks,
    }


def test_a_pytorch_that_cannot_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(CompileError, match=r"PyTorch 2\.5\.1\+cpu cannot: 2\.6 is the oldest"):
        compile_apart(built(), noise(6, 8))


@needs_compiler
@pytest.mark.timeout(600)
def test_who_draws_meanwhile_draws_what_would_have_come(compiled) -> None:
    assert compiled["reason"] == ""
    # Nobody waited: the loop went round all the time.
    assert compiled["looks"] > 100
    seed_all()
    assert compiled["drawn"] == draws(len(compiled["drawn"]))


@needs_compiler
@pytest.mark.timeout(600)
def test_outputs_and_gradients_are_those_of_the_module(compiled) -> None:
    module, call = compiled["module"], compiled["call"]
    given = noise(*SHAPE).requires_grad_()

    def run(function) -> list[Tensor]:
        made = function(given)
        loss = made.sin().sum()
        return [made, *torch.autograd.grad(loss, [given, *module.parameters()])]

    with torch.no_grad():
        for parameter in module.parameters():  # trained meanwhile, in place
            parameter.add_(0.1)
    before = call.compiled_calls
    for ours, theirs in zip(run(call), run(module), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert call.compiled_calls == before + 1


@needs_compiler
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "how", ["another batch", "evaluation", "no gradients", "autocast", "float64"]
)
def test_what_it_was_not_compiled_for_goes_through_the_module(compiled, how) -> None:
    module, call = compiled["module"], compiled["call"]
    given = noise(4 if how == "another batch" else SHAPE[0], SHAPE[1])
    before = call.compiled_calls
    try:
        module.train(how != "evaluation")
        if how == "float64":
            module.double()
            given = given.double()
        with (
            torch.set_grad_enabled(how != "no gradients"),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"),
        ):
            assert torch.equal(call(given), module(given))
    finally:
        module.train().float()
    assert call.compiled_calls == before


# --- where it does not work out


def refused(module: nn.Module, example: Tensor | None = None) -> str:
    with pytest.raises(CompileError) as error:
        compile_apart(module, noise(*SHAPE) if example is None else example)
    return str(error.value)


@pytest.mark.parametrize(
    ("module", "example", "why"),
    [
        (nn.BatchNorm1d(8), None, "it has buffers"),
        (nn.Linear(8, 8).requires_grad_(False), None, "parameters that are not trained"),
        (nn.Linear(8, 8), torch.zeros(6, 8, device="meta"), "it computes on meta"),
    ],
)
def test_what_cannot_be_compiled_is_said(module, example, why) -> None:
    assert why in refused(module, example)


def test_a_module_that_cannot_be_handed_over_is_said() -> None:
    module = nn.Linear(8, 8)
    module.extra = threading.Lock()
    assert "it cannot be handed to another process" in refused(module)


def test_the_last_word_of_a_child_that_failed_is_the_reason(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "COMMAND", ["-c", "import sys; sys.exit('No: g++ is gone')"])
    assert refused(built()) == "No: g++ is gone"


def test_a_child_that_takes_too_long_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "COMMAND", ["-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(compiling, "LONGEST_S", 0.2)
    assert refused(built()) == "took longer than 0.2 s"


def test_a_child_ends_with_its_trainer() -> None:
    theirs, ours = os.pipe()
    child = os.fork()  # which has imported torch
    if child == 0:
        os.dup2(theirs, 0)
        os.close(ours)
        threading.Thread(target=compile_child.die_with_parent, daemon=True).start()
        time.sleep(PATIENCE_S)
        os._exit(0)
    try:
        os.close(theirs)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it lives while the pipe does"
    finally:
        os.close(ours)
        status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 1


@pytest.mark.parametrize(
    ("outcome", "passed"),
    [("", True), ("InvalidCxxCompiler: No working C++ compiler found", False)],
)
def test_the_garden_tells_what_came_of_it(outcome, passed) -> None:
    compilation = Compilation()
    driven = Driven()
    fetcher = driven.garden._context.fetcher
    fetcher.compile = lambda module, activation: compilation
    driven.step()
    seed_id = driven.garden.germinate("1", "residual_mlp")
    driven.step()
    driven.step()
    hook = driven.garden.slot("1").hook
    calls: list[Tensor] = []

    def call(given: Tensor) -> Tensor:
        calls.append(given)
        return hook.seed(given)

    compilation.set_result(call if passed else None, outcome)
    for _ in range(3):
        driven.step()
    (event,) = [each for each in driven.events if each.name == events.COMPILED]
    assert event.attributes["esper.seed.id"] == seed_id
    assert event.attributes["esper.passed"] is passed
    assert event.attributes["esper.reason"] == outcome
    assert bool(calls) is passed
    assert driven.garden.stages[seed_id].name != "CULLED"


def test_what_is_no_faster_is_not_taken(monkeypatch) -> None:
    module = built()
    slow = nn.Sequential(*[built() for _ in range(8)])
    assert compiling.is_faster(module, slow, noise(*SHAPE))
    assert not compiling.is_faster(slow, module, noise(*SHAPE))


@pytest.mark.parametrize("asked", [True, False])
def test_the_settings_ask_for_it(asked) -> None:
    garden = Garden(host(), ["1"], settings=EsperSettings(compile_seeds=asked))
    garden.close()
    compiler = garden._context.fetcher._compiler
    assert compiler is (compile_apart if asked else None)
