"""A slot in a host: what the host feels of it in each of its states."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections import namedtuple
from math import inf, nan

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper_otel.kasmina import hook as slot
from esper_otel.kasmina import isolation, living
from esper_otel.kasmina.blending import ChannelWise, Convex, Residual
from esper_otel.kasmina.blueprints import lookup
from esper_otel.kasmina.hook import SlotHook
from esper_otel.kasmina.lifecycle import GardenError

pytestmark = pytest.mark.torch

LOSSES = 4


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(shape, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def host() -> nn.Sequential:
    """With what makes trouble: work in place behind the slot, and random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 3),
    )


def conv_seed() -> nn.Module:
    return lookup("bottleneck_conv").build((2, 8, 4, 4), seed=1)


def planted(model: nn.Sequential, at: str = "0") -> SlotHook:
    return SlotHook(at, model.get_submodule(at))


def train(model: nn.Module, between=lambda step: None, steps: int = LOSSES):
    """Losses, gradients of every step, and weights at the end, all as bytes; and the RNG."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    seen: list[bytes] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(noise((2, 1, 4, 4), step)).square().mean()
        loss.backward()
        seen.append(loss.detach().numpy().tobytes())
        seen += [parameter.grad.numpy().tobytes() for parameter in model.parameters()]
        optimizer.step()
        between(step)
    seen += [value.numpy().tobytes() for value in model.state_dict().values()]
    return seen, torch.get_rng_state().tolist()


class Does(nn.Module):
    """A seed that does what a test says."""

    def __init__(self, does) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.does = does

    def forward(self, given):
        return self.does(given, self.weight)


def one(model: nn.Module, does, *, alpha: float | None = None) -> SlotHook:
    """A slot at ``model`` with a seed that ``does``, isolated or blended."""
    there = SlotHook("here", model)
    there.attach(Does(does), Convex())
    if alpha is not None:
        there.set_alpha(alpha)
    return there


# --- dormant, isolated, gone: the host is what it would be alone


def test_a_dormant_slot_changes_nothing() -> None:
    alone = train(host())
    model = host()
    keys, modules = list(model.state_dict()), list(model.modules())
    slots = [SlotHook(str(index), module) for index, module in enumerate(model)]
    assert train(model) == alone
    assert list(model.state_dict()) == keys
    assert list(model.modules()) == modules
    assert all(there.activation is not None for there in slots)


def test_a_slot_without_a_seed_has_no_hook_once_it_was_called() -> None:
    model = host()

    def traces() -> tuple[int, bool]:
        return len(model[0]._forward_hooks), type(model[0]) is not nn.Conv2d

    there = planted(model)
    assert traces() == (1, True)
    model(noise((2, 1, 4, 4)))
    for _ in range(2):
        assert traces() == (0, False)
        there.attach(conv_seed(), Convex())
        assert traces() == (1, True)
        there.release()
    assert traces() == (0, False)


def test_a_forward_that_somebody_else_put_there_stays() -> None:
    model = nn.Linear(3, 4)
    theirs = model.forward = lambda given: given
    there = SlotHook("here", model)
    there.uproot()
    assert model.forward is theirs


@pytest.mark.parametrize("at", ["0", "1", "4"])
def test_an_isolated_seed_learns_and_the_host_does_not_feel_it(at) -> None:
    alone = train(host())
    model = host()
    there = planted(model, at)
    name = "residual_mlp" if at == "4" else "bottleneck_conv"
    seed = lookup(name).build((2, 3) if at == "4" else (2, 8, 4, 4), seed=1)
    there.attach(seed, Convex())
    optimizer = torch.optim.Adam(there.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in there.parameters()]

    def learn(step: int) -> None:
        assert there.fallback == ""
        assert not there.leaked
        optimizer.step()
        optimizer.zero_grad()
        there.start_step(sample=step % 2 == 0)

    assert train(model, learn) == alone
    for parameter, old in zip(there.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)


def test_an_isolated_seed_gets_the_gradient_of_the_slot() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    there = planted(model)
    there.attach(Does(lambda x, w: x * w), Convex())
    given, hidden = noise((5, 3)), []
    model[1].register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    loss = model(given).square().sum()
    (gradient,) = torch.autograd.grad(loss, hidden[0], retain_graph=True)
    loss.backward()
    activation = model[0].weight.detach() @ given.T + model[0].bias.detach()[:, None]
    torch.testing.assert_close(there.seed.weight.grad, (gradient * activation.T).sum())


def test_uprooting_gives_the_host_back() -> None:
    model = host()
    hooks = dict(model[0]._forward_hooks)
    there = planted(model)
    there.attach(conv_seed(), Convex())
    there.set_alpha(0.5)
    train(model, steps=1)
    there.uproot()
    assert dict(model[0]._forward_hooks) == hooks
    model.load_state_dict(host().state_dict())
    assert train(model) == train(host())


# --- blended


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_a_blended_seed_trains_together_with_the_host(alpha) -> None:
    model, plain = nn.Linear(3, 4), nn.Linear(3, 4)
    plain.load_state_dict(model.state_dict())
    there = one(model, lambda x, w: torch.tanh(x * w), alpha=alpha)
    given, upstream = noise((5, 3)), noise((5, 4), 2)
    got = model(given)
    weight = torch.tensor(0.5, requires_grad=True)
    h = plain(given)
    expected = (1 - alpha) * h + alpha * torch.tanh(h * weight)
    torch.testing.assert_close(got, expected)
    got.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(model.weight.grad, plain.weight.grad)
    if alpha:
        torch.testing.assert_close(there.seed.weight.grad, weight.grad)
    else:
        assert there.seed.weight.grad is None


def test_at_alpha_0_the_host_is_alone_to_the_bit() -> None:
    alone = train(host())
    model = host()
    there = planted(model)
    there.attach(conv_seed(), Convex())
    there.set_alpha(0.0)
    assert train(model) == alone
    assert there.calls == 0


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Identity()])
def test_the_host_may_go_on_in_place(alpha, last) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    there = planted(model)
    there.attach(nn.Sequential(nn.Linear(4, 4), last), Convex())
    there.set_alpha(alpha)
    model(noise((5, 3))).sum().backward()
    assert there.fallback == ""


def test_the_gates_of_a_blend_are_trained_too() -> None:
    model = nn.Linear(3, 4)
    there = planted(nn.Sequential(model))
    there.attach(nn.Linear(4, 4), ChannelWise((5, 4)))
    assert len(list(there.parameters())) == 3
    there.set_alpha(0.5)
    model(noise((5, 3))).sum().backward()
    assert all(parameter.grad is not None for parameter in there.parameters())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, nan, inf])
def test_an_alpha_outside_0_and_1_is_refused(alpha) -> None:
    there = SlotHook("features.3", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"slot 'features.3': alpha=.*: expected 0 to 1"):
        there.set_alpha(alpha)


def test_one_seed_at_a_time() -> None:
    there = one(nn.Linear(2, 2), lambda x, w: x * w)
    with pytest.raises(ValueError, match="slot 'here': expected it empty"):
        there.attach(nn.Linear(2, 2), Convex())


# --- culled


def optimizer_steps(optimizer):
    return lambda step: optimizer.step()


def test_a_seed_culled_at_alpha_a_half_leaves_nothing() -> None:
    model, alone = host(), host()
    there = planted(model)
    seed = conv_seed()
    there.attach(seed, ChannelWise((2, 8, 4, 4)))
    there.set_alpha(0.5)
    there.start_step(sample=True)
    kept = [weakref.ref(it) for it in (seed, there.blend, *there.parameters())]
    optimizer = torch.optim.Adam(there.parameters())
    train(model, optimizer_steps(optimizer))
    there.release()
    del seed, optimizer
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
    assert not there.occupied
    alone.load_state_dict(model.state_dict())
    assert train(model) == train(alone)


def test_a_slot_can_be_used_again() -> None:
    there = one(nn.Linear(2, 2), lambda x, w: x.mul_(w))
    there.release()
    assert (there.fallback, there.alpha, there._isolated) == ("", 0.0, True)
    there.attach(Does(lambda x, w: x * w), Residual())
    assert there.occupied


# --- what comes out of the module


def test_the_activation_is_known_after_the_first_call() -> None:
    model = nn.Linear(3, 4)
    there = planted(nn.Sequential(model))
    assert not there.called
    model(noise((5, 3)))
    assert there.called
    assert there.activation == ((5, 4), torch.float32, torch.device("cpu"))


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, given):
        return self.make(given)


Pair = namedtuple("Pair", ["hidden", "weights"])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, "weights"),
        lambda x: [x, None],
        lambda x: (x,),
        lambda x: Pair(x, 3),
    ],
)
def test_of_a_tuple_it_is_the_first_tensor(make) -> None:
    model = Returns(make)
    given = noise((2, 3))
    expected = model(given)
    one(model, lambda x, w: x * 2, alpha=1.0)
    output = model(given)
    assert type(output) is type(expected)
    assert torch.equal(output[0], 2 * given)
    assert output[1:] == expected[1:]


@pytest.mark.parametrize(
    ("make", "trouble"),
    [
        (lambda x: {"hidden": x}, "slot 'here' returns a dict: expected a tensor"),
        (lambda x: (None, x), "slot 'here' returns a tuple: expected a tensor"),
        (lambda x: (), "slot 'here' returns a tuple: expected a tensor"),
        (lambda x: x.long(), "slot 'here' returns torch.int64: expected floating point"),
        (lambda x: x.sum(), r"slot 'here' returns shape \(\): expected a batch"),
    ],
)
def test_where_no_seed_can_live_is_said_and_nothing_changes(make, trouble) -> None:
    model = Returns(make)
    there = SlotHook("here", model)
    model(noise((2, 3)))
    assert there.called
    assert there.activation is None
    assert re.match(trouble, there.trouble)


# --- seeds that fail


def raises(*_):
    raise RuntimeError("no memory")


FAULTS = [
    (raises, "raised RuntimeError: no memory"),
    (lambda x, w: x[:, :2] * w, "returned shape (5, 2): expected (5, 4)"),
    (lambda x, w: (x * w).double(), "returned torch.float64: expected torch.float32"),
    (lambda x, w: None, "returned a NoneType: expected a tensor"),
    (lambda x, w: x * w * nan, "returned a value that is not finite"),
    (lambda x, w: x * w * inf, "returned a value that is not finite"),
]


@pytest.mark.parametrize("alpha", [None, 0.5, 1.0])
@pytest.mark.parametrize(("does", "reason"), FAULTS)
def test_a_seed_that_fails_is_left_out_and_says_why(does, reason, alpha) -> None:
    model, plain = nn.Linear(3, 4), nn.Linear(3, 4)
    plain.load_state_dict(model.state_dict())
    there = one(model, does, alpha=alpha)
    given = noise((5, 3))
    output = model(given)
    assert torch.equal(output, plain(given))
    assert there.fallback == reason
    output.sum().backward()
    plain(given).sum().backward()
    assert torch.equal(model.weight.grad, plain.weight.grad)
    there.start_step(sample=False)
    assert there.fallback == ""


def test_a_fault_costs_the_forward_in_which_it_happens_and_no_other() -> None:
    model = nn.Linear(3, 4)
    there = one(model, lambda x, w: x * w / (len(x) - 2), alpha=1.0)
    model(noise((2, 3)))
    assert there.fallback == "returned a value that is not finite"
    there.start_step(sample=False)
    plain = nn.functional.linear(noise((3, 3)), model.weight, model.bias)
    assert torch.equal(model(noise((3, 3))), plain * 0.5)


def test_a_seed_that_works_in_place_is_called_once_and_never_again() -> None:
    model = nn.Linear(3, 4)
    there = one(model, lambda x, w: x.mul_(2) * w)
    model(noise((2, 3)))
    assert there.fallback == slot.ALTERED
    there.start_step(sample=False)
    plain = nn.functional.linear(noise((2, 3)), model.weight, model.bias)
    assert torch.equal(model(noise((2, 3))), plain)
    assert (there.fallback, there.calls) == (slot.ALTERED, 0)


@pytest.mark.parametrize("blend", [Convex(), Residual(), ChannelWise((5, 4))])
def test_on_a_device_the_choice_is_made_there(monkeypatch, blend) -> None:
    # As where reading a value would wait for a device: nothing is read.
    monkeypatch.setattr(slot, "_is_known_at_once", lambda value: False)
    model, plain = nn.Linear(3, 4), nn.Linear(3, 4)
    plain.load_state_dict(model.state_dict())
    there = SlotHook("here", model)
    there.attach(Does(lambda x, w: x * w / (len(x) - 5)), blend)
    there.set_alpha(0.5)
    given = noise((5, 3))
    output = model(given)
    output.square().sum().backward()
    plain(given).square().sum().backward()
    assert torch.equal(output, plain(given))
    assert torch.equal(model.weight.grad, plain.weight.grad)
    assert there.fallback == ""
    assert there.finite.item() is False
    there.start_step(sample=False)
    assert there.finite is None
    assert not torch.equal(model(given[:4]), plain(given[:4]))
    assert there.finite.item() is True


# --- evaluation


@pytest.mark.parametrize(
    "quietly",
    [torch.no_grad, torch.inference_mode, torch.enable_grad],
    ids=lambda c: c.__name__,
)
def test_in_evaluation_an_isolated_seed_is_not_called_and_a_blended_one_is(quietly) -> None:
    model = nn.Linear(3, 4).eval()
    there = one(model, lambda x, w: x * 2)
    given = noise((5, 3))
    with quietly():
        plain = model(given)
        assert there.calls == 0
        there.set_alpha(1.0)
        assert torch.equal(model(given), plain * 2)
    assert there.fallback == ""
    assert there.calls == 1
    assert not there.seed.training


def test_without_gradients_an_isolated_seed_is_not_called() -> None:
    model = nn.Linear(3, 4)
    there = one(model, lambda x, w: x * 2)
    with torch.no_grad():
        model(noise((5, 3)))
    assert there.calls == 0
    model(noise((5, 3)))
    assert there.calls == 1


# --- statistics


def test_statistics_of_a_step_are_of_its_own_gradients() -> None:
    model = nn.Linear(3, 4)
    there = one(model, lambda x, w: x * w, alpha=0.25)
    there.start_step(sample=True)
    model(noise((5, 3))).sum().backward()
    length = 20**0.5
    statistics = there.statistics()
    assert statistics.host_norm.item() == pytest.approx(0.75 * length)
    assert statistics.seed_norm.item() == pytest.approx(0.25 * 0.5 * length)
    assert statistics.dot.item() == pytest.approx(0.75 * 0.125 * 20)
    there.start_step(sample=False)
    model(noise((5, 3))).sum().backward()
    assert there.statistics() is None


def test_an_isolated_seed_has_no_part_in_the_gradient() -> None:
    model = nn.Linear(3, 4)
    there = one(model, lambda x, w: x * w)
    there.start_step(sample=True)
    for _ in range(2):  # two micro-batches
        model(noise((5, 3))).sum().backward()
    statistics = there.statistics()
    assert statistics.host_norm.item() == pytest.approx(40**0.5)
    assert (statistics.seed_norm.item(), statistics.dot.item()) == (0.0, 0.0)
    assert not there.leaked
    assert there.calls == 2


@pytest.mark.parametrize("leak_at", range(20))
def test_a_leak_is_known_on_the_step_it_happens(monkeypatch, leak_at) -> None:
    model = host()
    there = planted(model)
    there.attach(conv_seed(), Convex())
    detach = isolation.cut
    leaked = []
    for step in range(leak_at + 2):
        removed = step == leak_at
        monkeypatch.setattr(isolation, "cut", (lambda h: h) if removed else detach)
        model(noise((2, 1, 4, 4), step)).square().mean().backward()
        leaked.append(there.leaked)
        there.start_step(sample=False)
    assert leaked == [step == leak_at for step in range(leak_at + 2)]


# --- with the rest of torch


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
def test_under_gradient_checkpointing(reentrant, alpha) -> None:
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


def test_the_seed_can_be_called_by_something_faster() -> None:
    model = nn.Linear(3, 4)
    there = one(model, lambda x, w: x * w, alpha=1.0)
    seed = there.seed
    there.set_call(lambda given: seed(given) * 1.0)
    model(noise((5, 3))).sum().backward()
    assert seed.weight.grad is not None
    there.release()
    there.set_call(raises)
    model(noise((5, 3)))
    assert there.fallback == ""


def test_the_time_of_a_call_is_measured() -> None:
    model = nn.Linear(3, 4)
    there = one(model, lambda x, w: x * w)
    assert there.latency_ms == 0.0
    model(noise((5, 3)))
    assert 0.0 < there.latency_ms < 10_000.0
