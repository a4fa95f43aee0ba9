"""How many samples a batch has."""

from __future__ import annotations

from collections.abc import Mapping

_DEEPEST = 4


def samples_in(batch: object, depth: int = 0) -> int:
    """Length of the first dimension of the first tensor in ``batch``, 0 when it has none.

    Looks into mappings, sequences and objects of the kind Hugging Face collators make
    (a mapping by behaviour), to a depth of four. Anything with a ``shape`` is a tensor.
    """
    if type(batch) is list and batch:  # what a DataLoader collates
        shape = getattr(batch[0], "shape", None)
        if shape:
            return int(shape[0])
    shape = getattr(batch, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else 0
    if depth == _DEEPEST:
        return 0
    parts: object = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, list | tuple):
        parts = batch
    for part in parts:  # type: ignore[attr-defined]
        samples = samples_in(part, depth + 1)
        if samples:
            return samples
    return 0
