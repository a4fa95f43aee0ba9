"""Planning: which operation a garden does next, for its user or by a proposal of its own.

What a user asks for waits in a :class:`RequestQueue`. Of its own accord a garden proposes
one operation at a time, which :func:`choose` finds from what there is to see of each seed,
:class:`Placement` from where another could germinate. It stays the same from step to step
until it was done or its reason is gone, and :class:`PendingProposal` keeps it until it is
decided about. :class:`Planner` has all three.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from esper_otel.kasmina.blueprints import Blueprint, UnknownBlueprintError, lookup
from esper_otel.kasmina.context import GardenContext
from esper_otel.kasmina.lifecycle import TARGET, GardenError, SeedView
from esper_otel.kasmina.slot import Slot
from esper_otel.kasmina.state import RequestState
from esper_otel.leyline import events
from esper_otel.leyline.decisions import Proposal, SeedOperation, Severity
from esper_otel.leyline.events import NO_OPERATION, Attribute
from esper_otel.leyline.stages import TRANSITIONS, Stage, check_transition

CHANGES_THE_NETWORK = frozenset(
    {SeedOperation.GERMINATE, SeedOperation.CULL, SeedOperation.FOSSILIZE}
)
"""Operations after which a plateau has to show anew."""


class Request(NamedTuple):
    """What a user asked for: to germinate ``seed_id`` of ``blueprint``, or to cull it."""

    operation: SeedOperation
    slot: Slot
    seed_id: str
    blueprint: str = ""


class RequestQueue:
    """Requests that wait, in the order in which they came. Any thread may add one."""

    def __init__(self, slots: Collection[Slot]) -> None:
        self._slots = slots
        self._waiting: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Let ``request`` wait for the end of a step in which it can be done."""
        self._waiting.append(request)

    def clear(self) -> None:
        """Drop all of them."""
        self._waiting.clear()

    @property
    def slots(self) -> list[Slot]:
        """The slots they are about."""
        return [request.slot for request in list(self._waiting)]

    def seed_for(self, slot: Slot) -> str | None:
        """Id of the seed that somebody wants in that slot, or out of it."""
        return next((each.seed_id for each in list(self._waiting) if each.slot is slot), None)

    def wants_culled(self, seed_id: str) -> bool:
        """Whether somebody wants that seed culled."""
        return any(
            each.operation is SeedOperation.CULL and each.seed_id == seed_id
            for each in list(self._waiting)
        )

    def carry_out(
        self, is_frozen: Callable[[Slot], bool], germinated: Callable[[], None]
    ) -> None:
        """Do those whose time has come; the others wait on.

        ``germinated`` is called after each new seed. Kernels are fetched one at a time, so
        as not to take the run's processors.
        """
        for _ in range(len(self._waiting)):
            request = self._waiting.popleft()
            slot = request.slot
            germinates = request.operation is SeedOperation.GERMINATE
            if is_frozen(slot) or (germinates and not self._can_germinate(slot)):
                self._waiting.append(request)
                continue
            try:
                if germinates:
                    slot.germinate(request.seed_id, request.blueprint)
                    germinated()
                elif slot.seed is not None and slot.seed.id == request.seed_id:
                    slot.cull("as asked", Severity.NORMAL)
            except Exception as error:
                slot.report_fault(request.operation.value, error)

    @property
    def states(self) -> list[RequestState]:
        """All of them, for :func:`parse_requests`."""
        return [
            RequestState(
                operation=each.operation.value,
                slot=each.slot.name,
                seed_id=each.seed_id,
                blueprint=each.blueprint,
            )
            for each in list(self._waiting)
        ]

    def _can_germinate(self, slot: Slot) -> bool:
        fetching = any(other.kernel_fetch is not None for other in self._slots)
        return slot.hook.activation is not None and not fetching


def parse_requests(
    states: Iterable[RequestState], slot_at: Callable[[str], Slot]
) -> list[Request]:
    """The requests of a state; raises :class:`GardenError` for one that cannot be."""
    requests = []
    for each in states:
        blueprint = _blueprint_of(each)  # first: it says what is wrong with an operation
        operation, slot = SeedOperation(each.operation), slot_at(each.slot)
        requests.append(Request(operation, slot, each.seed_id, blueprint))
    return requests


def _blueprint_of(request: RequestState) -> str:
    """The blueprint a request is about, empty for a cull; :class:`GardenError` for neither."""
    if request.operation == SeedOperation.CULL:
        return ""
    if request.operation != SeedOperation.GERMINATE:
        raise GardenError(f"state: request {request.operation!r}: expected germinate or cull")
    try:
        return lookup(request.blueprint).name
    except UnknownBlueprintError as error:
        raise GardenError(f"state: request for slot {request.slot!r}: {error}") from None


class Candidate(NamedTuple):
    """A seed that could germinate: where, of which blueprint, under which id."""

    slot: Slot
    blueprint: str
    seed_id: str


