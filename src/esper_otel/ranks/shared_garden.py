"""A garden that grows alike on every rank of a run.

What differs between ranks (losses, how long a fetch takes, faults, leaks) only decides on
the leader, or through flags that all ranks see a step later; what is done is done by all at
the same step. Parameters of seeds are made from the leader's number, and their gradients
are averaged over the ranks before their optimizers step, since no reducer of the host's
knows of them. The gradient of a fossil would come too late for whoever looks at the host's
gradients before its optimizer steps (clipping, ``GradScaler``), and alike on no two ranks:
so fossils keep optimizers of their own here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

from torch import nn

from esper_otel.kasmina.blueprints import Blueprint
from esper_otel.kasmina.garden import Garden, GardenError
from esper_otel.kasmina.kernels import Activation, Compilation, Fetch, KernelFetcher
from esper_otel.kasmina.lifecycle import GROWING
from esper_otel.kasmina.offer import Offer
from esper_otel.kasmina.plot import IN_A_ROW, Plot
from esper_otel.kasmina.sowing import Place
from esper_otel.leyline.decisions import (
    NOT_AGREED,
    Action,
    Decision,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.frames import GardenFrame
from esper_otel.leyline.stages import Stage
from esper_otel.ranks.agreement import Agreement
from esper_otel.ranks.circle import CircleError
from esper_otel.ranks.posts import Order
from esper_otel.settings import EsperSettings, Fossils

ELSEWHERE = "it failed on another rank"
"""Why a seed goes whose fault only another rank has seen."""

_FLAGS = 7
_FETCHES, _WAITS, _FAILED, _LATE, _DOOMED, _TROUBLED, _FALLOW = range(_FLAGS)
"""Of each slot: its kernel is fetched; it has not come; it failed; it was late; the seed
must go at once; the seed does not work; the slot must not be sown."""


class SharedGarden(Garden):
    """A garden on one of several ranks; planted on each of them with the same slots.

    Raises :class:`GardenError` also for a model that is not on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Iterable[str],
        *,
        agreement: Agreement,
        settings: EsperSettings | None = None,
        **options: Any,
    ) -> None:
        for parameter in model.parameters():
            if parameter.device.type != "cpu":
                raise GardenError(
                    f"the model is on {parameter.device} and the run has "
                    f"{agreement.circle.size} ranks: expected one on the CPU, where the "
                    "gradients of seeds can be averaged without waiting for a device"
                )
        settings = EsperSettings() if settings is None else settings
        super().__init__(
            model, slots, settings=settings.changed(fossils=Fossils.STAY), **options
        )
        self._agreement = agreement
        self._ground.fetcher = _AgreedFetcher(self._ground.fetcher)
        self._doomed: dict[Plot, str] = {}
        self._fallow: set[Plot] = set()
        self._mine: Offer | None = None
        self._posted = False
        self._order: Order | None = None
        self._share_root(list(self._plots))
        agreement.shared = self

    # What the recorder calls.

    def learn(self, optimizer: Any) -> None:
        """Average the gradients of the seeds over the ranks; then they learn."""
        parameters = [parameter for seed in self._trained() for parameter in seed]
        agreement = self._agreement
        if parameters and agreement.holds:
            try:
                means = agreement.circle.average(
                    [parameter.grad for parameter in parameters], parameters
                )
            except CircleError as error:
                agreement.give_up(str(error))
            else:
                for parameter, mean in zip(parameters, means, strict=True):
                    parameter.grad = mean
        if agreement.holds:
            super().learn(optimizer)
            return
        # Each rank would go its own way: better none of them moves.
        self._forget_gradients()

    def finalize(self, step: int, latest: Sequence[float]) -> GardenFrame:
        """As ever, but only the leader proposes, and nothing while an order is under way."""
        frame = super().finalize(step, latest)
        offer = self._offering.withdraw()
        if not self._agreement.leads or self._posted or not self._agreement.holds:
            offer = None
        if offer is not None and offer.place is not None and offer.place.plot in self._fallow:
            offer = None
        self._mine = offer
        return frame._replace(proposal=None if offer is None else offer.proposal)

    def asked(self, step: int) -> None:
        """Tells of the proposal of this step, which is not the one that is settled now."""
        self._offering.tell(self._mine, step)

    def apply(self, decision: Decision, *, enforced: bool) -> bool:
        """Do what was settled about the step before, as every rank does at this step."""
        order, self._order = self._order, None
        offer = None if order is None else self._offer_of(order)
        return self._decide(offer, decision, enforced)

    # What the agreement calls.

    def heard(self, flags: bytes, order: Order | None) -> None:
        """What came of the posts of the step before."""
        self._order = order
        self._posted = False
        for number, plot in enumerate(self._plots.values()):
            raised = flags[number * _FLAGS : (number + 1) * _FLAGS]
            self._hear(plot, raised)

    def flags(self) -> bytes:
        """What the other ranks must know of this one's slots."""
        return b"".join(map(self._flags_of, self._plots.values()))

    def digest(self) -> int:
        """Of all that must be alike on all ranks."""
        # Slots that lie fallow do so by a clock of their own.
        alike = [
            (plot.seed.id, plot.stage, plot.lifecycle.dwelt, plot.seed.alpha_steps)
            if plot.seed is not None
            else ()
            for plot in self._plots.values()
        ]
        return crc32(repr((alike, self._consent.pause.everything)).encode())

    def order(self) -> Order | None:
        """What this rank, the leader, has proposed in this step."""
        offer = self._mine
        if offer is None:
            return None
        self._posted = True
        return Order(
            offer.proposal,
            offer.slot,
            "" if offer.place is None else offer.place.blueprint,
            offer.reason,
        )

    def lost(self) -> None:
        """Freeze: alone, this rank must not become another than those it trains with."""
        self._order = self._mine = None
        self._consent.follow(
            Decision("", "", self._step, -1, Action.PAUSE, Severity.HIGH, NOT_AGREED)
        )

    # Parts of them.

    def _remove(self, plot: Plot, reason: str, severity: Severity) -> None:
        """Not now, but when all ranks do."""
        self._doomed[plot] = reason

    def _share_root(self, paths: list[str]) -> None:
        """Take the leader's number for parameters; and see that all have the same slots."""
        circle, ground = self._agreement.circle, self._ground
        slots = crc32("\0".join(paths).encode()).to_bytes(4, "little")
        root = (ground.root & (2**64 - 1)).to_bytes(8, "little")
        sent = slots + bytes(255 - each for each in slots)
        sent += root if circle.leads else bytes(8)
        try:
            heard = circle.send(sent).wait()
        except CircleError as error:
            raise GardenError(f"not all ranks have planted a garden: {error}") from None
        if heard[:8] != sent[:8]:
            raise GardenError(
                f"slots {', '.join(paths)}: expected the same on all ranks, in the same order"
            )
        ground.root = int.from_bytes(heard[8:], "little")

    def _hear(self, plot: Plot, raised: bytes) -> None:
        fetch, seed = plot.kernel_fetch, plot.seed
        if raised[_FETCHES] and isinstance(fetch, _AgreedFetch) and not raised[_WAITS]:
            fetch.agree(failed=bool(raised[_FAILED]), late=bool(raised[_LATE]))
        if raised[_DOOMED]:
            reason = self._doomed.pop(plot, ELSEWHERE)
            if plot.stage in GROWING:
                plot.cull(reason, Severity.HIGH)
        elif raised[_TROUBLED] and seed is not None and not seed.trouble:
            seed.trouble = ELSEWHERE
        (self._fallow.add if raised[_FALLOW] else self._fallow.discard)(plot)

    def _flags_of(self, plot: Plot) -> bytes:
        raised = bytearray(_FLAGS)
        fetch, seed = plot.kernel_fetch, plot.seed
        if isinstance(fetch, _AgreedFetch) and not fetch.ready():
            raised[_FETCHES] = 1
            raised[_WAITS] = not fetch.here.ready()
            if fetch.here.ready() and fetch.here.module is None:
                raised[_LATE if fetch.here.late else _FAILED] = 1
        raised[_DOOMED] = plot in self._doomed
        if seed is not None:
            raised[_TROUBLED] = bool(seed.trouble) or seed.faults_in_a_row >= IN_A_ROW
        raised[_FALLOW] = plot.stage not in (Stage.DORMANT, *GROWING)
        return bytes(raised)

    def _offer_of(self, order: Order) -> Offer | None:
        """``order`` as an offer of this garden; None when its slot must not be used."""
        plot = self._plots.get(order.slot)
        if plot is None:
            return None
        proposal, place = order.proposal, None
        if proposal.operation is SeedOperation.GERMINATE:
            if plot in self._fallow:
                return None
            place = Place(plot, order.blueprint, proposal.seed_id)
        return Offer(proposal, order.slot, place, order.reason)


class _AgreedFetch(Fetch):
    """A fetch that comes when it has come on all ranks; ``here`` is this rank's."""

    def __init__(self, here: Fetch) -> None:
        super().__init__(here.blueprint, float("inf"), lambda: 0)
        self.here = here

    def agree(self, *, failed: bool, late: bool) -> None:
        """What became of it on all ranks together."""
        here = self.here
        self.late = late and not failed
        whole = not failed and not late
        reason = "" if whole else here.reason or ELSEWHERE
        self.settle(here.module if whole else None, reason, here.latency_ms)


class _AgreedFetcher(KernelFetcher):
    """Fetches as ``here`` does, which is this rank's."""

    def __init__(self, here: KernelFetcher) -> None:
        self._here = here

    def request(self, blueprint: Blueprint, activation: Activation, seed: int) -> Fetch:
        return _AgreedFetch(self._here.request(blueprint, activation, seed))

    def compile(self, module: nn.Module, activation: Activation) -> Compilation:
        return self._here.compile(module, activation)

    def stop(self, timeout_s: float = 0.2) -> None:
        self._here.stop(timeout_s)
