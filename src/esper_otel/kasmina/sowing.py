"""Sowing: where the next seed goes, of which blueprint, and what it is called."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from esper_otel.kasmina.blueprints import Blueprint
from esper_otel.kasmina.plot import Plot
from esper_otel.leyline.stages import Stage


class Place(NamedTuple):
    """Where a seed could be sown."""

    plot: Plot
    blueprint: str
    seed_id: str


class Sowing:
    """Chooses among ``plots`` and ``blueprints``, and hands out ids that are used once."""

    def __init__(self, plots: Collection[Plot], blueprints: Iterable[Blueprint]) -> None:
        self._plots = plots
        self._blueprints = list(blueprints)
        self._ids: set[str] = set()

    def next(self, taken: Collection[Plot]) -> Place | None:
        """The empty plot with the fewest seeds so far that a blueprint fits.

        Not one of those ``taken``. Blueprints that fit come in turn. Asked again before
        anything is sown it says the same again.
        """
        best: Place | None = None
        for plot in self._plots:
            if plot.stage is not Stage.DORMANT or plot in taken:
                continue
            blueprint = self._blueprint(plot)
            if blueprint is not None and (best is None or plot.sown < best.plot.sown):
                best = Place(plot, blueprint, self.fresh_id(plot))
        return best

    def fresh_id(self, plot: Plot) -> str:
        """The slot's name and the number of its next seed."""
        number = plot.sown + 1
        while (seed_id := f"{plot.name}-{number}") in self._ids:
            number += 1
        return seed_id

    def was_used(self, seed_id: str) -> bool:
        """Whether a seed has had that id; two of them would be one series to a backend."""
        return seed_id in self._ids

    def use(self, seed_id: str) -> None:
        """That id belongs to a seed from now on."""
        self._ids.add(seed_id)

    @property
    def ids(self) -> frozenset[str]:
        """All ids that were used."""
        return frozenset(self._ids)

    def resume(self, ids: Iterable[str]) -> None:
        """These, and no others, were used."""
        self._ids = set(ids)

    def _blueprint(self, plot: Plot) -> str | None:
        activation = plot.slot.activation
        if activation is None:
            return None
        fitting = [each.name for each in self._blueprints if not each.misfit(activation.shape)]
        return fitting[plot.sown % len(fitting)] if fitting else None
