"""Seeds that fail: they are left out, and the host computes as it would alone."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from kasmina.slotted import Does, noise, one, raises
from torch import nn

from esper_otel.kasmina import hook as slot
from esper_otel.kasmina.blending import ChannelWise, Convex, Residual
from esper_otel.kasmina.hook import SlotHook

pytestmark = pytest.mark.torch

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
def test_on_a_device_a_seed_that_fails_is_left_out_without_reading_a_value(
    monkeypatch, blend
) -> None:
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
