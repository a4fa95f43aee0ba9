"""Gradients: their norm, and the aggregation of conflicting ones.

Everything here is queued on the device that holds the gradients; the host never waits
for a value. Nothing draws a random number or writes to a gradient. PyTorch is imported
on the first call, so that the module can be imported without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    Tensors = Sequence[torch.Tensor | None]
    Source = torch.Tensor | Tensors
    Groups = dict[tuple[torch.device, torch.dtype], list[torch.Tensor]]


def gradient_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """L2 norm over all ``.grad`` of ``parameters``, as a 0-d tensor on their device.

    The same arithmetic as ``torch.nn.utils.clip_grad_norm_`` (norm of the norms), except
    that half precision is summed in float32, where it cannot overflow. With gradients on
    several devices the result lies on the first that is not the CPU.

    Under DistributedDataParallel it is that of the averaged gradients, the same on all
    ranks. None when there is no gradient, and when its norm would cost more than it should:
    gradients sharded over ranks (FSDP) need a collective, an uncoalesced sparse gradient on
    a GPU a synchronisation.
    """
    import torch

    groups: Groups = {}
    flat = _FLAT in sys.modules
    with torch.no_grad():
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if type(gradient) is not torch.Tensor or (
                flat and getattr(parameter, "_fsdp_flattened", False)
            ):
                held = _held(parameter)
                if held is None:
                    return None
                gradient = held
            if gradient.layout is not torch.strided:
                values = _sparse_values(gradient)
                if values is None:
                    return None
                gradient = values
            key = (gradient.device, gradient.dtype)
            group = groups.get(key)
            if group is None:
                groups[key] = [gradient]
            else:
                group.append(gradient)
        return _norm(groups) if groups else None


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether this rank holds only a part of the gradient of ``parameter``.

    That of ``fully_shard`` is a DTensor, that of the older ``FullyShardedDataParallel`` a
    plain one, of a parameter that is marked.
    """
    return parameter.grad is not None and _held(parameter) is None


