"""A slot in a host: what the host feels of it in each of its states."""

from __future__ import annotations

import gc
import re
import weakref
from collections import namedtuple
from math import inf, nan

import pytest
import torch
from kasmina.slotted import Does, conv_seed, host, noise, one, planted, raises
from torch import nn

from esper_otel.kasmina import isolation
from esper_otel.kasmina.blending import ChannelWise, Convex, Residual
from esper_otel.kasmina.blueprints import lookup
from esper_otel.kasmina.hook import SlotHook

pytestmark = pytest.mark.torch

LOSSES = 4


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


def test_a_slot_takes_one_seed_at_a_time() -> None:
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
def test_of_a_tuple_a_seed_takes_the_first_tensor(make) -> None:
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
