"""A garden: slots in a host model, the seeds in them, and who decides about them.

Planting changes nothing of the host. What is asked of a garden at any time is done at the
end of a step, where :class:`~esper_otel.tolaria.recorder.Recorder` calls, in this order:
:meth:`Garden.learn`, :meth:`Garden.finalize`, then the ask, then :meth:`Garden.apply`.

An operation is carried out by :meth:`Garden.apply` alone, from the proposal that went with
the very ask that the decision answers, and the proposal is used up by that. What was not
done is proposed again from the state of things. So an ask without an answer, or a pause,
can neither lose an operation nor do one twice.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from math import nan
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from esper_otel.kasmina.blueprints import lookup, registered
from esper_otel.kasmina.ground import Ground
from esper_otel.kasmina.growth import Plateau, Sight, choose
from esper_otel.kasmina.kernels import Compiler, KernelFetcher
from esper_otel.kasmina.lifecycle import GROWING
from esper_otel.kasmina.optimizers import OptimizerFactory, adamw
from esper_otel.kasmina.pause import Pause
from esper_otel.kasmina.plot import Plot
from esper_otel.kasmina.seed import Read, read_cpu
from esper_otel.kasmina.slot import Slot
from esper_otel.kasmina.sowing import Place, Sowing
from esper_otel.leyline import events
from esper_otel.leyline.decisions import (
    FAILED_OPEN,
    NOT_ASKED,
    Action,
    Decision,
    Proposal,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import GardenFrame
from esper_otel.leyline.stages import Stage, check_transition
from esper_otel.settings import EsperSettings, Growth

log = logging.getLogger("esper_otel")

CHANGES_THE_NETWORK = frozenset(
    {SeedOperation.GERMINATE, SeedOperation.CULL, SeedOperation.FOSSILIZE}
)
"""Operations after which a plateau has to show anew."""

_GONE = GardenFrame([], nan, nan, nan)


class GardenError(ValueError):
    """Something a garden was asked for that cannot be; says what was expected."""


class _Request(NamedTuple):
    """What the user asked for and waits for the end of a step."""

    operation: SeedOperation
    plot: Plot
    seed_id: str
    blueprint: str = ""


class Garden:
    """Slots of ``model`` at the submodules called ``slots``, where seeds grow.

    ``optimizer`` is the host's, by default whichever sets the steps of the run.
    ``make_optimizer`` makes that of a seed, ``blueprints`` are those that the garden
    germinates of its own accord, by default all that fit. ``read`` begins to read a number
    from a device; by default only the CPU's are read. ``compiler`` makes seeds faster, off
    the training thread.

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
    ) -> None:
        settings = EsperSettings() if settings is None else settings
        modules = _submodules(model, slots)
        self.planted = True
        """False once it has been uprooted."""
        known = [lookup(name) for name in (registered() if blueprints is None else blueprints)]
        self._settings = settings
        self._ground = Ground(
            settings,
            fetcher=KernelFetcher(settings.kernel_budget_ms, compiler=compiler),
            make_optimizer=make_optimizer,
            read=read_cpu if read is None else read,
        )
        # Who drops a garden without a word must not be left with its threads.
        weakref.finalize(self, self._ground.fetcher.stop, 0.0).atexit = False
        self._follows_run = optimizer is None
        if optimizer is not None:
            self._ground.host = weakref.ref(optimizer)
        self._plots = {path: Plot(Slot(path, module), self._ground) for path, module in modules}
        self._plateau = Plateau(settings.plateau_steps, settings.plateau_improvement)
        self._proposal: Proposal | None = None
        self._place: Place | None = None
        self._requests: deque[_Request] = deque()
        self._sowing = Sowing(self._plots.values(), known)
        self._pause = Pause()
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
        waiting = [each.seed_id for each in list(self._requests) if each.plot is plot]
        if plot.seed is not None or waiting:
            held = plot.seed.id if plot.seed is not None else waiting[0]
            raise GardenError(f"slot {slot!r}: expected an empty one, it has seed {held!r}")
        check_transition(plot.stage, Stage.GERMINATED)
        if seed_id is None:
            seed_id = self._sowing.fresh_id(plot)
        elif not seed_id or self._sowing.was_used(seed_id):
            raise GardenError(f"seed_id={seed_id!r}: expected one that was not used before")
        self._sowing.use(seed_id)
        self._requests.append(_Request(SeedOperation.GERMINATE, plot, seed_id, blueprint))
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
        self._requests.append(_Request(SeedOperation.CULL, plot, seed_id))

    def uproot(self) -> None:
        """Take everything out, fossils as well: the host is what it was before planting."""
        if not self.planted:
            return
        self.planted = False
        self._requests.clear()
        self._proposal = None
        for plot in self._plots.values():
            plot.terminate()
        self.close()

    def close(self) -> None:
        """The run is over: seeds stay as they are, and no kernel is fetched any more."""
        self._ground.fetcher.stop()

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

    # What the recorder calls, once per step each.

    def learn(self, optimizer: Optimizer | None) -> None:
        """The host's ``optimizer`` has stepped: so do those of the seeds."""
        ground = self._ground
        if self._follows_run and optimizer is not None and ground.host() is not optimizer:
            ground.host = weakref.ref(optimizer)
        for plot in self._plots.values():
            try:
                plot.learn()
            except Exception as error:
                self._failed(plot, "a step of its optimizer", error)

    def finalize(self, step: int, latest: Sequence[float]) -> GardenFrame:
        """End ``step``: look after every seed, and say how each is doing."""
        if not self.planted:
            return _GONE
        self._proposal = None
        self._step += 1
        ground = self._ground
        ground.look_at(latest)
        self._plateau.update(ground.loss)
        if self._requests:
            self._carry_out_requests()
        every = self._settings.isolation_every
        sample = bool(every) and (self._step + 1) % every == 0
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
        self._place = self._place_to_sow(live)
        self._proposal = choose(sights, self._place.seed_id if self._place else None)
        return GardenFrame(rows, ground.violations, ground.fetch_ms, live, self._proposal)

    def apply(self, decision: Decision, *, enforced: bool) -> bool:
        """Do what ``decision`` says of the proposal that went with its ask.

        Returns whether anything was done. A decision that is not ``enforced``, and one
        that nobody gave, neither freezes nor resumes.
        """
        proposal, self._proposal = self._proposal, None
        judged = (
            enforced and decision.reason != NOT_ASKED and decision.reason not in FAILED_OPEN
        )
        acted = judged and self._pause_by(decision)
        if proposal is not None and self._may(proposal, decision, judged):
            return self._carry_out(proposal) or acted
        if judged and decision.action is Action.SEED:
            self._refuse(decision)
        return acted

    def take_events(self) -> list[Event]:
        """What has happened since last asked."""
        waiting = self._ground.events
        if not waiting:
            return []
        taken = list(waiting)
        waiting.clear()
        return taken

    # Parts of them.

    def _tend(self, plot: Plot, sample: bool) -> list[float] | None:
        row = plot.tend(self._is_frozen(plot), sample)
        if plot.breaker_open:
            # Not a matter of growth: a pause must not keep a leak in place.
            plot.cull("its breaker opened: it violated its isolation", Severity.HIGH)
            return None
        plot.tell_if_unused()
        return row

    def _is_frozen(self, plot: Plot) -> bool:
        return self._pause.holds(None if plot.seed is None else plot.seed.id)

    def _place_to_sow(self, live: int) -> Place | None:
        """Where a seed would be sown now, None when it is not the time."""
        if not self._plateau.reached or live >= self._settings.seeds_at_once:
            return None
        return self._sowing.next([request.plot for request in self._requests])

    def _may(self, proposal: Proposal, decision: Decision, judged: bool) -> bool:
        if not judged:
            autonomous = self._settings.growth is Growth.AUTONOMOUS
            return autonomous and not self._pause.holds(proposal.seed_id)
        if decision.action is Action.SEED:
            asked = (decision.target_seed, decision.seed_operation)
            return asked == (proposal.seed_id, proposal.operation)
        return decision.action is Action.CONTINUE and self._settings.growth is Growth.AUTONOMOUS

    def _carry_out(self, proposal: Proposal) -> bool:
        """Do what was proposed; whether that went well."""
        sows = proposal.operation is SeedOperation.GERMINATE
        place = self._place if sows else None
        plot = place.plot if place is not None else self._plot_of(proposal.seed_id)
        if plot is None:
            return False
        try:
            if place is not None:
                self._sowing.use(place.seed_id)
                plot.germinate(place.seed_id, place.blueprint)
            elif proposal.operation is SeedOperation.CULL:
                plot.cull(plot.hopeless)
            else:
                plot.advance(proposal.operation)
        except Exception as error:
            self._failed(plot, proposal.operation.value, error)
            return False
        if proposal.operation in CHANGES_THE_NETWORK:
            self._plateau.restart()
        return True

    def _carry_out_requests(self) -> None:
        """Those whose time has come; the others wait on.

        Kernels are fetched one at a time, so as not to take the run's processors.
        """
        for _ in range(len(self._requests)):
            request = self._requests.popleft()
            plot = request.plot
            sows = request.operation is SeedOperation.GERMINATE
            if self._is_frozen(plot) or (sows and not self._can_sow(plot)):
                self._requests.append(request)
                continue
            try:
                if sows:
                    plot.germinate(request.seed_id, request.blueprint)
                    self._plateau.restart()
                elif plot.seed is not None and plot.seed.id == request.seed_id:
                    plot.cull("as asked", Severity.NORMAL)
            except Exception as error:
                plot.tell_fault(request.operation.value, error)

    def _can_sow(self, plot: Plot) -> bool:
        fetching = any(other.fetching for other in self._plots.values())
        return plot.slot.activation is not None and not fetching

    def _pause_by(self, decision: Decision) -> bool:
        """Pause or resume as ``decision`` says; whether that changes anything."""
        pause = self._pause
        if not pause.follow(decision):
            return False
        why = decision.reason
        if pause:
            text = f"{pause} paused: {why}"
            self._ground.tell(events.PAUSED, Severity.WARNING, text, reason=why)
        else:
            self._ground.tell(events.RESUMED, Severity.NORMAL, "seeds go on", reason=why)
        return True

    def _refuse(self, decision: Decision) -> None:
        target, operation = decision.target_seed, decision.seed_operation
        known = target is not None and self._plot_of(target) is not None
        why = "it was not proposed" if known else "there is no such seed"
        self._ground.tell(
            events.REFUSED,
            Severity.WARNING,
            f"{operation} of {target} is not done: {why}",
            seed_id=target or "",
            operation=str(operation),
            reason=why,
        )

    def _failed(self, plot: Plot, what: str, error: Exception) -> None:
        """Something of a seed raised: it goes, and the run goes on."""
        plot.tell_fault(what, error)
        log.debug("the fault", exc_info=error)
        try:
            if plot.stage in GROWING:
                plot.cull(f"{what} raised {type(error).__name__}", Severity.HIGH)
        except Exception:
            log.exception("a seed that failed could not be culled")

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


def _submodules(model: nn.Module, slots: Iterable[str]) -> list[tuple[str, nn.Module]]:
    paths = [slots] if isinstance(slots, str) else list(slots)
    if not paths:
        raise GardenError("slots=[]: expected at least one path of a submodule")
    found: list[tuple[str, nn.Module]] = []
    for path in paths:
        if any(path == other for other, _ in found):
            raise GardenError(f"slot {path!r} is named twice")
        try:
            found.append((path, model.get_submodule(path)))
        except AttributeError as error:
            known = ", ".join(name for name, _ in model.named_modules() if name)
            raise GardenError(
                f"slot {path!r} is no submodule ({error}): expected one of {known}"
            ) from None
    return found
