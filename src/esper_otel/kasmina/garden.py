"""A garden: slots in a host model, the seeds in them, and who decides about them.

Planting changes nothing of the host. What is asked of a garden at any time is done at the
end of a step, where :class:`~esper_otel.tolaria.recorder.Recorder` calls, in this order:
:meth:`Garden.learn`, :meth:`Garden.finalize`, then the request, of which
:meth:`Garden.proposal_sent` tells it, then :meth:`Garden.apply` with the decision about the
step before.

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
from typing import Any

from torch import nn
from torch.optim import Optimizer

from esper_otel.kasmina.approval import Approval, is_authoritative
from esper_otel.kasmina.blueprints import lookup, registered
from esper_otel.kasmina.checkpoint import AwaitedFossils, expect_unused, restore_slots
from esper_otel.kasmina.compiling import compile_apart
from esper_otel.kasmina.context import GardenContext
from esper_otel.kasmina.harvest import harvest
from esper_otel.kasmina.hook import SlotHook
from esper_otel.kasmina.host import Host, OptimizerFactory, SeedGradScaler, adamw, submodules
from esper_otel.kasmina.kernels import Compiler, KernelFetcher
from esper_otel.kasmina.lifecycle import GROWING, GardenError, SeedView
from esper_otel.kasmina.planning import PlannedOperation, Planner, parse_requests
from esper_otel.kasmina.seed import Read, read_cpu
from esper_otel.kasmina.slot import Slot
from esper_otel.kasmina.state import VERSION, GardenState, Stateful, parsed, plain
from esper_otel.leyline.decisions import NOT_ASKED, Action, Decision, Severity
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import GardenFrame
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings

log = logging.getLogger("esper_otel")

_UPROOTED = GardenFrame([], nan, nan, nan)

__all__ = ["Garden", "GardenError"]


class Garden:
    """Slots of ``model`` at the submodules called ``slots``, where seeds grow.

    ``optimizer`` is the host's, by default the one that defines the run's steps.
    ``make_optimizer`` makes that of a seed, ``blueprints`` are those that the garden
    germinates on its own, by default all that fit. ``read`` begins to read a number
    from a device; by default only the CPU's are read. ``compiler`` makes seeds faster, off
    the training thread; by default :func:`~esper_otel.kasmina.compiling.compile_apart` if
    the settings enable it. ``scaler`` is the ``GradScaler`` that scales the host's loss,
    if any. ``clock`` (monotonic seconds) is that of embargoes; the garden's state includes
    that of ``recorder``.

    Raises :class:`GardenError` for a path that names no submodule or is named twice, and
    ``KeyError`` for a blueprint that is not registered. Later only a wrong
    argument raises.
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
        recorder: Stateful | None = None,
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
        self._awaited = AwaitedFossils(model)
        context = self._context = GardenContext(
            settings,
            host_optimizer=self._host.optimizer,
            fetcher=KernelFetcher(settings.kernel_budget_ms, compiler=compiler),
            make_optimizer=make_optimizer,
            read=read_cpu if read is None else read,
            clock=clock,
        )
        # Who drops a garden without a word must not be left with its threads.
        weakref.finalize(self, self._context.fetcher.stop, 0.0).atexit = False
        self._recorder = recorder
        self._scaler = scaler and SeedGradScaler(scaler, self._forget_gradients)
        self._slots = {path: Slot(SlotHook(path, each), context) for path, each in modules}
        self._planner = Planner(self._slots, known, context)
        self._approval = Approval(self._context)
        self._step = 0

    # What a user calls.

    def germinate(self, slot: str, blueprint: str, seed_id: str | None = None) -> str:
        """Let a seed germinate at the end of this step; returns its id.

        Raises :class:`GardenError` for a slot that is not the garden's or has a seed, and
        an id that was used before, ``KeyError`` for an unknown blueprint, and
        ``IllegalTransitionError`` while the slot is under embargo.
        """
        return self._planner.request_germination(self.slot(slot), blueprint, seed_id)

    def cull(self, seed_id: str) -> None:
        """Remove a seed at the end of this step.

        Raises :class:`GardenError` for a seed that is not here, and
        ``IllegalTransitionError`` for one that is part of the network by now.
        """
        self._planner.request_cull(seed_id)

    def uproot(self) -> None:
        """Remove everything, including fossils: the host is as it was before planting."""
        if not self.planted:
            return
        self.planted = False
        self._planner.requests.clear()
        self._planner.pending.clear()
        for slot in self._slots.values():
            slot.terminate()
        self._host.release_optimizer()
        self._awaited.detach()
        self.close()

    def harvest(self) -> nn.Module:
        """A copy of the grown model without hooks and without this package.

        Raises :class:`GardenError` for a slot that cannot be copied.
        """
        self._expect_planted()
        return harvest(self._host.model(), self._slots)

    def follow(self, copied: nn.Module) -> None:
        """Give later fossils to a copy of the model as well, such as that of an average."""
        submodules(copied, self._slots)
        self._context.followers.append(weakref.ref(copied))

    def close(self) -> None:
        """The run is over: seeds stay as they are, and no kernel is fetched any more."""
        self.closed = True
        self._context.fetcher.stop()
        if self._scaler is not None:
            self._scaler.detach()

    def slot(self, path: str) -> Slot:
        """The slot at submodule ``path``; raises :class:`GardenError` where there is none."""
        slot = self._slots.get(path)
        if slot is None:
            raise GardenError(f"slot {path!r}: expected one of {', '.join(self._slots)}")
        return slot

    @property
    def stages(self) -> dict[str, Stage]:
        """Stage of every seed that is here, by its id."""
        return {slot.seed.id: slot.stage for slot in self._slots.values() if slot.seed}

    @property
    def slots(self) -> dict[str, Stage]:
        """Stage of every slot, by its path."""
        return {path: slot.stage for path, slot in self._slots.items()}

    @property
    def parameters(self) -> int:
        """Number of parameters that the seeds add to the host's, including isolated ones."""
        hooks = [slot.hook for slot in self._slots.values()]
        return sum(each.numel() for hook in hooks for each in hook.parameters())

    def is_seed_optimizer(self, optimizer: object) -> bool:
        """Whether ``optimizer`` is one of a seed: its steps are not the run's."""
        seeds = [slot.seed for slot in self._slots.values() if slot.seed]
        return any(seed.optimizer is optimizer for seed in seeds)

    # A restart.

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs, as of the end of the newest step.

        For ``torch.save`` and ``torch.load(weights_only=True)``. Its tensors are those in
        use, as in every torch state dict: copy them if the run goes on meanwhile. Raises
        :class:`GardenError` when the garden was uprooted.
        """
        self._expect_planted()
        context, planner, recorder = self._context, self._planner, self._recorder
        state = GardenState(
            version=VERSION,
            step=self._step,
            rng_root=context.rng_root,
            slots={path: slot.state() for path, slot in self._slots.items()},
            ids=sorted(planner.placement.used_ids),
            plateau=context.plateau.state,
            freeze=self._approval.freeze.state,
            requests=planner.requests.states,
            signals=context.signals(),
            recorder=None if recorder is None else recorder.state_dict(),
        )
        return plain(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of :meth:`state_dict`, of this garden or one like it.

        Called after the model is on its device and before ``optimizer.load_state_dict``,
        which needs the groups of the fossils that joined the optimizer. The garden has the
        same slots and nothing grows in it yet. Seeds are built here, in the calling thread.

        Raises :class:`GardenError`, which names the mismatch and the expected value, and then
        leaves garden and optimizer unchanged.
        """
        self._expect_planted()
        context, planner = self._context, self._planner
        requested = [slot.name for slot in planner.requests.slots]
        expect_unused(self.slots.items(), requested)
        new = parsed(state)
        restored = restore_slots(self._slots, new.slots, context, self._host.device_of)
        requests = parse_requests(new.requests, self.slot)
        rejoin = self._host.prepare_rejoin(
            each.joined for each in restored.values() if each.joined is not None
        )
        if self._recorder is not None and new.recorder is not None:
            try:
                self._recorder.load_state_dict(new.recorder)
            except ValueError as error:
                raise GardenError(f"state: recorder: {error}") from None
        # From here on nothing fails.
        rejoin()
        self._awaited.forget()
        context.rng_root = new.rng_root
        context.load_signals(new.signals)
        context.plateau.load_state(new.plateau)
        for path, each in restored.items():
            self._slots[path].restore_from(each)
        self._step = new.step
        for slot in self._slots.values():
            slot.hook.start_step(self._samples_next)
        self._approval.freeze.load_state(new.freeze)
        planner.placement.used_ids = set(new.ids)
        for request in requests:
            planner.requests.add(request)

    # What the recorder calls, once per step each.

    def set_host_optimizer(self, optimizer: Optimizer) -> None:
        """Fossils join ``optimizer``, unless another was named when the garden was planted."""
        self._host.set_optimizer(optimizer)

    def learn(self, optimizer: Optimizer | None) -> None:
        """The host's ``optimizer`` has stepped: so do those of the seeds."""
        if optimizer is not None:
            self.set_host_optimizer(optimizer)
        if self._scaler is not None:
            self._scaler.unscale(optimizer, self._trained())
        for slot in self._slots.values():
            try:
                slot.step_optimizer()
            except Exception as error:
                self._failed(slot, "a step of its optimizer", error)

    def finalize(self, step: int, latest: Sequence[float]) -> GardenFrame:
        """End ``step``: look after every seed, and say how each is doing."""
        if not self.planted:
            return _UPROOTED
        context, planner = self._context, self._planner
        planner.pending.set(None)
        self._step += 1
        context.update_signals(latest)
        planner.requests.carry_out(self._is_frozen, context.plateau.restart)
        sample = self._samples_next
        rows: list[tuple[str, list[float]]] = []
        growing: list[SeedView] = []
        for slot in self._slots.values():
            try:
                row = self._end_step(slot, sample)
                if row is None or slot.seed is None:
                    continue
                if slot.stage in GROWING:
                    growing.append(slot.view(self._is_frozen(slot)))
            except Exception as error:
                self._failed(slot, "the end of a step", error)
                continue
            rows.append((slot.seed.id, row))
        proposal = planner.propose(growing)
        return GardenFrame(rows, context.violations, context.fetch_ms, len(growing), proposal)

    def proposal_sent(self, step: int) -> None:
        """The proposal of the newest frame went with the request about ``step``.

        Called with the step just ended if no requests are sent.
        """
        self._planner.pending.mark_sent(step)

    def apply(self, decision: Decision, *, enforced: bool) -> bool:
        """Apply ``decision`` to the proposal of its request.

        Returns whether the decision changed anything; operations of an autonomous garden do
        not count. A decision that is not ``enforced``, or that no sidecar made, neither
        freezes nor resumes.
        """
        asked = None if decision.reason == NOT_ASKED else decision.step
        return self._decide(self._planner.pending.pop(asked), decision, enforced)

    def take_events(self) -> list[Event]:
        """The events since the last call."""
        return self._context.take_events()

    # Parts of them.

    def _decide(
        self, planned: PlannedOperation | None, decision: Decision, enforced: bool
    ) -> bool:
        authoritative, approval = is_authoritative(decision, enforced), self._approval
        acted = authoritative and approval.update_freeze(decision)
        granted = authoritative and decision.action is Action.SEED
        if planned is not None and approval.allows(planned.proposal, decision, authoritative):
            if not self._planner.is_feasible(planned):
                return acted
            return (self._carry_out(planned) and granted) or acted
        if granted:
            target = decision.target_seed
            known = target is not None and self._planner.slot_of(target) is not None
            approval.report_refusal(decision, known)
        return acted

    def _carry_out(self, planned: PlannedOperation) -> bool:
        """Do what was proposed; whether that went well."""
        try:
            self._planner.carry_out(planned)
        except Exception as error:
            operation = planned.proposal.operation
            self._failed(self._slots[planned.slot], operation.value, error)
            return False
        return True

    def _trained(self) -> list[list[nn.Parameter]]:
        """What the optimizer of each seed trains, for those that have one."""
        seeds = [slot.seed for slot in self._slots.values() if slot.seed]
        return [seed.trained for seed in seeds if seed.optimizer is not None]

    def _forget_gradients(self) -> None:
        for parameters in self._trained():
            for parameter in parameters:
                parameter.grad = None

    def _end_step(self, slot: Slot, sample: bool) -> list[float] | None:
        row = slot.end_step(self._is_frozen(slot), sample)
        if slot.breaker_open:
            # Not a matter of growth: a pause must not keep a leak in place.
            self._remove(slot, "its breaker opened: it violated its isolation", Severity.HIGH)
            return None
        slot.report_if_unused()
        return row

    @property
    def _samples_next(self) -> bool:
        """Whether the next step takes isolation statistics."""
        every = self._context.settings.isolation_every
        return bool(every) and (self._step + 1) % every == 0

    def _is_frozen(self, slot: Slot) -> bool:
        return self._approval.freeze.covers(None if slot.seed is None else slot.seed.id)

    def _failed(self, slot: Slot, what: str, error: Exception) -> None:
        """Something of a seed raised: it goes, and the run goes on."""
        slot.report_fault(what, error)
        log.debug("the fault", exc_info=error)
        try:
            if slot.stage in GROWING:
                self._remove(slot, f"{what} raised {type(error).__name__}", Severity.HIGH)
        except Exception:
            log.exception("a seed that failed could not be culled")

    def _remove(self, slot: Slot, reason: str, severity: Severity) -> None:
        """A seed has to go that nobody decides about."""
        slot.cull(reason, severity)

    def _expect_planted(self) -> None:
        if not self.planted:
            raise GardenError("the garden was uprooted: expected one that is planted")
