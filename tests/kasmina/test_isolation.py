"""The two paths: what reaches whom, to the bit, and what is noted of it."""

from __future__ import annotations

import logging
from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from esper_otel.kasmina import isolation
from esper_otel.kasmina.isolation import (
    GradientTally,
    Paths,
    inner_product,
    isolated_input,
    joint_inputs,
    straight_through,
)

pytestmark = pytest.mark.torch

ODD = torch.tensor([[0.0, -0.0, 1.0, -1e-38, inf, -inf, nan, 3e38]])


def noise(shape, seed: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit: NaN equals itself, and -0.0 is not 0.0."""
    return a.detach().numpy().tobytes() == b.detach().numpy().tobytes()


def paths(isolated: bool = True, sampled: bool = True) -> tuple[GradientTally, Paths]:
    tally = GradientTally(sampled)
    return tally, Paths(tally, isolated)


# --- straight through


@pytest.mark.parametrize("seed", [0.0, 1.0, inf, -inf, nan])
def test_the_value_is_the_hosts_to_the_bit_whatever_the_seed_is(seed) -> None:
    _, both = paths()
    out = straight_through(ODD, torch.full_like(ODD, seed).requires_grad_(), both)
    assert same_bits(out, ODD)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_layout_is_the_hosts(layout) -> None:
    host = noise((2, 3, 4, 4), 1).contiguous(memory_format=layout)
    _, both = paths()
    out = straight_through(host, noise((2, 3, 4, 4), 2).requires_grad_(), both)
    assert out.stride() == host.stride()


@settings(max_examples=50, deadline=None)
@given(gradient=arrays.arrays("float32", (2, 3), elements=st.floats(width=32)))
def test_the_gradient_goes_to_both_to_the_bit(gradient) -> None:
    host, seed = noise((2, 3), 1).requires_grad_(), noise((2, 3), 2).requires_grad_()
    _, both = paths()
    upstream = torch.from_numpy(gradient.copy())
    straight_through(host, seed, both).backward(upstream)
    assert same_bits(host.grad, upstream)
    assert same_bits(seed.grad, upstream)


def test_what_follows_may_work_in_place() -> None:
    leaf, seed = noise((2, 3), 1).requires_grad_(), noise((2, 3), 2).requires_grad_()
    host = leaf.sigmoid()  # remembers its own output for its backward
    value = host.detach().clone()
    _, both = paths()
    given = isolated_input(host, both)
    out = straight_through(host, given * seed, both)
    out.mul_(2.0).relu_().sum().backward()
    assert same_bits(host, value)
    assert torch.equal(leaf.grad, 2.0 * value * (1 - value))
    assert torch.equal(seed.grad, 2.0 * value)


def test_a_frozen_host_still_teaches_the_seed() -> None:
    host, seed = noise((2, 3), 1), noise((2, 3), 2).requires_grad_()
    _, both = paths()
    straight_through(host, seed, both).sum().backward()
    assert torch.equal(seed.grad, torch.ones(2, 3))


def test_gradients_of_gradients_are_the_hosts() -> None:
    host, seed = noise((3,), 1).requires_grad_(), noise((3,), 2).requires_grad_()
    _, both = paths()
    out = straight_through(host, seed, both)
    (first,) = torch.autograd.grad((out**3).sum(), host, create_graph=True)
    first.sum().backward()
    torch.testing.assert_close(host.grad, 6 * host.detach())


# --- leaks


def isolated_step(host: Tensor, seed: Tensor, tally: GradientTally) -> Tensor:
    both = Paths(tally, isolated=True)
    return straight_through(host, isolated_input(host, both) * seed, both)


@pytest.mark.parametrize("sampled", [True, False])
def test_without_a_leak_nothing_comes_through_the_seeds_path(sampled) -> None:
    host, seed = noise((2, 3), 1).requires_grad_(), noise((2, 3), 2).requires_grad_()
    tally = GradientTally(sampled)
    isolated_step(host, seed, tally).square().sum().backward()
    assert not tally.leaked
    assert torch.equal(host.grad, 2 * host.detach())
    if sampled:
        assert tally.statistics().seed_norm == 0.0


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["a gradient", "a gradient of zero"])
def test_a_leak_is_known_in_the_backward_in_which_it_happens(
    monkeypatch, sampled, scale
) -> None:
    monkeypatch.setattr(isolation, "cut", lambda activation: activation)
    host = noise((2, 3), 1).requires_grad_()
    seed = (scale * noise((2, 3), 2)).requires_grad_()
    tally = GradientTally(sampled)
    loss = isolated_step(host, seed, tally).square().sum()
    assert not tally.leaked
    loss.backward()
    assert tally.leaked
    if sampled:
        leak = (2 * host * seed).detach()
        statistics = tally.statistics()
        torch.testing.assert_close(statistics.seed_norm, leak.norm())
        torch.testing.assert_close(statistics.dot, (leak * 2 * host.detach()).sum())


# --- statistics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_path_is_told_apart(dtype) -> None:
    host = noise((4, 3), 1, dtype).requires_grad_()
    weight = noise((3, 3), 2, dtype)
    tally, both = paths(isolated=False)
    for_host, for_seed = joint_inputs(host, both)
    out = 0.25 * for_host + 0.75 * (for_seed @ weight)
    upstream = noise((4, 3), 3, dtype)
    out.backward(upstream)
    of_host = (0.25 * upstream).double()
    of_seed = ((0.75 * upstream) @ weight.T).double()
    statistics = tally.statistics()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}
    for told, expected in [
        (statistics.host_norm, of_host.norm()),
        (statistics.seed_norm, of_seed.norm()),
        (statistics.dot, (of_host * of_seed).sum()),
    ]:
        assert told.shape == ()
        assert told.dtype == torch.promote_types(dtype, torch.float32)
        assert not told.requires_grad
        torch.testing.assert_close(told.double(), expected, check_dtype=False, **tolerance)
    assert not tally.leaked
    torch.testing.assert_close(host.grad.double(), of_host + of_seed, **tolerance)


def test_calls_of_one_step_count_as_one_long_gradient() -> None:
    host = noise((2, 3), 1).requires_grad_()
    tally = GradientTally(sampled=True)
    for scale in (3.0, 4.0):
        for_host, for_seed = joint_inputs(host, Paths(tally, isolated=False))
        (scale * for_host + 2 * scale * for_seed).sum().backward()
    one = torch.ones(2, 3).norm()
    statistics = tally.statistics()
    torch.testing.assert_close(statistics.host_norm, 5 * one)
    torch.testing.assert_close(statistics.seed_norm, 10 * one)
    torch.testing.assert_close(statistics.dot, (9 + 16) * 2 * one**2)


@pytest.mark.parametrize("silent", ["host", "seed"])
def test_a_path_through_which_nothing_came_is_zero(silent) -> None:
    host = noise((2, 3), 1).requires_grad_()
    tally, both = paths(isolated=False)
    for_host, for_seed = joint_inputs(host, both)
    (for_seed if silent == "host" else for_host).sum().backward()
    statistics = tally.statistics()
    assert getattr(statistics, f"{silent}_norm") == 0.0
    assert statistics.dot == 0.0
    assert statistics.host_norm + statistics.seed_norm == torch.ones(2, 3).norm()


@pytest.mark.parametrize("sampled", [True, False])
def test_there_are_none_without_a_backward_or_when_not_sampled(sampled) -> None:
    host = noise((2, 3), 1).requires_grad_()
    tally, both = paths(isolated=False, sampled=sampled)
    for_host, _ = joint_inputs(host, both)
    assert tally.statistics() is None
    for_host.sum().backward()
    assert (tally.statistics() is not None) == sampled


def test_statistics_that_raise_are_left_out_and_the_gradient_is_not(
    monkeypatch, caplog
) -> None:
    def raises(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    monkeypatch.setattr(isolation, "inner_product", raises)
    caplog.set_level(logging.CRITICAL)
    host, seed = noise((2, 3), 1).requires_grad_(), noise((2, 3), 2).requires_grad_()
    tally = GradientTally(sampled=True)
    isolated_step(host, seed, tally).square().sum().backward()
    assert tally.statistics() is None
    assert not tally.leaked
    assert torch.equal(host.grad, 2 * host.detach())


def test_half_precision_does_not_overflow() -> None:
    large = torch.full((100,), 60_000.0, dtype=torch.float16)
    assert inner_product(large, large) == pytest.approx(100 * 60_000.0**2)


def test_of_a_seed_left_out_on_the_device_nothing_reaches_the_host() -> None:
    host = noise((2, 3), 1).requires_grad_()
    tally, both = paths(isolated=False)
    _, for_seed = joint_inputs(host, both)
    both.finite = torch.tensor(False)
    (for_seed * nan).sum().backward()
    assert torch.equal(host.grad, torch.zeros(2, 3))
    assert tally.statistics().seed_norm == 0.0