class Placement:
    """Chooses among ``slots`` and ``blueprints``, and hands out ids that are used once."""

    def __init__(self, slots: Collection[Slot], blueprints: Iterable[Blueprint]) -> None:
        self.used_ids: set[str] = set()
        """Those of all seeds so far: two of one id would be one series to a backend."""
        self._slots = slots
        self._blueprints = list(blueprints)

    def find(self, excluded: Collection[Slot]) -> Candidate | None:
        """One for the empty slot with the fewest seeds so far that a blueprint fits.

        Not one of those ``excluded``. Blueprints that fit come in turn. Asked again before
        anything germinates it says the same again.
        """
        best: Candidate | None = None
        for slot in self._slots:
            if slot.stage is not Stage.DORMANT or slot in excluded:
                continue
            blueprint = self._blueprint(slot)
            fewest = best is None or slot.germinated < best.slot.germinated
            if blueprint is not None and fewest:
                best = Candidate(slot, blueprint, self.fresh_id(slot))
        return best

    def fresh_id(self, slot: Slot) -> str:
        """The slot's name and the number of its next seed."""
        number = slot.germinated + 1
        while (seed_id := f"{slot.name}-{number}") in self.used_ids:
            number += 1
        return seed_id

    def _blueprint(self, slot: Slot) -> str | None:
        activation = slot.hook.activation
        if activation is None:
            return None
        fitting = [each.name for each in self._blueprints if not each.misfit(activation.shape)]
        return fitting[slot.germinated % len(fitting)] if fitting else None


def choose(seeds: Iterable[SeedView], germination: str | None) -> Proposal | None:
    """The operation to propose, None when there is none.

    What can be culled comes first, then seeds that may go on, the oldest (first) before
    the others; ``germination`` is the id of a seed that could germinate, the last choice.
    Frozen seeds come behind all others: they need a SEED decision to go on, and must not
    keep those that are free from being proposed.
    """
    best: Proposal | None = None
    best_rank = inf
    for seed in seeds:
        if seed.cull_reason:
            operation, rank = SeedOperation.CULL, 0
        elif seed.is_ready and seed.next_operation is not None:
            operation, rank = seed.next_operation, 1
        else:
            continue
        rank += 3 * seed.is_frozen
        if rank < best_rank:
            best, best_rank = Proposal(seed.seed_id, operation), rank
    if germination is not None and best_rank > 2:
        return Proposal(germination, SeedOperation.GERMINATE)
    return best


class PlannedOperation(NamedTuple):
    """A proposal, the path of its slot, and, to germinate, the candidate, or why to cull."""

    proposal: Proposal
    slot: str
    candidate: Candidate | None = None
    reason: str = ""


class PendingProposal:
    """The operation proposed in the newest step, and the one whose decision is awaited.

    A proposal is sent with the request about its step; the decision comes at the end of the
    next. Until then it is awaited, and nothing else is proposed.
    """

    __slots__ = ("_awaited", "_context", "_new", "_reported", "_sent_at")

    def __init__(self, context: GardenContext) -> None:
        self._context = context
        self._new: PlannedOperation | None = None
        self._awaited: PlannedOperation | None = None
        self._sent_at = 0
        self._reported: Proposal | None = None

    @property
    def is_awaited(self) -> bool:
        """Whether a decision about one is awaited."""
        return self._awaited is not None

    def set(self, planned: PlannedOperation | None) -> None:
        """Propose ``planned`` in this step; None: propose nothing."""
        self._new = planned

    def withdraw(self) -> PlannedOperation | None:
        """Propose nothing in this step after all; returns what was to be proposed."""
        planned, self._new = self._new, None
        return planned

    def clear(self) -> None:
        """Forget what is proposed and what is awaited."""
        self._new = self._awaited = None

    def pop(self, step: int | None) -> PlannedOperation | None:
        """What was sent with the request about ``step``; it is used up by that.

        None for ``step``: whichever is awaited. One older than ``step`` is dropped, as
        nobody will decide about it any more.
        """
        planned = self._awaited
        if planned is None or (step is not None and step < self._sent_at):
            return None
        self._awaited = None
        return planned if step is None or step == self._sent_at else None

    def mark_sent(self, step: int) -> None:
        """What is proposed in this step, if anything, was sent with the request about it."""
        planned, self._new = self._new, None
        if self._awaited is not None:
            return
        self._awaited, self._sent_at = planned, step
        self.announce(planned, step)

    def announce(self, planned: PlannedOperation | None, step: int) -> None:
        """Report what was proposed in ``step``, if it is something else than before."""
        proposal = None if planned is None else planned.proposal
        if proposal == self._reported:
            return
        before, self._reported = self._reported, proposal
        if planned is None or proposal is None:
            gone = f"{before.operation.value} of {before.seed_id}" if before else "all"
            text = f"nothing is proposed any more: {gone}"
            self._add(text, step=step, operation=NO_OPERATION)
            return
        attributes: dict[str, Attribute] = {"seed_id": proposal.seed_id, "slot": planned.slot}
        if planned.candidate is not None:
            attributes["blueprint"] = planned.candidate.blueprint
        operation = proposal.operation.value
        text = f"proposed: {operation} {proposal.seed_id}"
        self._add(text, step=step, operation=operation, **attributes)

    def _add(self, text: str, **attributes: Attribute) -> None:
        self._context.add_event(events.PROPOSED, Severity.NORMAL, text, **attributes)


