"""The curve of a run's loss: means over equal parts of its steps, in a constant size."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PARTS = 64
"""A curve has at least half as many parts once there are as many steps; the parts then become
twice as long whenever all are full."""


class LossCurve:
    """Sums of the losses of equal parts of the steps."""

    def __init__(self) -> None:
        self._steps = 0
        self._width = 1
        """Steps of one part."""
        self._sums = np.zeros(PARTS)
        self._known = np.zeros(PARTS, np.int64)
        self._broken = np.zeros(PARTS, np.int64)

    def extend(self, losses: NDArray[Any], broken: NDArray[Any]) -> None:
        """Take in the losses of the next steps, NaN where there is none; ``broken`` says at
        which steps something was not finite."""
        while self._steps + len(losses) > PARTS * self._width:
            self._halve()
        places = np.arange(self._steps, self._steps + len(losses)) // self._width
        known = np.isfinite(losses)
        with np.errstate(over="ignore"):
            self._sums += np.bincount(places, np.where(known, losses, 0.0), PARTS)
        self._known += np.bincount(places, known, PARTS).astype(np.int64)
        self._broken += np.bincount(places, broken & ~known, PARTS).astype(np.int64)
        self._steps += len(losses)

    def _halve(self) -> None:
        """Have parts twice as long."""
        self._width *= 2
        half = PARTS // 2
        for name in ("_sums", "_known", "_broken"):
            parts = getattr(self, name)
            merged = np.zeros_like(parts)
            with np.errstate(over="ignore"):
                merged[:half] = parts[0::2] + parts[1::2]
            setattr(self, name, merged)

    def means(self, most: int) -> list[float | None]:
        """At most that many means, in order of steps.

        None where no loss is known, NaN where none was finite.
        """
        parts = -(-self._steps // self._width)
        together = max(1, -(-parts // most))
        found: list[float | None] = []
        for start in range(0, parts, together):
            part = slice(start, min(start + together, parts))
            known = int(self._known[part].sum())
            if known:
                with np.errstate(over="ignore"):
                    found.append(float(self._sums[part].sum()) / known)
            else:
                found.append(nan if self._broken[part].any() else None)
        return found