def whole_norm(norm: torch.Tensor, parameters: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """``norm``, as ``clip_grad_norm_`` gave it back for ``parameters``, as a plain tensor.

    Where gradients are DTensors, clipping has reduced it over the ranks if each has all of
    it now. None where its value would take a collective, or is only that of this rank.
    """
    if _FLAT in sys.modules and any(
        getattr(each, "_fsdp_flattened", False) for each in parameters
    ):
        return None
    return _whole(norm)


def with_gradients(parameters: Iterable[torch.Tensor]) -> list[int]:
    """The ids of those of ``parameters`` that have a gradient."""
    return [id(parameter) for parameter in parameters if parameter.grad is not None]


_FLAT = "torch.distributed.fsdp._flat_param"
"""Not imported by torch itself: no parameter is marked as long as it is missing."""


def _held(parameter: torch.Tensor) -> torch.Tensor | None:
    """The gradient, as a plain tensor; None when this rank has not got all of it."""
    if parameter.grad is None or getattr(parameter, "_fsdp_flattened", False):
        return None
    return _whole(parameter.grad)


def _whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """A DTensor as a plain tensor, None when this rank has not got all of it."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    placements = getattr(tensor, "placements", ())
    if not placements or not all(each.is_replicate() for each in placements):
        return None
    local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def _sparse_values(gradient: torch.Tensor) -> torch.Tensor | None:
    """The values whose norm is the gradient's; duplicate entries must be summed first."""
    import torch

    if gradient.layout is not torch.sparse_coo:
        return None
    if not gradient.is_coalesced():
        if gradient.device.type != "cpu":
            return None
        gradient = gradient.coalesce()
    return gradient.values()


def _norm(groups: Groups) -> torch.Tensor:
    import torch

    norms: list[torch.Tensor] = []
    for (_, dtype), gradients in groups.items():
        half = dtype in (torch.float16, torch.bfloat16)
        norms.extend(_foreach_norm(gradients, torch.float32 if half else None))
    if len(groups) > 1:
        # The accelerator, not the CPU: a copy to it is queued, one from it is waited for.
        device = next((device for device, _ in groups if device.type != "cpu"), norms[0].device)
        dtype = torch.float64 if torch.float64 in {n.dtype for n in norms} else torch.float32
        norms = [norm.to(device, dtype, non_blocking=True) for norm in norms]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _foreach_norm(
    tensors: list[torch.Tensor], dtype: torch.dtype | None
) -> Sequence[torch.Tensor]:
    """One call for all: 37 µs for ten small gradients, where one call each takes 44."""
    import torch

    norm = torch.foreach.norm if hasattr(torch, "foreach") else torch._foreach_norm
    return tuple(norm(tensors, dtype=dtype))


class PCGrad(NamedTuple):
    """Result of :func:`pcgrad`.

    ``gradient`` is shaped like one source; ``conflict_rate`` is a 0-d tensor, conflicting
    pairs over compared pairs, 0 when no two sources could be compared.
    """

    gradient: torch.Tensor | list[torch.Tensor | None]
    conflict_rate: torch.Tensor


def pcgrad(sources: Sequence[Source]) -> PCGrad:
    """Average gradient sources (tasks, losses, shards) after removing their conflicts.

    It removes from each source its projection on every other with a negative inner product,
    and then averages all: Yu et al., "Gradient Surgery for
    Multi-Task Learning" (2020), arXiv 2001.06782. They project one after another in
    random order. Here all projections use the original gradients, so that the result
    depends on no order and draws no random number; for two sources it is the same.

    A source is a tensor, or a sequence with one tensor per parameter, None standing for
    zero. A pair in which one is zero is not compared. Inner products run over all
    parameters together and are summed in float32 at least. The host waits for the device
    only where one source lies partly on the CPU and partly elsewhere. Use::

        sources = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        for parameter, gradient in zip(params, pcgrad(sources).gradient):
            parameter.grad = gradient

    Raises ``ValueError`` for less than two sources, or for sources of unequal shapes.
    """
    import torch

    single = [isinstance(source, torch.Tensor) for source in sources]
    parts: list[Tensors] = [
        [source] if isinstance(source, torch.Tensor) else source for source in sources
    ]
    if len(parts) < 2:
        raise ValueError(f"pcgrad: expected at least 2 gradient sources, got {len(parts)}")
    if any(single) and not all(single):
        raise ValueError("pcgrad: some sources are tensors, some sequences of tensors")
    _check_shapes(parts)
    with torch.no_grad():
        weights, rate = _surgery(_inner_products(parts))
        gradient = [_combined(column, weights) for column in zip(*parts, strict=True)]
    if all(single):
        assert gradient[0] is not None
        return PCGrad(gradient[0], rate)
    return PCGrad(gradient, rate)


def _surgery(inner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of each source in the sum of all projected ones, and the conflict rate.

    Source i loses (g_i.g_j / g_j.g_j) g_j for every j in conflict with it. The sum of
    what is left is linear in the sources, so that no projection is ever stored.
    """
    import torch

    squares = inner.diagonal()
    nonzero = squares > 0
    comparable = nonzero.unsqueeze(0) & nonzero.unsqueeze(1)
    conflicts = comparable & (inner < 0)
    weights = 1.0 - torch.where(conflicts, inner / squares, 0.0).sum(dim=0)
    ordered_pairs = comparable.sum() - nonzero.sum()
    return weights, conflicts.sum() / ordered_pairs.clamp(min=1)


def _inner_products(sources: Sequence[Tensors]) -> torch.Tensor:
    """Matrix of the inner products of all sources.

    By products and sums and not by a matrix product, which may be rounded to TF32.
    """
    import torch

    tensors = [tensor for source in sources for tensor in source if tensor is not None]
    devices = [tensor.device for tensor in tensors] or [torch.device("cpu")]
    device = next((device for device in devices if device.type != "cpu"), devices[0])
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    products: dict[tuple[int, int], list[torch.Tensor]] = {}
    for column in zip(*sources, strict=True):
        rows = [(i, _widened(tensor)) for i, tensor in enumerate(column) if tensor is not None]
        for position, (i, left) in enumerate(rows):
            for j, right in rows[: position + 1]:
                product = (left * right).sum().to(device, dtype, non_blocking=True)
                products.setdefault((i, j), []).append(product)
    nothing = torch.zeros((), dtype=dtype, device=device)
    sums = {pair: torch.stack(found).sum() for pair, found in products.items()}
    indices = range(len(sources))
    cells = [sums.get((max(i, j), min(i, j)), nothing) for i in indices for j in indices]
    return torch.stack(cells).reshape(len(sources), len(sources))


def _combined(
    column: Sequence[torch.Tensor | None], weights: torch.Tensor
) -> torch.Tensor | None:
    """One parameter's gradient: the weighted sources over their number, in their dtype."""
    terms = [
        (tensor, _widened(tensor) * weights[i].to(tensor.device))
        for i, tensor in enumerate(column)
        if tensor is not None
    ]
    if not terms:
        return None
    (first, total), *others = terms
    for _, term in others:
        total = total + term
    return (total / len(column)).to(first.dtype)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """Dense, in float32 at least."""
    import torch

    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


def _check_shapes(sources: Sequence[Tensors]) -> None:
    shapes = [
        [None if tensor is None else tuple(tensor.shape) for tensor in source]
        for source in sources
    ]
    agree = len({len(shape) for shape in shapes}) == 1 and all(
        len(set(column) - {None}) <= 1 for column in zip(*shapes, strict=True)
    )
    if not agree:
        listed = ", ".join(map(str, shapes))
        raise ValueError(f"pcgrad: expected sources of equal shapes, got {listed}")
