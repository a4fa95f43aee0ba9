"""A garden: slots in a host model, the seeds in them, and who decides about them.

Planting changes nothing of the host. What is asked of a garden at any time is done at the
end of a step, where :class:`~esper_otel.tolaria.recorder.Recorder` calls, in this order:
:meth:`Garden.learn`, :meth:`Garden.finalize`, then the request, of which :meth:`Garden.asked`
tells it, then :meth:`Garden.apply` with the decision about the step before.

An operation is carried out by :meth:`Garden.apply` alone, from the proposal that went with
the very request that the decision answers, if it can still be done, and the proposal is used
up by that. While it is under way nothing else is proposed. What was not done is proposed
again from the state of things. So a request without an answer, or a pause, can neither lose
an operation nor do one twice.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import nan
from time import monotonic
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from esper_otel.kasmina import checkpoint
from esper_otel.kasmina.blueprints import lookup, registered
from esper_otel.kasmina.compiling import compile_apart
from esper_otel.kasmina.consent import Consent, judges
from esper_otel.kasmina.errors import GardenError
from esper_otel.kasmina.ground import Ground
from esper_otel.kasmina.growth import Plateau, Sight, choose
from esper_otel.kasmina.host import Host, submodules
from esper_otel.kasmina.kernels import Compiler, KernelFetcher
from esper_otel.kasmina.lifecycle import GROWING, TARGET
from esper_otel.kasmina.offer import Offer, Offering
from esper_otel.kasmina.optimizers import OptimizerFactory, adamw
from esper_otel.kasmina.plot import Plot
from esper_otel.kasmina.requests import Request, Requests, requests_of
from esper_otel.kasmina.scaling import Scaling
from esper_otel.kasmina.seed import Read, read_cpu
from esper_otel.kasmina.slot import Slot
from esper_otel.kasmina.sowing import Place, Sowing
from esper_otel.kasmina.state import (
    VERSION,
    GardenState,
    PauseState,
    PlateauState,
    parsed,
    plain,
)
from esper_otel.leyline.decisions import (
    NOT_ASKED,
    Action,
    Decision,
    Proposal,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import GardenFrame
from esper_otel.leyline.stages import TRANSITIONS, Stage, check_transition
from esper_otel.settings import EsperSettings

log = logging.getLogger("esper_otel")

CHANGES_THE_NETWORK = frozenset(
    {SeedOperation.GERMINATE, SeedOperation.CULL, SeedOperation.FOSSILIZE}
)
"""Operations after which a plateau has to show anew."""

_GONE = GardenFrame([], nan, nan, nan)

__all__ = ["Garden", "GardenError"]


class Memory(Protocol):
    """What a recorder remembers of the run, as far as a garden's decisions depend on it."""

    def state(self) -> dict[str, Any]:
        """Plain data for :meth:`resume`."""

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from there; ``ValueError`` for what is no such state, and then as before."""


class Garden:
    """Slots of ``model`` at the submodules called ``slots``, where seeds grow.

    ``optimizer`` is the host's, by default whichever sets the steps of the run.
    ``make_optimizer`` makes that of a seed, ``blueprints`` are those that the garden
    germinates of its own accord, by default all that fit. ``read`` begins to read a number
    from a device; by default only the CPU's are read. ``compiler`` makes seeds faster, off
    the training thread; by default :func:`~esper_otel.kasmina.compiling.compile_apart` where
    the settings ask for that. ``scaler`` is the ``GradScaler`` that scales the host's loss,
    if one does. ``clock`` (monotonic seconds) is that of embargoes; ``memory``
    goes with the garden's state.

    Raises :class:`GardenError` for a path that names no submodule or is named twice, and
    ``KeyError`` for a blueprint that is not registered. Nothing raises later but what is
    called with a wrong argument.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Iterable[str],
        *,
        settings: EsperSettings | None = None,
        optimizer: Optimizer | None = None,
        make_optimizer: OptimizerFactory = adamw,
        blueprints: Iterable[str] | None = None,
        read: Read | None = None,
        compiler: Compiler | None = None,
        scaler: Any = None,
        clock: Callable[[], float] = monotonic,
        memory: Memory | None = None,
    ) -> None:
        settings = EsperSettings() if settings is None else settings
        if compiler is None and settings.compile_seeds:
            compiler = compile_apart
        modules = submodules(model, slots)
        self.planted = True
        """False once it has been uprooted."""
        self.closed = False
        """Whether the run that it grew in is over, or it has been uprooted."""
        known = [lookup(name) for name in (registered() if blueprints is None else blueprints)]
        self._host = Host(model, optimizer)
        self._ground = Ground(
            settings,
            host=self._host.optimizer,
            fetcher=KernelFetcher(settings.kernel_budget_ms, compiler=compiler),
            make_optimizer=make_optimizer,
            read=read_cpu if read is None else read,
            clock=clock,
        )
        # Who drops a garden without a word must not be left with its threads.
        weakref.finalize(self, self._ground.fetcher.stop, 0.0).atexit = False
        self._memory = memory
        self._scaling = None if scaler is None else Scaling(scaler, self._forget_gradients)
        self._plots = {path: Plot(Slot(path, module), self._ground) for path, module in modules}
        self._plateau = Plateau(settings.plateau_steps, settings.plateau_improvement)
        self._offering = Offering(self._ground)
        self._requests = Requests(self._plots.values())
        self._sowing = Sowing(self._plots.values(), known)
        self._consent = Consent(self._ground)
        self._step = 0

    # What a user calls.

    def germinate(self, slot: str, blueprint: str, seed_id: str | None = None) -> str:
        """Sow a seed at the end of this step; returns its id.

        Raises :class:`GardenError` for a slot that is not the garden's or has a seed, and
        an id that was used before, ``KeyError`` for an unknown blueprint, and
        ``IllegalTransitionError`` while the slot lies fallow.
        """
        plot = self._plot(slot)
        lookup(blueprint)
        held = self._requests.seed_for(plot) if plot.seed is None else plot.seed.id
        if held is not None:
            raise GardenError(f"slot {slot!r}: expected an empty one, it has seed {held!r}")
        check_transition(plot.stage, Stage.GERMINATED)
        if seed_id is None:
            seed_id = self._sowing.fresh_id(plot)
        elif not seed_id or self._sowing.was_used(seed_id):
            raise GardenError(f"seed_id={seed_id!r}: expected one that was not used before")
        self._sowing.use(seed_id)
        self._requests.add(Request(SeedOperation.GERMINATE, plot, seed_id, blueprint))
        return seed_id

    def cull(self, seed_id: str) -> None:
        """Remove a seed at the end of this step.

        Raises :class:`GardenError` for a seed that is not here, and
        ``IllegalTransitionError`` for one that is part of the network by now.
        """
        plot = self._plot_of(seed_id)
        if plot is None:
            raise GardenError(f"seed_id={seed_id!r}: expected one of {', '.join(self.stages)}")
        check_transition(plot.stage, Stage.CULLED)
        self._requests.add(Request(SeedOperation.CULL, plot, seed_id))

    def uproot(self) -> None:
        """Take everything out, fossils as well: the host is what it was before planting."""
        if not self.planted:
            return
        self.planted = False
        self._requests.clear()
        self._offering.clear()
        for plot in self._plots.values():
            plot.terminate()
        self._host.let_go()
        self.close()

    def close(self) -> None:
        """The run is over: seeds stay as they are, and no kernel is fetched any more."""
        self.closed = True
        self._ground.fetcher.stop()
        if self._scaling is not None:
            self._scaling.let_go()

    @property
    def stages(self) -> dict[str, Stage]:
        """Stage of every seed that is here, by its id."""
        return {plot.seed.id: plot.stage for plot in self._plots.values() if plot.seed}

    @property
    def slots(self) -> dict[str, Stage]:
        """Stage of every slot, by its path."""
        return {path: plot.stage for path, plot in self._plots.items()}

    @property
    def parameters(self) -> int:
        """How many parameters the seeds add to the host's, those in isolation included."""
        return sum(
            parameter.numel()
            for plot in self._plots.values()
            for parameter in plot.slot.parameters()
        )

    def owns(self, optimizer: object) -> bool:
        """Whether ``optimizer`` is one of a seed: its steps are not the run's."""
        return any(
            plot.seed is not None and plot.seed.optimizer is optimizer
            for plot in self._plots.values()
        )

    # A restart.

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs, as of the end of the newest step.

        For ``torch.save`` and ``torch.load(weights_only=True)``. Its tensors are those in
        use, as in every torch state dict: copy them if the run goes on meanwhile. Raises
        :class:`GardenError` when the garden was uprooted.
        """
        self._expect_planted()
        ground, pause, memory = self._ground, self._consent.pause, self._memory
        state = GardenState(
            version=VERSION,
            step=self._step,
            root=ground.root,
            slots={path: plot.state() for path, plot in self._plots.items()},
            ids=sorted(self._sowing.ids),
            plateau=PlateauState(best=self._plateau.best, waited=self._plateau.waited),
            pause=PauseState(everything=pause.everything, seeds=sorted(pause.seeds)),
            requests=self._requests.state(),
            weather=ground.weather(),
            recorder=None if memory is None else memory.state(),
        )
        return plain(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be the garden that :meth:`state_dict` was called of.

        Called after the model is on its device and before ``optimizer.load_state_dict``,
        which needs the groups of the fossils that joined the optimizer. The garden has the
        same slots and nothing grows in it yet. Seeds are built here, in the calling thread.

        Raises :class:`GardenError`, which names what does not fit and what was expected,
        and leaves garden and optimizer as they were.
        """
        self._expect_planted()
        busy = [path for path, plot in self._plots.items() if plot.stage is not Stage.DORMANT]
        busy += [plot.name for plot in self._requests.plots]
        if busy:
            raise GardenError(
                f"slot {busy[0]!r} is in use: expected a garden in which nothing grows yet; "
                "uproot() it and plant another"
            )
        new = parsed(state)
        if set(new.slots) != set(self._plots):
            raise GardenError(
                f"state: slots {', '.join(new.slots)}: expected {', '.join(self._plots)}"
            )
        ground = self._ground
        regrown = {
            plot: checkpoint.regrow(path, new.slots[path], ground, self._host.device_of(path))
            for path, plot in self._plots.items()
        }
        requests = requests_of(new.requests, self._plot)
        take_back = self._host.take_back(
            each.back for each in regrown.values() if each.back is not None
        )
        if self._memory is not None and new.recorder is not None:
            try:
                self._memory.resume(new.recorder)
            except ValueError as error:
                raise GardenError(f"state: recorder: {error}") from None
        # From here on nothing fails.
        take_back()
        ground.resume(new.weather, new.root)
        for plot, each in regrown.items():
            plot.resume(each)
        self._step = new.step
        for plot in self._plots.values():
            plot.slot.turn(self._samples_next)
        self._plateau.best, self._plateau.waited = new.plateau.best, new.plateau.waited
        self._consent.pause.resume(new.pause.everything, new.pause.seeds)
        self._sowing.resume(new.ids)
        for request in requests:
            self._requests.add(request)

    # What the recorder calls, once per step each.

    def follow(self, optimizer: Optimizer) -> None:
        """Fossils join ``optimizer``, unless another was named when the garden was planted."""
        self._host.follow(optimizer)

    def learn(self, optimizer: Optimizer | None) -> None:
        """The host's ``optimizer`` has stepped: so do those of the seeds."""
        if optimizer is not None:
            self.follow(optimizer)
        if self._scaling is not None:
            self._scaling.unscale(optimizer, self._trained())
        for plot in self._plots.values():
            try:
                plot.learn()
            except Exception as error:
                self._failed(plot, "a step of its optimizer", error)

    def finalize(self, step: int, latest: Sequence[float]) -> GardenFrame:
        """End ``step``: look after every seed, and say how each is doing."""
        if not self.planted:
            return _GONE
        self._offering.make(None)
        self._step += 1
        ground = self._ground
        ground.look_at(latest)
        self._plateau.update(ground.loss)
        self._requests.carry_out(self._is_frozen, self._plateau.restart)
        sample = self._samples_next
        rows: list[tuple[str, list[float]]] = []
        sights: list[Sight] = []
        for plot in self._plots.values():
            try:
                row = self._tend(plot, sample)
                if row is None or plot.seed is None:
                    continue
                if plot.stage in GROWING:
                    sights.append(plot.sight(self._is_frozen(plot)))
            except Exception as error:
                self._failed(plot, "the end of a step", error)
                continue
            rows.append((plot.seed.id, row))
        live = len(sights)
        place = self._place_to_sow(live)
        # What waits for the end of a pause to be culled must not become something else first.
        staying = [sight for sight in sights if not self._requests.wants_out(sight.seed_id)]
        proposal = None
        if not self._offering.is_under_way:
            proposal = choose(staying, place.seed_id if place else None)
        if proposal is not None:
            self._offering.make(self._offer(proposal, place))
        return GardenFrame(rows, ground.violations, ground.fetch_ms, live, proposal)

    def asked(self, step: int) -> None:
        """The proposal of the newest frame went with the request about ``step``.

        Called with the step just ended where nobody is asked.
        """
        self._offering.went_out(step)

    def apply(self, decision: Decision, *, enforced: bool) -> bool:
        """Do what ``decision`` says of the proposal that went with its request.

        Returns whether the decision changed anything: what the garden does by itself, because
        it grows autonomously, is not the decision's doing. A decision that is not
        ``enforced``, and one that nobody gave, neither freezes nor resumes.
        """
        asked = None if decision.reason == NOT_ASKED else decision.step
        return self._decide(self._offering.answered(asked), decision, enforced)

    def _decide(self, offer: Offer | None, decision: Decision, enforced: bool) -> bool:
        judged = judges(decision, enforced)
        acted = judged and self._consent.follow(decision)
        granted = judged and decision.action is Action.SEED
        if offer is not None and self._consent.to(offer.proposal, decision, judged):
            if not self._can_be_done(offer):
                return acted
            return (self._carry_out(offer) and granted) or acted
        if granted:
            target = decision.target_seed
            known = target is not None and self._plot_of(target) is not None
            self._consent.refuse(decision, known)
        return acted

    def _can_be_done(self, offer: Offer) -> bool:
        """Whether what was proposed a step ago still fits the state of its slot."""
        proposal, plot = offer.proposal, self._plots[offer.slot]
        if TARGET[proposal.operation] not in TRANSITIONS[plot.stage]:
            return False
        if offer.place is not None:
            return not (plot in self._requests.plots or self._sowing.was_used(proposal.seed_id))
        return plot.seed is not None and plot.seed.id == proposal.seed_id

    def take_events(self) -> list[Event]:
        """What has happened since last asked."""
        waiting = self._ground.events
        if not waiting:
            return []
        taken = list(waiting)
        waiting.clear()
        return taken

    # Parts of them.

    def _trained(self) -> list[list[nn.Parameter]]:
        """What the optimizer of each seed trains, for those that have one."""
        return [
            [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for plot in self._plots.values()
            if plot.seed is not None and (optimizer := plot.seed.optimizer) is not None
        ]

    def _forget_gradients(self) -> None:
        for parameters in self._trained():
            for parameter in parameters:
                parameter.grad = None

    def _tend(self, plot: Plot, sample: bool) -> list[float] | None:
        row = plot.tend(self._is_frozen(plot), sample)
        if plot.breaker_open:
            # Not a matter of growth: a pause must not keep a leak in place.
            self._remove(plot, "its breaker opened: it violated its isolation", Severity.HIGH)
            return None
        plot.tell_if_unused()
        return row

    @property
    def _samples_next(self) -> bool:
        """Whether the next step takes isolation statistics."""
        every = self._ground.settings.isolation_every
        return bool(every) and (self._step + 1) % every == 0

    def _is_frozen(self, plot: Plot) -> bool:
        return self._consent.pause.holds(None if plot.seed is None else plot.seed.id)

    def _place_to_sow(self, live: int) -> Place | None:
        """Where a seed would be sown now, None when it is not the time."""
        if not self._plateau.reached or live >= self._ground.settings.seeds_at_once:
            return None
        return self._sowing.next(self._requests.plots)

    def _offer(self, proposal: Proposal, place: Place | None) -> Offer | None:
        if proposal.operation is SeedOperation.GERMINATE and place is not None:
            return Offer(proposal, place.plot.name, place)
        plot = self._plot_of(proposal.seed_id)
        return None if plot is None else Offer(proposal, plot.name, reason=plot.hopeless)

    def _carry_out(self, offer: Offer) -> bool:
        """Do what was proposed; whether that went well."""
        proposal, place, plot = offer.proposal, offer.place, self._plots[offer.slot]
        try:
            if place is not None:
                self._sowing.use(place.seed_id)
                plot.germinate(place.seed_id, place.blueprint)
            elif proposal.operation is SeedOperation.CULL:
                plot.cull(offer.reason)
            else:
                plot.advance(proposal.operation)
        except Exception as error:
            self._failed(plot, proposal.operation.value, error)
            return False
        if proposal.operation in CHANGES_THE_NETWORK:
            self._plateau.restart()
        return True

    def _failed(self, plot: Plot, what: str, error: Exception) -> None:
        """Something of a seed raised: it goes, and the run goes on."""
        plot.tell_fault(what, error)
        log.debug("the fault", exc_info=error)
        try:
            if plot.stage in GROWING:
                self._remove(plot, f"{what} raised {type(error).__name__}", Severity.HIGH)
        except Exception:
            log.exception("a seed that failed could not be culled")

    def _remove(self, plot: Plot, reason: str, severity: Severity) -> None:
        """A seed has to go that nobody decides about."""
        plot.cull(reason, severity)

    def _expect_planted(self) -> None:
        if not self.planted:
            raise GardenError("the garden was uprooted: expected one that is planted")

    def _plot(self, path: str) -> Plot:
        plot = self._plots.get(path)
        if plot is None:
            raise GardenError(f"slot {path!r}: expected one of {', '.join(self._plots)}")
        return plot

    def _plot_of(self, seed_id: str) -> Plot | None:
        for plot in self._plots.values():
            if plot.seed is not None and plot.seed.id == seed_id:
                return plot
        return None
