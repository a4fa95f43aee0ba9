"""The engine: step frames in, one decision per step out.

It does no I/O and reads no clock, so a replayed stream gives the same decisions. A frame
may come twice, in an ask and in the stream; whichever copy is first is judged. Findings
follow from frames alone; what is proposed only changes how findings become a decision.
That is why a sidecar that hears asks and one that reads the stream agree.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

from esper_otel.leyline.decisions import (
    CONSERVATIVE_MODE,
    FORCE,
    NOMINAL,
    PROTOCOL_ERROR,
    Action,
    Decision,
    Proposal,
    Severity,
    unanswered,
)
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.leyline.wire import Ask
from esper_tamiyo.guards import plan
from esper_tamiyo.rules import compiled, watched
from esper_tamiyo.run_state import Fired, RunState
from esper_tamiyo.table import Table

log = logging.getLogger("tamiyo")

MAX_RUNS = 4096
"""Ranks kept in memory; beyond it the one not heard of for longest is forgotten."""

MAX_NAME = 256
"""Longest name of a run or instance, in characters, that answers can carry."""

MAX_RETIRED = 1024
"""Instances remembered as replaced, so that their late frames do not bring them back."""

REPORTED_RUNS = 16


class Engine:
    """Judges frames of many runs by one table.

    Memory is bounded: :data:`MAX_RUNS` ranks, each with one window per baseline the
    table uses and :data:`~esper_tamiyo.run_state.MAX_SEEDS` seeds.
    """

    def __init__(self, table: Table, max_runs: int = MAX_RUNS) -> None:
        self.table = table
        self._max_runs = max_runs
        self._rules = compiled(table)
        self._step_watch = watched(table, "step")
        self._seed_watch = watched(table, "seed")
        self._guard_plan = plan(table)
        self._judges_seeds = any(rule.about_seeds for rule in table.rules)
        self._runs: OrderedDict[tuple[str, int], RunState] = OrderedDict()
        self._retired: OrderedDict[tuple[str, int, str], None] = OrderedDict()
        self._counts = {
            "judged": 0,
            "duplicate": 0,
            "late": 0,
            "superseded": 0,
            "bad": 0,
            "runs_forgotten": 0,
        }

    def observe(self, frame: StepFrame, proposal: Proposal | None = None) -> Decision:
        """Judge ``frame`` unless it was seen before, and decide. Never raises.

        A frame that cannot be judged, or that a newer process of the same run and rank
        has replaced, is counted and gets the CONTINUE that says nobody judged.
        """
        try:
            return self._observe(frame, proposal)
        except Exception:
            self._failed(frame)
            return unanswered(frame.run, frame.step, PROTOCOL_ERROR)

    def glance(self, key: tuple[str, int], instance: str, ask: Ask) -> Decision | None:
        """The decision :meth:`observe` is going to give, when that can be told at once.

        ``ask.values`` must be in registry order. None when a rule might fire, or when
        anything else is out of the ordinary. Changes no state: once the answer is on its
        way the frame has to be given to :meth:`settle`, which takes ``observe``'s place.
        """
        state = self._runs.get(key)
        step = ask.step
        if (
            state is None
            or state.conservative
            or state.instance != instance
            or step <= state.newest
            or len(ask.values) != len(STEP_KEYS)
            or (ask.seeds and self._judges_seeds)
        ):
            return None
        ask.values[STEP_SLOT["step"]] = step  # two places say it, and frames follow this one
        if state.guards.crossed(ask.values):
            return None
        return self._decision(state, key, step, ask.proposal, step, [])

    def settle(self, frame: StepFrame, glanced: Decision) -> None:
        """Remember a frame that :meth:`glance` has decided about. Never raises."""
        try:
            key = (frame.run, frame.rank)
            state = self._runs[key]
            self._runs.move_to_end(key)
            self._counts["judged"] += 1
            state.decision = glanced
            state.pass_over(frame, self._rules, self.table.clean_steps)
        except Exception:
            self._failed(frame)

    def note_bad_frame(self) -> None:
        """Count a frame that could not even be read."""
        self._counts["bad"] += 1

    def _failed(self, frame: StepFrame) -> None:
        self.note_bad_frame()
        log.exception("could not judge step %s of run %.80r", frame.step, frame.run)

    def latest(self, run: str = "", rank: int = 0) -> Decision | None:
        """The newest decision of that rank; an empty ``run`` means the run heard of last."""
        if not run and self._runs:
            run = next(reversed(self._runs))[0]
        state = self._runs.get((run, rank))
        return state.decision if state else None

    def report(self) -> dict[str, Any]:
        """What it has seen, as plain data: counts, and the ranks heard of last."""
        runs: list[dict[str, Any]] = []
        for (run, rank), state in reversed(self._runs.items()):
            if len(runs) == REPORTED_RUNS:
                break
            runs.append(
                {
                    "run": run,
                    "rank": rank,
                    "instance": state.instance,
                    "newest_step": state.newest,
                    "time_unix_nano": state.time_unix_nano,
                    "action": state.decision.action.value if state.decision else None,
                    "reason": state.decision.reason if state.decision else None,
                    "conservative": state.conservative,
                }
            )
        return {"frames": dict(self._counts), "ranks": len(self._runs), "runs": runs}

    def _observe(self, frame: StepFrame, proposal: Proposal | None) -> Decision:
        key = (frame.run, frame.rank)
        state = self._runs.get(key)
        if state is None or (frame.instance and state.instance != frame.instance):
            admitted = self._admit(key, frame.instance, state)
            if admitted is None:
                return unanswered(frame.run, frame.step, PROTOCOL_ERROR)
            state = admitted
        else:
            self._runs.move_to_end(key)
        is_new = frame.step > state.newest
        if is_new:
            self._counts["judged"] += 1
            state.judge(frame, self._rules, self.table.clean_steps)
        else:
            self._counts["duplicate" if state.was_seen(frame.step) else "late"] += 1
        decision = self._decision(state, key, frame.step, proposal, state.newest, state.fired)
        # The stream's copy of a step that was asked about must not hide what was answered.
        if is_new or (proposal is not None and frame.step == state.newest):
            state.decision = decision
        return decision

    def _admit(
        self, key: tuple[str, int], instance: str, before: RunState | None
    ) -> RunState | None:
        """A fresh state for a new rank or a restarted one; None when it has no place.

        A producer that names no instance shares the state of whoever does.
        """
        run, rank = key
        if len(run) > MAX_NAME or len(instance) > MAX_NAME:
            self._counts["bad"] += 1
            return None
        if (run, rank, instance) in self._retired:
            self._counts["superseded"] += 1
            return None
        if before is not None and not before.instance:
            before.instance = instance
            return before
        if before is not None:
            self._retired[(run, rank, before.instance)] = None
            if len(self._retired) > MAX_RETIRED:
                self._retired.popitem(last=False)
        state = RunState(
            instance, len(self._rules), self._step_watch, self._seed_watch, self._guard_plan
        )
        self._runs[key] = state
        self._runs.move_to_end(key)
        if len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)
            self._counts["runs_forgotten"] += 1
        return state

    def _decision(
        self,
        state: RunState,
        key: tuple[str, int],
        step: int,
        proposal: Proposal | None,
        newest: int,
        fired: list[Fired],
    ) -> Decision:
        """Combine findings, the proposal and conservative mode."""
        action, severity, reason = Action.CONTINUE, Severity.NORMAL, NOMINAL
        target_seed = None
        operation = None
        parameters: dict[str, float] = {}
        findings = []
        if fired:
            counted = [
                entry for entry in fired if proposal is not None or not entry[0].rule.downgrade
            ]
            findings = [finding for _, finding in counted]
            if counted:
                winner, finding = max(counted, key=_weight)
                rule = winner.rule
                action, severity, reason = rule.action, rule.severity, rule.id
                target_seed, parameters = finding.seed_id, rule.parameters
        if proposal is not None and FORCE[action] < FORCE[Action.SEED]:
            if state.conservative:
                action, severity, reason = Action.PAUSE, Severity.WARNING, CONSERVATIVE_MODE
                target_seed = None
            else:
                action, severity, reason = Action.SEED, Severity.NORMAL, NOMINAL
                target_seed, operation = proposal.seed_id, proposal.operation
        run, rank = key
        return Decision(
            f"{run}/{rank}/{step}",
            run,
            step,
            newest,
            action,
            severity,
            reason,
            findings,
            target_seed,
            operation,
            parameters,
            state.conservative,
            self.table.version,
        )


def _weight(fired: Fired) -> tuple[int, int]:
    return fired[0].weight
