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

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

from torch import Tensor, nn

from esper_otel.kasmina.blueprints import Blueprint
from esper_otel.kasmina.garden import Garden, GardenError
from esper_otel.kasmina.kernels import Activation, Compilation, Fetch, KernelFetcher
from esper_otel.kasmina.lifecycle import GROWING
from esper_otel.kasmina.planning import Candidate, PlannedOperation
from esper_otel.kasmina.slot import IN_A_ROW, Slot
from esper_otel.leyline.decisions import (
    NOT_AGREED,
    Action,
    Decision,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.frames import GardenFrame
from esper_otel.leyline.stages import Stage
from esper_otel.ranks.agreement import Agreement, SeedCommand
from esper_otel.ranks.process_group import ProcessGroupError
from esper_otel.settings import EsperSettings, Fossils

ELSEWHERE = "it failed on another rank"
"""Why a seed goes whose fault only another rank has seen."""

_FLAGS = 7
_FETCHES, _WAITS, _FAILED, _LATE, _DOOMED, _TROUBLED, _FALLOW = range(_FLAGS)
"""Of each slot: its kernel is fetched; it has not come; it failed; it was late; the seed
must go at once; the seed does not work; nothing may germinate in the slot."""


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
                    f"{agreement.group.size} ranks: expected one on the CPU, where the "
                    "gradients of seeds can be averaged without waiting for a device"
                )
        settings = EsperSettings() if settings is None else settings
        super().__init__(
            model, slots, settings=settings.changed(fossils=Fossils.STAY), **options
        )
        self._agreement = agreement
        self._context.fetcher = _AgreedFetcher(self._context.fetcher)
        self._doomed: dict[Slot, str] = {}
        self._fallow: set[Slot] = set()
        self._held = HeldGradients()
        self._mine: PlannedOperation | None = None
        self._posted = False
        self._command: SeedCommand | None = None
        self._share_root(list(self._slots))
        agreement.shared = self

    # What the recorder calls.

    def learn(self, optimizer: Any) -> None:
        """Average the gradients of the seeds over the ranks; then they learn."""
        self._held.give_back()
        parameters = [parameter for seed in self._trained() for parameter in seed]
        agreement = self._agreement
        if parameters and agreement.holds:
            try:
                means = agreement.group.average(
                    [parameter.grad for parameter in parameters], parameters
                )
            except ProcessGroupError as error:
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
        """As ever, but only the leader proposes, and nothing while a command is under way."""
        frame = super().finalize(step, latest)
        planned = self._planner.pending.withdraw()
        if not self._agreement.leads or self._posted or not self._agreement.holds:
            planned = None
        candidate = None if planned is None else planned.candidate
        if candidate is not None and candidate.slot in self._fallow:
            planned = None
        self._mine = planned
        return frame._replace(proposal=None if planned is None else planned.proposal)

    def proposal_sent(self, step: int) -> None:
        """Tells of the proposal of this step, which is not the one that is settled now."""
        self._planner.pending.announce(self._mine, step)

    def apply(self, decision: Decision, *, enforced: bool) -> bool:
        """Do what was settled about the step before, as every rank does at this step."""
        command, self._command = self._command, None
        planned = None if command is None else self._planned(command)
        acted = self._decide(planned, decision, enforced)
        self._hold_fossils()
        return acted

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As ever; fossils that come back are kept from who clips gradients."""
        super().load_state_dict(state)
        self._hold_fossils()

    # What the agreement calls.

    def on_round(self, flags: bytes, command: SeedCommand | None) -> None:
        """What came of what was posted of the step before."""
        self._command = command
        self._posted = False
        for number, slot in enumerate(self._slots.values()):
            raised = flags[number * _FLAGS : (number + 1) * _FLAGS]
            self._hear(slot, raised)

    def flags(self) -> bytes:
        """What the other ranks must know of this one's slots."""
        return b"".join(map(self._flags_of, self._slots.values()))

    def digest(self) -> int:
        """Of all that must be alike on all ranks."""
        # Slots that lie fallow do so by a clock of their own.
        alike = [
            (slot.seed.id, slot.stage, slot.lifecycle.dwelt, slot.seed.alpha_steps)
            if slot.seed is not None
            else ()
            for slot in self._slots.values()
        ]
        return crc32(repr((alike, self._approval.freeze.everything)).encode())

    def command(self) -> SeedCommand | None:
        """What this rank, the leader, has proposed in this step."""
        planned = self._mine
        if planned is None:
            return None
        self._posted = True
        return SeedCommand(
            planned.proposal,
            planned.slot,
            "" if planned.candidate is None else planned.candidate.blueprint,
            planned.reason,
        )

    def on_agreement_lost(self) -> None:
        """Freeze: alone, this rank must not become another than those it trains with."""
        self._command = self._mine = None
        self._approval.update_freeze(
            Decision("", "", self._step, -1, Action.PAUSE, Severity.HIGH, NOT_AGREED)
        )

    # Parts of them.

    def _hold_fossils(self) -> None:
        fossils = [s.hook for s in self._slots.values() if s.stage is Stage.FOSSILIZED]
        self._held.hold_back([each for hook in fossils for each in hook.parameters()])

    def _remove(self, slot: Slot, reason: str, severity: Severity) -> None:
        """Not now, but when all ranks do."""
        self._doomed[slot] = reason

    def _share_root(self, paths: list[str]) -> None:
        """Take the leader's number for parameters; and see that all have the same slots."""
        group, context = self._agreement.group, self._context
        slots = crc32("\0".join(paths).encode()).to_bytes(4, "little")
        root = (context.rng_root & (2**64 - 1)).to_bytes(8, "little")
        sent = slots + bytes(255 - each for each in slots)
        sent += root if group.leads else bytes(8)
        try:
            heard = group.send(sent).wait()
        except ProcessGroupError as error:
            raise GardenError(f"not all ranks have planted a garden: {error}") from None
        if heard[:8] != sent[:8]:
            raise GardenError(
                f"slots {', '.join(paths)}: expected the same on all ranks, in the same order"
            )
        context.rng_root = int.from_bytes(heard[8:], "little")

    def _hear(self, slot: Slot, raised: bytes) -> None:
        fetch, seed = slot.kernel_fetch, slot.seed
        if raised[_FETCHES] and isinstance(fetch, _AgreedFetch) and not raised[_WAITS]:
            fetch.agree(failed=bool(raised[_FAILED]), late=bool(raised[_LATE]))
        if raised[_DOOMED]:
            reason = self._doomed.pop(slot, ELSEWHERE)
            if slot.stage in GROWING:
                slot.cull(reason, Severity.HIGH)
        elif raised[_TROUBLED] and seed is not None and not seed.trouble:
            seed.trouble = ELSEWHERE
        (self._fallow.add if raised[_FALLOW] else self._fallow.discard)(slot)

    def _flags_of(self, slot: Slot) -> bytes:
        raised = bytearray(_FLAGS)
        fetch, seed = slot.kernel_fetch, slot.seed
        if isinstance(fetch, _AgreedFetch) and not fetch.done():
            raised[_FETCHES] = 1
            raised[_WAITS] = not fetch.here.done()
            if fetch.here.done() and fetch.here.module is None:
                raised[_LATE if fetch.here.late else _FAILED] = 1
        raised[_DOOMED] = slot in self._doomed
        if seed is not None:
            raised[_TROUBLED] = bool(seed.trouble) or seed.faults_in_a_row >= IN_A_ROW
        raised[_FALLOW] = slot.stage not in (Stage.DORMANT, *GROWING)
        return bytes(raised)

    def _planned(self, command: SeedCommand) -> PlannedOperation | None:
        """``command`` as an operation of this garden; None when its slot must not be used."""
        slot = self._slots.get(command.slot)
        if slot is None:
            return None
        proposal, candidate = command.proposal, None
        if proposal.operation is SeedOperation.GERMINATE:
            if slot in self._fallow:
                return None
            candidate = Candidate(slot, command.blueprint, proposal.seed_id)
        return PlannedOperation(proposal, command.slot, candidate, command.reason)


