"""Gradient norm and PCGrad, against PyTorch's own norm and the paper's formula."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from esper_otel.tolaria.gradients import (  # noqa: E402
    gradient_norm,
    is_sharded,
    pcgrad,
    whole_norm,
)

pytestmark = pytest.mark.torch


def tensor(values: Any, **options: Any) -> Any:
    return torch.tensor(values, dtype=options.pop("dtype", torch.float64), **options)


def parameters(*gradients: Any) -> list[Any]:
    found = []
    for gradient in gradients:
        shape = (2,) if gradient is None else gradient.shape
        dtype = torch.float32 if gradient is None else gradient.dtype
        parameter = torch.zeros(shape, dtype=dtype, requires_grad=True)
        parameter.grad = gradient
        found.append(parameter)
    return found


# --- gradient_norm


def test_equals_clip_grad_norm() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(16, 1, 3, 3), (16,), (10, 64), (10,)]
    params = parameters(*(torch.randn(shape, generator=generator) for shape in shapes))
    before = [parameter.grad.clone() for parameter in params]
    norm = gradient_norm(params)
    assert norm is not None
    assert norm.shape == ()
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(params, float("inf")))


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ([[3.0], [4.0]], 5.0),
        ([[3.0], None, [4.0]], 5.0),
        ([[0.0, 0.0]], 0.0),
        ([[float("inf")], [1.0]], float("inf")),
    ],
)
def test_values(gradients: list[Any], expected: float) -> None:
    params = parameters(*(None if g is None else tensor(g) for g in gradients))
    assert gradient_norm(params).item() == expected


def test_a_nan_in_any_gradient_shows() -> None:
    assert torch.isnan(gradient_norm(parameters(tensor([1.0]), tensor([float("nan")]))))


def test_there_is_no_norm_without_gradients() -> None:
    assert gradient_norm(parameters(None, None)) is None
    assert gradient_norm([]) is None


def test_dtypes_may_be_mixed_and_half_precision_does_not_overflow() -> None:
    half = torch.full((4,), 60000.0, dtype=torch.float16)
    brain = torch.ones(4, dtype=torch.bfloat16)
    double = torch.full((1,), 3.0, dtype=torch.float64)
    norm = gradient_norm(parameters(half, brain, double))
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx((4 * 60000.0**2 + 4 + 9) ** 0.5, rel=1e-6)


def test_duplicate_entries_of_a_sparse_gradient_are_summed_first() -> None:
    embedding = torch.nn.Embedding(5, 1, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    gradient = embedding.weight.grad
    assert not gradient.is_coalesced()
    assert gradient_norm([embedding.weight]).item() == pytest.approx(5.0**0.5)
    assert embedding.weight.grad is gradient
    assert not gradient.is_coalesced()


def test_a_layout_it_cannot_read_and_a_sharded_gradient_have_no_norm() -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> Any:
            raise AssertionError("a collective that other ranks do not join")

    class Parameter:
        grad = torch.ones(2).as_subclass(Sharded)

    class Compressed:
        grad = torch.eye(2).to_sparse_coo().coalesce()

    assert gradient_norm([Parameter()]) is None
    assert gradient_norm([Compressed()]).item() == pytest.approx(2.0**0.5)
    Compressed.grad = (
        torch.ones(2, 2).to_mkldnn() if torch.backends.mkldnn.is_available() else None
    )
    assert gradient_norm([Compressed()]) is None


class Distributed(torch.Tensor):
    """As much of a DTensor as is looked at."""

    placements: tuple[Any, ...] = ()

    def full_tensor(self) -> Any:
        raise AssertionError("a collective that other ranks do not join")

    def to_local(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


class Placed:
    def __init__(self, *, replicated: bool) -> None:
        self.is_replicate = lambda: replicated


def distributed(values: list[float], *replicated: bool) -> Distributed:
    """A DTensor on a mesh of as many dimensions."""
    made = tensor(values).as_subclass(Distributed)
    made.placements = tuple(Placed(replicated=each) for each in replicated)
    return made


class Given:
    """A parameter with this gradient."""

    def __init__(self, grad: Any) -> None:
        self.grad = grad


@pytest.mark.parametrize(
    ("replicated", "norm"),
    [((True,), 5.0), ((True, True), 5.0), ((False,), None), ((True, False), None)],
)
def test_a_norm_is_told_where_each_rank_has_all_of_it(replicated, norm) -> None:
    gradient = distributed([3.0, 4.0], *replicated)
    found = gradient_norm([Given(gradient)])
    assert (None if found is None else found.item()) == norm
    assert is_sharded(Given(gradient)) == (norm is None)
    clipped = whole_norm(distributed([5.0], *replicated), [Given(gradient)])
    assert (None if clipped is None else clipped.item()) == norm


def test_flat_parameters_have_only_this_ranks_part(monkeypatch) -> None:
    flat, plain = Given(tensor([3.0, 4.0])), Given(tensor([1.0]))
    flat._fsdp_flattened = True
    # As the older FSDP leaves them once it is imported.
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp._flat_param", sys)
    assert is_sharded(flat)
    assert not is_sharded(plain)
    assert gradient_norm([plain, flat]) is None
    assert gradient_norm([plain]).item() == 1.0
    assert whole_norm(tensor(5.0), [plain, flat]) is None
    assert whole_norm(tensor(5.0), [plain]).item() == 5.0


def test_a_gradient_with_a_graph_of_its_own_adds_no_node() -> None:
    x = tensor([2.0], requires_grad=True)
    (slope,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    x.grad = slope
    norm = gradient_norm([x])
    assert norm.item() == 12.0
    assert not norm.requires_grad


# --- pcgrad


numbers = st.floats(min_value=-100, max_value=100, allow_nan=False, width=32)


@st.composite
def gradient_sources(draw: st.DrawFn, count: st.SearchStrategy[int]) -> list[Any]:
    size = draw(st.integers(1, 6))
    number = draw(count)
    vectors = st.lists(numbers, min_size=size, max_size=size)
    return [tensor(draw(vectors)) for _ in range(number)]


def close(left: Any, right: Any) -> bool:
    return bool(torch.allclose(left, right, rtol=1e-6, atol=1e-6))


def textbook(first: Any, second: Any) -> Any:
    """Algorithm 1 of the paper for two tasks."""

    def project(g: Any, other: Any) -> Any:
        inner = torch.dot(g, other)
        return g - inner / torch.dot(other, other) * other if inner < 0 else g

    return (project(first, second) + project(second, first)) / 2


@settings(deadline=None)
@given(gradient_sources(st.just(2)))
def test_two_sources_follow_the_paper(sources: list[Any]) -> None:
    first, second = sources
    result = pcgrad(sources)
    assert close(result.gradient, textbook(first, second))
    scale = 1e-6 * float(first.norm() + second.norm()) ** 2
    assert torch.dot(result.gradient, first) >= -scale, "the average hurts the first source"
    assert torch.dot(result.gradient, second) >= -scale, "the average hurts the second source"


@settings(max_examples=40, deadline=None)
@given(gradient_sources(st.integers(2, 4)))
def test_order_does_not_matter(sources: list[Any]) -> None:
    result = pcgrad(sources)
    for shuffled in permutations(sources):
        other = pcgrad(shuffled)
        assert close(other.gradient, result.gradient)
        assert torch.equal(other.conflict_rate, result.conflict_rate)


@settings(deadline=None)
@given(gradient_sources(st.integers(2, 5)))
def test_without_conflict_it_is_the_mean(sources: list[Any]) -> None:
    agreeing = [source.abs() for source in sources]
    result = pcgrad(agreeing)
    assert close(result.gradient, torch.stack(agreeing).mean(dim=0))
    assert result.conflict_rate.item() == 0.0


@settings(deadline=None)
@given(gradient_sources(st.integers(2, 4)))
def test_splitting_into_parameters_changes_nothing(sources: list[Any]) -> None:
    whole = pcgrad(sources)
    split = pcgrad([[source[:1], source[1:]] for source in sources])
    assert close(torch.cat(split.gradient), whole.gradient)


def test_three_sources_are_projected_against_the_originals() -> None:
    a, b, c = tensor([1.0, 0.0]), tensor([-1.0, 1.0]), tensor([-1.0, -1.0])
    # a: takes out its parts along b and c; b and c: their part along a; b and c do not conflict
    expected = ((a + b / 2 + c / 2) + (b + a) + (c + a)) / 3
    result = pcgrad([a, b, c])
    assert close(result.gradient, expected)
    assert result.conflict_rate.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("vectors", "rate"),
    [
        ([[1.0, 0.0], [-1.0, 0.0]], 1.0),
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),  # at a right angle: no conflict
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], 1.0),  # pairs with zero are not compared
        ([[1.0, 0.0], [0.0, 0.0]], 0.0),
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
    ],
)
def test_conflict_rate(vectors: list[list[float]], rate: float) -> None:
    result = pcgrad([tensor(vector) for vector in vectors])
    assert result.conflict_rate.shape == ()
    assert result.conflict_rate.item() == rate
    assert torch.isfinite(result.gradient).all()


def test_none_is_zero_and_stays_none_where_all_are() -> None:
    a, b = tensor([1.0, -2.0]), tensor([[3.0]])
    with_none = pcgrad([[a, None, None], [-a, b, None]])
    with_zero = pcgrad([[a, torch.zeros_like(b)], [-a, b]])
    assert with_none.gradient[2] is None
    assert close(with_none.gradient[0], with_zero.gradient[0])
    assert close(with_none.gradient[1], with_zero.gradient[1])
    assert torch.equal(with_none.conflict_rate, with_zero.conflict_rate)
    nothing = pcgrad([[None], [None]])
    assert nothing.gradient == [None]
    assert nothing.conflict_rate.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_keeps_its_dtype(dtype: Any) -> None:
    sources = [tensor([300.0, 1.0], dtype=dtype), tensor([-300.0, 1.0], dtype=dtype)]
    result = pcgrad(sources)
    assert result.gradient.dtype == dtype
    assert torch.isfinite(result.gradient).all(), "90,000 does not fit float16"


def test_sources_are_left_alone_and_no_graph_is_kept() -> None:
    sources = [tensor([1.0, 2.0], requires_grad=True), tensor([-1.0, 0.5])]
    before = [source.detach().clone() for source in sources]
    result = pcgrad(sources)
    assert not result.gradient.requires_grad
    assert all(torch.equal(s, b) for s, b in zip(sources, before, strict=True))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "expected at least 2 gradient sources, got 0"),
        ([torch.ones(2)], "expected at least 2 gradient sources, got 1"),
        ([torch.ones(2), torch.ones(3)], r"equal shapes, got \[\(2,\)\], \[\(3,\)\]"),
        ([[torch.ones(2)], [torch.ones(2), None]], r"got \[\(2,\)\], \[\(2,\), None\]"),
        ([[None], [torch.ones(1)], [torch.ones(2)]], r"got \[None\], \[\(1,\)\], \[\(2,\)\]"),
        ([torch.ones(2), [torch.ones(2)]], "some sources are tensors, some sequences"),
    ],
)
def test_unusable_sources_are_refused(sources: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pcgrad(sources)


def test_no_random_number_is_drawn() -> None:
    before = (random.getstate(), torch.random.get_rng_state(), np.random.get_state()[1].copy())
    pcgrad([tensor([1.0, -1.0]), tensor([-1.0, 0.5]), tensor([0.1, -1.0])])
    gradient_norm(parameters(tensor([1.0])))
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


@pytest.mark.parametrize("module", ["gradients", "scalars", "devices", "noted_steps"])
def test_importing_the_module_does_not_import_torch(module: str) -> None:
    program = f"import sys, esper_otel.tolaria.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"False\n"
