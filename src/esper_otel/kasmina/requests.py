"""Requests: what the user asked a garden for, until the end of a step when it can be done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from esper_otel.kasmina.checkpoint import blueprint_of
from esper_otel.kasmina.plot import Plot
from esper_otel.kasmina.state import RequestState
from esper_otel.leyline.decisions import SeedOperation, Severity


class Request(NamedTuple):
    """To germinate ``seed_id`` of ``blueprint`` in a slot, or to cull it."""

    operation: SeedOperation
    plot: Plot
    seed_id: str
    blueprint: str = ""


class Requests:
    """Those that wait, in the order in which they came. Any thread may add one."""

    def __init__(self, plots: Collection[Plot]) -> None:
        self._plots = plots
        self._waiting: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Let it wait."""
        self._waiting.append(request)

    def clear(self) -> None:
        """None of them will be done."""
        self._waiting.clear()

    @property
    def plots(self) -> list[Plot]:
        """The slots they are about."""
        return [request.plot for request in list(self._waiting)]

    def seed_for(self, plot: Plot) -> str | None:
        """Id of the seed that somebody wants in that slot, or out of it."""
        return next((each.seed_id for each in list(self._waiting) if each.plot is plot), None)

    def wants_out(self, seed_id: str) -> bool:
        """Whether somebody wants that seed culled."""
        return any(
            each.operation is SeedOperation.CULL and each.seed_id == seed_id
            for each in list(self._waiting)
        )

    def carry_out(self, is_frozen: Callable[[Plot], bool], sown: Callable[[], None]) -> None:
        """Do those whose time has come; the others wait on. ``sown``: what follows a seed.

        Kernels are fetched one at a time, so as not to take the run's processors.
        """
        for _ in range(len(self._waiting)):
            request = self._waiting.popleft()
            plot = request.plot
            sows = request.operation is SeedOperation.GERMINATE
            if is_frozen(plot) or (sows and not self._can_sow(plot)):
                self._waiting.append(request)
                continue
            try:
                if sows:
                    plot.germinate(request.seed_id, request.blueprint)
                    sown()
                elif plot.seed is not None and plot.seed.id == request.seed_id:
                    plot.cull("as asked", Severity.NORMAL)
            except Exception as error:
                plot.tell_fault(request.operation.value, error)

    def state(self) -> list[RequestState]:
        """All of them."""
        return [
            RequestState(
                operation=each.operation.value,
                slot=each.plot.name,
                seed_id=each.seed_id,
                blueprint=each.blueprint,
            )
            for each in list(self._waiting)
        ]

    def _can_sow(self, plot: Plot) -> bool:
        fetching = any(other.kernel_fetch is not None for other in self._plots)
        return plot.slot.activation is not None and not fetching


def requests_of(
    states: Iterable[RequestState], plot_at: Callable[[str], Plot]
) -> list[Request]:
    """The requests of a state; raises ``GardenError`` for one that cannot be."""
    return [
        Request(
            operation=SeedOperation(each.operation),
            plot=plot_at(each.slot),
            seed_id=each.seed_id,
            blueprint=blueprint,
        )
        for each in states
        # First: it says what is wrong with an operation.
        for blueprint in [blueprint_of(each)]
    ]
