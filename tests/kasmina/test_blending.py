"""Blends, against plain formulas, and their gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_otel.kasmina.blending import (
    BLENDS,
    Blend,
    ChannelWise,
    ConfidenceGated,
    Convex,
    Residual,
    channel_dim,
)

pytestmark = pytest.mark.torch

SHAPES = [(3, 4), (2, 3, 4), (2, 4, 3, 2)]
ALPHAS = [0.25, 0.5, 1.0]
every_blend = pytest.mark.parametrize("name", BLENDS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def noise(shape, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blend_of(name: str, shape) -> Blend:
    blend = BLENDS[name](shape).double()
    if isinstance(blend, ChannelWise):
        with torch.no_grad():
            blend.logits.copy_(noise(blend.logits.shape, 3))
    return blend


def convex(h: Tensor, s: Tensor, alpha: float, blend: Blend) -> Tensor:
    return (1 - alpha) * h + alpha * s


def residual(h: Tensor, s: Tensor, alpha: float, blend: Blend) -> Tensor:
    return h + alpha * s


def channelwise(h: Tensor, s: Tensor, alpha: float, blend: Blend) -> Tensor:
    gate = 1 / (1 + torch.exp(-blend.logits))
    gate = gate[:, None, None] if h.dim() == 4 else gate
    return h + alpha * gate * (s - h)


def confidence(h: Tensor, s: Tensor, alpha: float, blend: Blend) -> Tensor:
    dim = 1 if h.dim() == 4 else -1
    lengths = h.norm(dim=dim, keepdim=True) * s.norm(dim=dim, keepdim=True)
    gate = (1 + (h * s).sum(dim, keepdim=True) / lengths) / 2
    return h + alpha * gate * (s - h)


REFERENCE = {
    "convex": convex,
    "residual": residual,
    "channelwise": channelwise,
    "confidence": confidence,
}


@every_blend
@every_shape
@pytest.mark.parametrize("alpha", ALPHAS)
def test_forward_and_backward_equal_the_reference(name, shape, alpha) -> None:
    blend = blend_of(name, shape)
    given = [noise(shape, 1).requires_grad_(), noise(shape, 2).requires_grad_()]
    trained = [*given, *blend.parameters()]
    got, expected = blend(*given, alpha), REFERENCE[name](*given, alpha, blend)
    torch.testing.assert_close(got, expected)
    upstream = noise(shape, 4)
    for mine, plain in zip(
        torch.autograd.grad(got, trained, upstream, materialize_grads=True),
        torch.autograd.grad(expected, trained, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain)


@every_blend
@every_shape
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_are_those_of_finite_differences(name, shape, alpha) -> None:
    blend = blend_of(name, shape)
    given = [noise(shape, 1).requires_grad_(), noise(shape, 2).requires_grad_()]
    torch.autograd.gradcheck(lambda h, s, *gates: blend(h, s, alpha), [*given])
    for parameter in blend.parameters():
        torch.autograd.gradcheck(lambda _: blend(*given, alpha), [parameter])


@every_blend
def test_alpha_0_is_the_host_itself(name) -> None:
    host = noise((2, 4), 1)
    seed = torch.full_like(host, float("nan"))
    assert blend_of(name, host.shape)(host, seed, 0.0) is host


@every_blend
@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0.0, 1.0), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_shape_and_dtype_are_the_hosts(name, alpha, dtype) -> None:
    host, seed = noise((2, 4, 3, 3), 1, dtype), noise((2, 4, 3, 3), 2, dtype)
    blend = BLENDS[name](host.shape)
    joined = blend(host, seed, alpha)
    assert (joined.shape, joined.dtype) == (host.shape, host.dtype)


@every_blend
def test_what_follows_may_work_in_place(name) -> None:
    host, seed = noise((2, 4), 1), noise((2, 4), 2)
    before = host.clone(), seed.clone()
    blend_of(name, host.shape)(host, seed, 1.0).detach().zero_()
    assert torch.equal(host, before[0])
    assert torch.equal(seed, before[1])


def test_a_convex_blend_ends_as_the_seed_whatever_the_host_is() -> None:
    host = torch.tensor([[float("inf"), float("nan"), 1.0]])
    seed = torch.tensor([[1.0, -0.0, 3.0]])
    joined = Convex()(host, seed, 1.0)
    assert torch.equal(joined, seed)
    assert torch.equal(torch.signbit(joined), torch.signbit(seed))


def test_the_residual_keeps_the_host_whole() -> None:
    host, seed = torch.ones(1, 2), torch.tensor([[2.0, -1.0]])
    assert Residual()(host, seed, 0.5).tolist() == [[2.0, 0.5]]


def test_given_gates_are_fixed_and_decide_per_channel() -> None:
    host, seed = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    blend = ChannelWise(host.shape, gates=torch.tensor([0.0, 0.5, 1.0]))
    assert not list(blend.parameters())
    assert blend(host, seed, 0.5)[0, :, 0, 0].tolist() == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("seed", "gate"), [([1.0, 0.0], 1.0), ([0.0, 1.0], 0.5), ([-1.0, 0.0], 0.0)]
)
def test_confidence_is_how_far_the_two_agree(seed, gate) -> None:
    host, seed = torch.tensor([[1.0, 0.0]]), torch.tensor([seed])
    torch.testing.assert_close(
        ConfidenceGated()(host, seed, 1.0), host + gate * (seed - host), atol=1e-6, rtol=0
    )


def test_confidence_without_a_direction_is_finite() -> None:
    host, seed = torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3)
    ConfidenceGated()(host, seed, 1.0).sum().backward()
    assert torch.isfinite(host.grad).all()


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (torch.ones(3), r"shape \(3,\): expected \(4,\)"),
        (torch.full((4,), 1.5), "numbers from 0 to 1"),
        (torch.full((4,), float("nan")), "numbers from 0 to 1"),
    ],
)
def test_gates_that_cannot_be_are_refused(gates, message) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelWise((2, 4), gates)


@pytest.mark.parametrize(("rank", "dim"), [(2, 1), (3, 2), (4, 1), (5, 1)])
def test_channels_lie_where_torch_puts_them(rank, dim) -> None:
    assert channel_dim(rank) == dim
