"""Rendezvous: how ranks find each other without configuration and without delaying a step.

Whether all ranks train at all, and together, is not known beforehand: one may only
evaluate, or each may train a model of its own. So a thread waits for the others, while the
training thread goes on and applies nothing. When all are there they exchange the steps
they are at and name one ahead of all, from the end of which on an :class:`Agreement`
holds on every rank. A second exchange tells whether any was past that step by then; as its
outcome is the same for all, they begin together or not at all.

Ranks train together when something of the user's own (the reducer of DDP, a gather of
FSDP, a reduction by hand) makes them wait for one another between two steps. Others are
not brought to wait by an agreement: then there is none.
"""

from __future__ import annotations

import logging
import time
from threading import Event, Thread
from typing import Any

import torch.distributed as dist

from esper_otel.finalization import FinalizingError, no_shutdown_inside
from esper_otel.leyline.decisions import NOT_AGREED, Decision, unanswered
from esper_otel.ranks.agreement import Agreement
from esper_otel.ranks.process_group import ProcessGroup, ProcessGroupError, join, store_of

log = logging.getLogger("esper_otel")

AHEAD_STEPS = (2, 16, 128, 1024)
"""How far ahead they begin; further when steps are too short to have said so in time."""

APART_STEPS = 256
"""Ranks that are further apart do not take the same steps, or count them otherwise."""

POLL_S = 0.05
"""How often the others are looked for."""

_met = 0
"""Rendezvous of this process so far; the ranks of a run begin them in the same order."""


class RefusedError(RuntimeError):
    """All ranks are there and found that they should not agree; says why."""


class _StartStep:
    """A step to begin at, and whether all do."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.told = Event()
        self.holds = False


class Rendezvous:
    """Settles decisions as an :class:`Agreement` does, once it has come to one.

    Made on every rank at the end of its first step. ``alike`` is a number that must be the
    same on all, of what decides how decisions are applied; ``timeout_s`` bounds every wait.
    """

    def __init__(self, run: str, *, alike: int, timeout_s: float) -> None:
        global _met
        _met += 1
        self._name = f"meeting/{_met}"
        self.unsound = False
        self._run = run
        self._alike = alike
        self._timeout_s = timeout_s
        self._agreement: Agreement | None = None
        self._thread: Thread | None = None
        self._collectives: int | None = -1
        self._together = False
        self._step = 0
        self._start_step: _StartStep | None = None
        self._group: ProcessGroup | None = None
        self._left = Event()

    @property
    def any_unsound(self) -> bool:
        """As of :class:`Agreement`; before the ranks have met nobody knows of the others."""
        return self._agreement is None or self._agreement.any_unsound

    def submit_answer(self, decision: Decision) -> None:
        """As :meth:`Agreement.submit_answer`; before the ranks have met it goes nowhere."""
        if self._agreement is not None:
            self._agreement.submit_answer(decision)

    def settle(self, step: int) -> Decision:
        """As :meth:`Agreement.settle`; ``not_agreed`` until the ranks have met.

        The training thread waits here at most for the outcome of an exchange that all have
        begun, at the one step where all begin.
        """
        if self._agreement is not None:
            self._agreement.unsound = self.unsound
            return self._agreement.settle(step)
        self._step = step
        if self._thread is None:
            self._look_for_collectives()
        start_step = self._start_step
        if start_step is not None and start_step.step == step:
            start_step.told.wait(self._timeout_s)
            if start_step.holds and self._group is not None and not self._left.is_set():
                self._agreement = Agreement(self._group, self._run)
                return self._agreement.settle(step)
        return unanswered(self._run, step, NOT_AGREED)

    @property
    def leads(self) -> bool:
        """Whether this rank asks for all."""
        return dist.get_rank() == 0

    def end(self) -> Agreement | None:
        """Look for the others no more; returns the agreement, if there is one by now."""
        self._left.set()
        if self._agreement is None and self._thread is not None:
            self._thread.join(2 * POLL_S)
            if self._group is not None:
                self._group.leave()
        return self._agreement

    def _look_for_collectives(self) -> None:
        """Whether there was one between two steps; then the others are looked for."""
        before, self._collectives = self._collectives, _collectives()
        if before == -1:
            return
        self._together = None not in (before, self._collectives) and (
            before != self._collectives
        )
        self._thread = Thread(target=self._meet, name="esper-meet", daemon=True)
        self._thread.start()

    # What happens on the thread.

    def _meet(self) -> None:
        try:
            if not _wait_for_all(self._name, self._timeout_s, self._left):
                return
            with no_shutdown_inside():
                self._meet_all()
        except RefusedError as error:
            if self.leads:
                self._tell(error)
        except FinalizingError:
            return
        except Exception as error:
            if not self._left.is_set():
                self._tell(error)
        finally:
            if self._start_step is not None:
                self._start_step.told.set()

    def _meet_all(self) -> None:
        group = join(self._timeout_s, self._name)
        try:
            if not any(self._begin(group, ahead) for ahead in AHEAD_STEPS):
                raise RefusedError("their steps are too short to name one to begin at")
        except Exception:
            group.leave()
            raise

    def _begin(self, group: ProcessGroup, ahead: int) -> bool:
        """One try; the same outcome on all ranks."""
        (first, last), (least, greatest), (together, _) = group.extremes(
            self._step, self._alike, int(self._together)
        )
        if not together:
            raise RefusedError("one of them has taken a step without waiting for another")
        if least != greatest:
            raise RefusedError("their settings for decisions differ")
        if last - first > APART_STEPS:
            raise RefusedError(f"they are {last - first} steps apart")
        # Seen by the training thread before its step is looked at here: so either it gets
        # to that step later, or it is known to be past it.
        self._start_step = start_step = _StartStep(last + ahead)
        late = self._step >= start_step.step
        ((_, any_late),) = group.extremes(int(late))
        if not any_late:
            self._group = group
            start_step.holds = True
        start_step.told.set()
        return start_step.holds

    def _tell(self, error: Exception) -> None:
        log.warning(
            "the ranks of this run do not synchronise decisions (%s): no decision is applied; "
            "with ESPER_RANKS_AGREE=false each rank requests and applies its own",
            (str(error).splitlines() or [repr(error)])[0],
        )


def _wait_for_all(name: str, timeout_s: float, left: Event) -> bool:
    """Until all ranks have called this; False when the run of one is over before.

    Raises :class:`ProcessGroupError` when they have not in time.
    By looking into the store again and again: waiting in it would keep the user's own
    calls from it, and the interpreter from ending.
    """
    with no_shutdown_inside():
        store, size = store_of(name), dist.get_world_size()
        store.add("here", 1)
    deadline = time.monotonic() + timeout_s
    while True:
        with no_shutdown_inside():
            here = store.add("here", 0)
        if here >= size:
            word = "met"
        elif left.is_set():
            word = "left"
        elif time.monotonic() > deadline:
            word = "late"
        else:
            left.wait(POLL_S)
            continue
        with no_shutdown_inside():
            # That of whoever is first holds for all.
            outcome = store.compare_set("outcome", "", word)
        if outcome == b"late":
            raise ProcessGroupError(
                f"not all {size} have begun to train within {timeout_s:g} s"
            )
        return bool(outcome == b"met")


def _collectives() -> int | None:
    """How many of the user's own this rank has begun, None where torch does not tell."""
    try:
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(int(group._get_sequence_number_for_group()) for group in groups)
    except Exception:
        return None
