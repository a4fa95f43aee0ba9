"""What torch does with a host that has a slot: autocast, checkpointing, compiling, copying."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kasmina.slotted import conv_seed, host, noise, one, planted
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper_otel.kasmina import living
from esper_otel.kasmina.blending import Convex, Residual
from esper_otel.kasmina.blueprints import lookup
from esper_otel.kasmina.lifecycle import GardenError

pytestmark = pytest.mark.torch


def test_under_autocast_a_seed_keeps_its_parameters_whole() -> None:
    def run(seeded: bool):
        model = host()
        if seeded:
            there = planted(model)
            there.attach(conv_seed(), Convex())
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(noise((2, 1, 4, 4))).float().square().mean()
        loss.backward()
        if seeded:
            assert there.activation.dtype is torch.float32
            assert there.fallback == ""
            assert all(p.dtype is torch.float32 for p in there.parameters())
            assert all(p.grad is not None for p in there.parameters())
            there.set_alpha(0.5)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert model(noise((2, 1, 4, 4))).dtype is torch.bfloat16
            assert there.fallback == ""
        return [loss, *(parameter.grad for parameter in model.parameters())]

    assert all(map(torch.equal, run(seeded=True), run(seeded=False)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_seed_follows_the_dtype_of_its_host(dtype) -> None:
    model = nn.Linear(3, 4)
    there = one(model, lambda x, w: x * w, alpha=0.5)
    optimizer = torch.optim.SGD(there.parameters(), lr=0.1)
    model.to(dtype)
    model(noise((5, 3)).to(dtype)).sum().backward()
    assert there.fallback == ""
    assert there.seed.weight.dtype is dtype
    optimizer.step()
    assert there.seed.weight != 0.5


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_under_gradient_checkpointing_all_gradients_are_the_same(reentrant, alpha) -> None:
    def run(checkpointed: bool):
        model = host()
        there = planted(model)
        there.attach(conv_seed(), Convex())
        if alpha is not None:
            there.set_alpha(alpha)
        torch.manual_seed(3)
        given = noise((2, 1, 4, 4)).requires_grad_()
        if checkpointed:
            output = checkpoint(model, given, use_reentrant=reentrant)
        else:
            output = model(given)
        output.square().mean().backward()
        assert there.fallback == ""
        trained = [*model.parameters(), *there.parameters()]
        return [output, *(parameter.grad for parameter in trained)]

    assert all(map(torch.equal, run(checkpointed=True), run(checkpointed=False)))


# Dynamo hides this warning of its own from showing, which is too late where it is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_host_feels_its_seeds_as_an_eager_one_does() -> None:
    torch.compiler.reset()
    model, plain = host().eval(), host().eval()
    there, reference = planted(model), planted(plain)
    compiled = torch.compile(model, backend="eager")
    given = noise((2, 1, 4, 4))

    def agree() -> None:
        torch.testing.assert_close(compiled(given), plain(given))

    agree()
    agree()
    for each in (there, reference):
        each.attach(conv_seed(), Convex())
    model.train()
    plain.train()
    torch.manual_seed(0)
    compiled(given).square().mean().backward()
    torch.manual_seed(0)
    plain(given).square().mean().backward()
    assert there.calls == 1
    for mine, theirs in zip(
        [*model.parameters(), *there.parameters()],
        [*plain.parameters(), *reference.parameters()],
        strict=True,
    ):
        torch.testing.assert_close(mine.grad, theirs.grad)
    model.eval()
    plain.eval()
    alone = compiled(given)
    for alpha in (0.25, 0.5, 1.0):
        there.set_alpha(alpha)
        reference.set_alpha(alpha)
        agree()
        assert not torch.equal(compiled(given), alone)
    there.release()
    reference.release()
    agree()
    torch.compiler.reset()


@pytest.mark.parametrize("planted_first", [True, False])
def test_a_compiled_host_is_compiled_once_without_and_once_with_a_seed(planted_first) -> None:
    torch.compiler.reset()
    model = host().eval()
    given = noise((2, 1, 4, 4))
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return graph.forward

    with torch.no_grad():
        plain = model(given)
        compiled = torch.compile(model, backend=counting)
        if not planted_first:
            compiled(given)
        there = planted(model)
        for _ in range(3):
            compiled(given)
        for again in range(12):
            there.attach(conv_seed(), Convex())
            for step in range(1, 10):
                there.set_alpha(step / 10)
                assert not torch.equal(compiled(given), plain)
            there.release()
            assert torch.equal(compiled(given), plain)
            if again == 0:
                enough = len(compiles)
        assert len(compiles) == enough
    torch.compiler.reset()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_of_the_host_has_a_seed_that_takes_part_and_none_that_does_not(copied) -> None:
    model = nn.Linear(3, 4).eval()
    given = noise((2, 3))
    there = one(model, None)
    there.release()
    there.attach(lookup("residual_mlp").build((2, 4), seed=1), Convex())
    alone = copied(model)
    assert type(alone) is nn.Linear
    assert list(alone.state_dict()) == ["weight", "bias"]
    assert torch.equal(alone(given), model(given))
    there.set_alpha(0.5)
    twin = copied(model)
    assert torch.equal(twin(given), model(given))
    assert not torch.equal(twin(given), alone(given))
    assert len(twin.state_dict()) == 8
    assert len(model.state_dict()) == 2
    there.set_alpha(1.0)
    assert not torch.equal(twin(given), model(given))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(3, 4), lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 4))]
)
def test_the_forward_of_a_user_stays_whenever_it_came(make) -> None:
    model = make()
    there = planted(nn.Sequential(model))
    own = model.forward
    model.forward = lambda given: own(given) * 2
    given = noise((5, 3))
    twice = 2 * own(given)
    for change in (
        lambda: there.attach(lookup("residual_mlp").build((5, 4), seed=1), Residual()),
        there.fossilize,
        there.release,
    ):
        assert torch.equal(model(given), twice)
        change()
    assert torch.equal(model(given), twice)
    there.attach(lookup("residual_mlp").build((5, 4), seed=1), Convex())
    there.set_alpha(1.0)
    there.fossilize()
    assert torch.equal(model(given), there.seed(twice))


def test_a_replica_of_data_parallel_computes_with_its_own_parameters() -> None:
    model = nn.Linear(3, 4)
    heard = []
    model.register_forward_hook(lambda *_: heard.append(1))
    there = one(model, lambda x, w: x * w)
    replica = model._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros(4, 3), torch.ones(4)
    assert torch.equal(replica(noise((5, 3))), torch.ones(5, 4))
    assert heard == [1]
    model(noise((5, 3)))
    assert "DistributedDataParallel" in there.trouble
    assert there.activation is None
    assert there.fallback == living.REPLICATED
    there.start_step(sample=False)
    assert there.fallback == living.REPLICATED
    there.uproot()
    assert type(model) is nn.Linear
    there = one(nn.Linear(3, 4), lambda x, w: x * w, alpha=1.0)
    with pytest.raises(GardenError, match=r"slot .here. has .* which nn\.DataParallel would"):
        there._module._replicate_for_data_parallel()
