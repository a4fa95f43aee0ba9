"""How a value moves: its weighted mean and variance, one observation at a time."""

from __future__ import annotations

from math import nan, sqrt

from esper_otel.leyline.metrics import WEIGHT


class WeightedStatistics:
    """Exponentially weighted mean and variance of a series, in its own unit and its square.

    The newest observation counts ``weight``, all earlier ones together ``1 - weight``;
    the first one alone is the mean, with variance 0. Before it all are NaN (absent).
    The update is D. H. D. West's (CACM 22, 1979) with constant weight, in the form of
    T. Finch, "Incremental calculation of weighted mean and variance" (2009), section 9.
    It subtracts no large sums of squares, so the variance is never negative.

    The caller passes finite values only: what to do about a NaN (count it, leave it out)
    is not for a statistic to decide, and one would stay in the mean for ever. Squares
    are taken, so values beyond 1e150 overflow the variance.
    """

    __slots__ = ("_rest", "_weight", "mean", "variance")

    def __init__(self, weight: float = WEIGHT) -> None:
        if not 0.0 < weight <= 1.0:
            raise ValueError(f"weight={weight!r}: expected a number above 0, up to 1")
        self._weight = weight
        self._rest = 1.0 - weight
        self.mean = nan
        self.variance = nan

    def update(self, x: float) -> None:
        """Take one finite observation."""
        mean = self.mean
        if mean != mean:  # NaN: nothing seen yet; cheaper than a flag or math.isnan
            self.mean = x
            self.variance = 0.0
            return
        diff = x - mean
        increment = self._weight * diff
        self.mean = mean + increment
        self.variance = self._rest * (self.variance + diff * increment)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance; set, it goes on from there."""
        return self.mean, self.variance

    @moments.setter
    def moments(self, moments: tuple[float, float]) -> None:
        self.mean, self.variance = moments

    @property
    def deviation(self) -> float:
        """Weighted standard deviation."""
        return sqrt(self.variance)
