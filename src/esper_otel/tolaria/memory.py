"""Memory: what the rows of coming steps depend on, as it goes into a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class Memory(msgspec.Struct, forbid_unknown_fields=True):
    """Of a recorder: the last ``step``, the ``latest`` whole row by key, and statistics.

    ``loss`` and ``gradient_norm`` are weighted mean and variance, NaN before the first
    value; ``last_loss`` is that of the step before, NaN when it had none.
    """

    step: int
    latest: dict[str, float]
    loss: tuple[float, float]
    gradient_norm: tuple[float, float]
    last_loss: float

    def plain(self) -> dict[str, Any]:
        """As numbers, text, lists and dictionaries."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


def recalled(state: Mapping[str, Any]) -> Memory:
    """The memory that ``plain`` was called of; ``ValueError`` for anything else."""
    try:
        return msgspec.convert(dict(state), Memory)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