class Planner:
    """The requests, the proposals and the seed ids of a garden with these ``slots``."""

    def __init__(
        self,
        slots: Mapping[str, Slot],
        blueprints: Iterable[Blueprint],
        context: GardenContext,
    ) -> None:
        self.requests = RequestQueue(slots.values())
        self.placement = Placement(slots.values(), blueprints)
        self.pending = PendingProposal(context)
        self._slots, self._context = slots, context

    def slot_of(self, seed_id: str) -> Slot | None:
        """The slot that has that seed."""
        for slot in self._slots.values():
            if slot.seed is not None and slot.seed.id == seed_id:
                return slot
        return None

    def request_germination(self, slot: Slot, blueprint: str, seed_id: str | None) -> str:
        """See :meth:`~esper_otel.kasmina.garden.Garden.germinate`."""
        lookup(blueprint)
        held = self.requests.seed_for(slot) if slot.seed is None else slot.seed.id
        if held is not None:
            raise GardenError(
                f"slot {slot.name!r}: expected an empty one, it has seed {held!r}"
            )
        check_transition(slot.stage, Stage.GERMINATED)
        if seed_id is None:
            seed_id = self.placement.fresh_id(slot)
        elif not seed_id or seed_id in self.placement.used_ids:
            raise GardenError(f"seed_id={seed_id!r}: expected one that was not used before")
        self.placement.used_ids.add(seed_id)
        self.requests.add(Request(SeedOperation.GERMINATE, slot, seed_id, blueprint))
        return seed_id

    def request_cull(self, seed_id: str) -> None:
        """See :meth:`~esper_otel.kasmina.garden.Garden.cull`."""
        slot = self.slot_of(seed_id)
        if slot is None:
            here = ", ".join(slot.seed.id for slot in self._slots.values() if slot.seed)
            raise GardenError(f"seed_id={seed_id!r}: expected one of {here}")
        check_transition(slot.stage, Stage.CULLED)
        self.requests.add(Request(SeedOperation.CULL, slot, seed_id))

    def propose(self, seeds: Sequence[SeedView]) -> Proposal | None:
        """Choose what to propose in this step, of all growing ``seeds`` and a new one."""
        candidate = self._candidate(len(seeds))
        # What waits for the end of a pause to be culled must not become something else first.
        staying = [seed for seed in seeds if not self.requests.wants_culled(seed.seed_id)]
        if self.pending.is_awaited:
            return None
        proposal = choose(staying, candidate.seed_id if candidate else None)
        if proposal is not None:
            self.pending.set(self._planned(proposal, candidate))
        return proposal

    def is_feasible(self, planned: PlannedOperation) -> bool:
        """Whether what was proposed a step ago still fits the state of its slot."""
        proposal, slot = planned.proposal, self._slots[planned.slot]
        if TARGET[proposal.operation] not in TRANSITIONS[slot.stage]:
            return False
        if planned.candidate is not None:
            used = proposal.seed_id in self.placement.used_ids
            return not (slot in self.requests.slots or used)
        return slot.seed is not None and slot.seed.id == proposal.seed_id

    def carry_out(self, planned: PlannedOperation) -> None:
        """Do what was proposed; raises whatever its slot raises."""
        proposal, candidate = planned.proposal, planned.candidate
        slot = self._slots[planned.slot]
        if candidate is not None:
            self.placement.used_ids.add(candidate.seed_id)
            slot.germinate(candidate.seed_id, candidate.blueprint)
        elif proposal.operation is SeedOperation.CULL:
            slot.cull(planned.reason)
        else:
            slot.advance(proposal.operation)
        if proposal.operation in CHANGES_THE_NETWORK:
            self._context.plateau.restart()

    def _candidate(self, growing: int) -> Candidate | None:
        """The seed that would germinate now, None when it is not the time."""
        context = self._context
        if not context.plateau.reached or growing >= context.settings.seeds_at_once:
            return None
        return self.placement.find(self.requests.slots)

    def _planned(
        self, proposal: Proposal, candidate: Candidate | None
    ) -> PlannedOperation | None:
        if proposal.operation is SeedOperation.GERMINATE and candidate is not None:
            return PlannedOperation(proposal, candidate.slot.name, candidate)
        slot = self.slot_of(proposal.seed_id)
        if slot is None:
            return None
        return PlannedOperation(proposal, slot.name, reason=slot.cull_reason)
