"""Tools that touch a model whose seed is in any stage: its own result, or a clear error."""

from __future__ import annotations

import copy
import io
import logging
import os
import sys
import warnings
from collections import namedtuple
from functools import cache

import pytest
import torch
from kasmina.driven import MLP, Driven, host, idle
from kasmina.tools import SLOTS, STAGES, TOOLS, grown, outcome
from torch import nn

from esper_otel.kasmina.blending import Residual
from esper_otel.kasmina.blueprints import lookup
from esper_otel.kasmina.garden import Garden, GardenError
from esper_otel.kasmina.hook import SlotHook
from esper_otel.leyline import events
from testkit.fork_server import fork_server

pytestmark = pytest.mark.torch

ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    "OMP_NUM_THREADS": "1",
}

REFUSES = {
    ("torch.jit.script", "TRAINING"),
    ("torch.jit.script", "FOSSILIZED"),  # of the block, which returns a tuple
    *(
        (tool, "BLENDING")
        for tool in (
            "nn.DataParallel's replicas",
            "make_fx",
            "make_fx, fake tensors",
            "torch.fx.symbolic_trace",
            "torch.export",
            "torch.export, strict",
            "torch.export, saved",
            "torch.jit.trace",
            "torch.jit.script",
            "torch.onnx, the old exporter",
            "torch.compile, fullgraph",
        )
    ),
}


@pytest.fixture(autouse=True)
def _quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


@cache
def outcomes(
    stages: tuple[str, ...] = STAGES,
    slots: tuple[str, ...] = SLOTS,
    tools: tuple[str, ...] = (),
) -> dict[tuple[str, str], str]:
    """What came of each tool at each stage, in a process of its own: some could end it."""
    command = [sys.executable, "-m", "kasmina.tools", ",".join(stages), ",".join(slots), *tools]
    done = fork_server().run(command, env=ENV)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"it ended at {lines[-1:]}: {done.stderr[-2000:]}"
    return {(tool, stage): said for stage, tool, said in lines}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_gives_what_the_model_gives_or_a_clear_error(tool, stage):
    said = outcomes()[tool, stage]
    if (tool, stage) not in REFUSES:
        assert said == "equal"
        return
    assert said.startswith("GardenError: ")
    assert "garden.harvest()" in said
    if stage != "FOSSILIZED":
        assert f"in stage {stage}" in said
        assert "slot 'first'" in said or "slot 'middle'" in said


def test_before_its_first_call_script_asks_for_one():
    model = host()
    garden = Garden(model, ["1"])
    with pytest.raises(GardenError, match=r"slot '1' has not been called yet.*call the model"):
        torch.jit.script(model)
    assert type(copy.deepcopy(model)[1]) is nn.Tanh
    garden.uproot()
    torch.jit.script(model)


def test_script_reads_fossils_that_follow_one_tensor():
    said = outcomes(("FOSSILIZED",), ("first", "middle"), ("torch.jit.script",))
    assert said == {("torch.jit.script", "FOSSILIZED"): "equal"}


# The harvest.


@pytest.mark.parametrize("stage", STAGES)
def test_a_harvest_is_the_model_without_hooks_and_without_this_package(stage):
    driven = grown(stage)
    x, _ = driven.batch()
    keys = list(driven.host.state_dict())
    plain = driven.garden.harvest()
    assert torch.equal(plain(x), driven.host(x))
    assert list(driven.host.state_dict()) == keys
    for module in plain.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_pre_hooks
        assert not type(module).__module__.startswith("esper_otel")
    has = any("esper_fossil" in key for key in plain.state_dict())
    assert has == (stage in ("BLENDING", "FOSSILIZED"))
    assert torch.equal(torch.jit.script(plain)(x), driven.host(x))
    quantized = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.modules())