class HeldGradients:
    """Gradients of fossils, kept out of the model until all ranks have averaged them.

    A fossil is a submodule of the model, so ``clip_grad_norm_(model.parameters())`` would meet
    gradients that are not alike on all ranks, and scale the host's by another factor on each.
    """

    def __init__(self) -> None:
        self._held: dict[nn.Parameter, Tensor] = {}
        self._handles: dict[nn.Parameter, Any] = {}

    def hold_back(self, parameters: Collection[nn.Parameter]) -> None:
        """Hold the gradients of ``parameters`` from now on, and of no others."""
        for parameter in [each for each in self._handles if _not_among(each, parameters)]:
            self._handles.pop(parameter).remove()
            self._held.pop(parameter, None)
        for parameter in parameters:
            if parameter not in self._handles and parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._handles[parameter] = register(self._hold)

    def give_back(self) -> None:
        """Let each parameter have what was held of it."""
        for parameter, gradient in self._held.items():
            parameter.grad = gradient
        self._held.clear()

    def _hold(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        held = self._held.get(parameter)  # type: ignore[call-overload]
        if gradient is not None:
            self._held[parameter] = gradient if held is None else held + gradient  # type: ignore[index]


def _not_among(parameter: nn.Parameter, parameters: Iterable[nn.Parameter]) -> bool:
    return all(parameter is not each for each in parameters)


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
        self.set_result(here.module if whole else None, reason, here.latency_ms)


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