ELSEWHERE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "esper_otel":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(x), expected)
assert not [name for name in sys.modules if name.startswith("esper_otel")]
"""


def test_what_is_saved_can_be_loaded_where_this_package_is_not(tmp_path):
    harvested = grown("FOSSILIZED", ("1", "3"), make_host=host)
    planted = grown("DORMANT", ("1", "3"), make_host=host)
    x, _ = harvested.batch()
    for model in (harvested.garden.harvest(), planted.host):
        torch.save((model, x, model(x)), tmp_path / "model.pt")
        command = [sys.executable, "-c", ELSEWHERE, tmp_path / "model.pt"]
        done = fork_server().run(command, env=ENV)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("blending", ["convex", "residual", "channelwise", "confidence"])
@pytest.mark.parametrize(
    ("blueprint", "shape"),
    [
        ("residual_mlp", (2, 8)),
        ("low_rank", (2, 3, 8)),
        ("self_attention", (2, 3, 8)),
        ("self_attention", (2, 8, 3, 3)),
        ("squeeze_excite", (2, 8, 3, 3)),
        ("bottleneck_conv", (2, 8, 3, 3)),
    ],
)
def test_every_fossil_is_made_of_torch_alone(blueprint, shape, blending):
    from esper_otel.kasmina.blending import BLENDS

    model = nn.Sequential(nn.Identity(), nn.Identity())
    there = SlotHook("0", model[0])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model(x)
    there.attach(lookup(blueprint).build(shape, seed=1), BLENDS[blending](shape))
    there.set_alpha(0.75)
    expected = model(x)
    expected.square().sum().backward()
    gradients = [each.grad.clone() for each in there.parameters()]
    for each in there.parameters():
        each.grad = None
    there.fossilize()
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    assert [id(each) for each in model.parameters()] == [id(e) for e in there.parameters()]
    for each, gradient in zip(there.parameters(), gradients, strict=True):
        torch.testing.assert_close(each.grad, gradient)
    fossil = model[0].esper_fossil
    assert not any(type(m).__module__.startswith("esper_otel") for m in fossil.modules())
    assert torch.equal(torch.jit.script(fossil)(x), fossil(x))


Pair = namedtuple("Pair", ["hidden", "weights"])


@pytest.mark.parametrize(
    "returns", [lambda x: (x, 1), lambda x: [x, x], lambda x: Pair(x, 2), lambda x: (x,)]
)
def test_what_a_module_returns_stays_what_it_is(returns):
    class Inner(nn.Linear):
        def forward(self, x, *, twice=False):
            return returns(super().forward(x) * (2 if twice else 1))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner(4, 1)
            self.seen = []

        def forward(self, x):
            made = self.inner(x, twice=True)
            self.seen.append(type(made))
            assert len(made) == len(returns(x))
            return made[0]

    driven = grown("FOSSILIZED", ("inner",), make_host=Outer)
    x, _ = driven.batch()
    for model in (driven.garden.harvest(), copy.deepcopy(driven.host)):
        assert torch.equal(model(x), driven.host(x))
        assert model.seen[-1] is type(returns(x))


def test_a_forward_that_takes_anything_cannot_be_harvested_and_says_so():
    class Anything(nn.Linear):
        def forward(self, *given):
            return super().forward(*given)

    driven = grown("FOSSILIZED", ("0",), make_host=lambda: nn.Sequential(Anything(4, 1)))
    with pytest.raises(GardenError, match=r"slot '0': its forward takes \*given: expected"):
        driven.garden.harvest()


def test_what_is_quantized_of_a_model_with_fossils():
    model = grown("FOSSILIZED").host
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kept = [name for name, each in quantized.named_modules() if isinstance(each, nn.Linear)]
    assert kept == ["first"]
    assert len([each for each in model.modules() if isinstance(each, nn.Linear)]) == 10


# Where a fossil is, and what it is called.


def test_the_keys_of_a_fossil():
    driven = grown("FOSSILIZED")
    new = [key for key in driven.host.state_dict() if "esper_fossil" in key]
    assert {key.partition(".esper_fossil.seed.")[0] for key in new} == set(SLOTS)
    assert [key for key in driven.host.state_dict() if key not in new] == list(
        type(driven.host)().state_dict()
    )
    assert len(driven.host.middle) == 3
    driven.garden.uproot()
    assert list(driven.host.state_dict()) == list(type(driven.host)().state_dict())
    assert len(driven.host.middle) == 2
    assert type(driven.host.first) is nn.Linear


class Unpacks(nn.Sequential):
    def forward(self, x):
        first, last = self
        return last(first(x))


class Walks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.parametrize(
    "inner",
    [lambda: Unpacks(nn.Linear(4, 8), nn.Linear(8, 8)), Walks],
    ids=["unpacks", "walks"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_module_that_calls_whichever_children_it_has_gets_none_more(inner, stage):
    driven = grown(stage, ("0",), make_host=lambda: nn.Sequential(inner(), nn.Linear(8, 1)))
    model = driven.host
    x, _ = driven.batch()
    if stage == "BLENDING":  # a layer of the model itself would have to have it
        with pytest.raises(GardenError, match=r"which a copy would exclude.*FOSSILIZED"):
            copy.deepcopy(model)
        return
    assert len(list(model[0].children())) == 2
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(driven.garden.harvest()(x), model(x))
    if stage == "FOSSILIZED":
        assert any(".esper_fossil." in key for key in model.state_dict())
        alone = copy.deepcopy(model)
        driven.garden.uproot()
        assert not torch.equal(alone(x), model(x))
        assert not any("esper_fossil" in key for key in model.state_dict())


def test_a_module_that_is_not_python_is_no_slot():
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(GardenError, match=r"slot '0' is a .*Script.* no place"):
        Garden(nn.Sequential(scripted), ["0"])


def test_a_second_garden_grows_on_what_the_first_has_left():
    driven = grown("FOSSILIZED", ("1",), make_host=host)
    x, _ = driven.batch()
    model = copy.deepcopy(driven.host)
    there = SlotHook("1", model[1])
    model(x)
    there.attach(lookup(MLP).build((6, 8), seed=3), Residual())
    there.set_alpha(1.0)
    both = model(x)
    assert not torch.equal(both, driven.host(x))
    assert torch.equal(copy.deepcopy(model)(x), both)
    there.fossilize()
    assert torch.equal(model(x), both)
    assert torch.equal(copy.deepcopy(model)(x), both)
    assert hasattr(model[1], "esper_fossil_2")
    there.uproot()
    assert torch.equal(model(x), driven.host(x))
    assert torch.equal(copy.deepcopy(model)(x), driven.host(x))


# Averages and checkpoints.


def test_an_average_from_before_a_fossil_says_that_it_does_not_fit():
    driven = grown("DORMANT", ("1",), make_host=host)
    averaged = torch.optim.swa_utils.AveragedModel(driven.host)
    for _ in range(2):
        averaged.update_parameters(driven.host)
    other = grown("FOSSILIZED", ("1",), make_host=host)
    with pytest.raises(RuntimeError, match=r"must match the size of tensor|broadcast shape"):
        averaged.update_parameters(other.host)
    anew = torch.optim.swa_utils.AveragedModel(other.host)
    for _ in range(2):
        anew.update_parameters(other.host)


def test_an_average_that_follows_grows_along():
    driven = Driven(("1", "3"), settings={"plateau_steps": 1_000_000})
    averaged = torch.optim.swa_utils.AveragedModel(driven.host)
    driven.garden.follow(averaged.module)
    driven.step()
    driven.garden.germinate("1", MLP)
    for _ in range(60):
        driven.step()
        averaged.update_parameters(driven.host)
    assert driven.garden.slots["1"].name == "FOSSILIZED"
    assert list(averaged.module.state_dict()) == list(driven.host.state_dict())
    x, _ = driven.batch()
    alone = copy.deepcopy(averaged.module)
    assert torch.equal(alone(x), averaged(x))
    del alone[1]._modules["esper_fossil"]
    alone[1]._forward_hooks.clear()
    assert not torch.equal(alone(x), averaged(x))
    assert not torch.equal(driven.host(x), averaged(x))
    with pytest.raises(GardenError, match="slot '3' is no submodule"):
        driven.garden.follow(driven.host[:2])


def test_a_model_s_state_with_fossils_waits_for_the_garden_s(caplog):
    driven = grown("FOSSILIZED", ("1", "3"), make_host=host)
    x, _ = driven.batch()
    file = io.BytesIO(driven.saved())
    for knows_garden in (True, False):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        resumed = Driven(("1", "3"))
        resumed.garden.set_host_optimizer(resumed.optimizer)
        resumed.host.load_state_dict(state["model"])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "esper_otel"):
            if knows_garden:
                resumed.garden.load_state_dict(state["garden"])
                assert torch.equal(resumed.host(x), driven.host(x))
                resumed.host.load_state_dict(state["model"])  # the other order as well
                assert torch.equal(copy.deepcopy(resumed.host)(x), driven.host(x))
                assert torch.equal(torch.jit.script(resumed.host)(x), driven.host(x))
            else:
                for _ in range(2):
                    resumed.host(x)
        told = [each.getMessage() for each in caplog.records]
        assert len(told) == (0 if knows_garden else 1)
        assert knows_garden or "(1.esper_fossil, 3.esper_fossil)" in told[0]


def test_a_checkpoint_from_before_fossils_had_keys_still_fits():
    driven = grown("FOSSILIZED", ("1", "3"), make_host=host)
    x, _ = driven.batch()
    state = torch.load(io.BytesIO(driven.saved()), weights_only=True)
    state["model"] = {k: v for k, v in state["model"].items() if "esper_fossil" not in k}
    for slot in state["garden"]["slots"].values():
        del slot["returns"]
    file = io.BytesIO()
    torch.save(state, file)
    resumed = Driven(("1", "3")).resume(file.getvalue())
    resumed.host.eval()
    assert torch.equal(resumed.host(x), driven.host(x))


# torch.compile(fullgraph=True)


def compiled_life(*, sown: bool) -> Driven:
    torch.compiler.reset()
    driven = Driven(("1",), settings={"plateau_steps": 1_000_000})
    plain = driven.host
    whole = torch.compile(plain, backend="eager", fullgraph=True)

    def train_then(step=driven.train):
        driven.host = whole
        step()
        driven.host = plain

    driven.train = train_then
    plain(driven.batch()[0])  # once as it is: seeds fit
    driven.step(idle)
    if sown:
        driven.garden.germinate("1", MLP, "s")
    for _ in range(20):
        driven.step()
    return driven


def test_a_host_that_allows_no_graph_break_trains_on_without_a_seed():
    grew, bare = compiled_life(sown=True), compiled_life(sown=False)
    assert grew.losses == bare.losses
    assert grew.garden.stages == {}
    (told,) = grew.told(events.CULLED)
    assert "torch.compile(fullgraph=True)" in told
    (unused,) = grew.told(events.UNUSED_SLOT)
    assert "compile without fullgraph=True" in unused


def test_a_fossil_breaks_no_graph():
    driven = grown("DORMANT", ("1",), make_host=host)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(driven.host, backend=counting, fullgraph=True)
    x, _ = driven.batch()
    assert torch.equal(compiled(x), driven.host(x))
    there = driven.garden.slot("1").hook
    there.attach(lookup(MLP).build((6, 8), seed=3), Residual())
    there.set_alpha(1.0)
    there.fossilize()
    assert torch.equal(compiled(x), driven.host(x))
    assert len(graphs) == 2
    there.release()
    assert torch.equal(compiled(x), driven.host(x))
    assert len(graphs) == 2


def test_outcome_names_what_went_wrong():
    assert outcome("copy.deepcopy", "DORMANT", ("first",)) == "equal"
    assert "slot 'first'" in outcome("make_fx", "BLENDING", ("first",))
