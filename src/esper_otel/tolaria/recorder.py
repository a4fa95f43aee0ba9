"""Turns what happens in a training loop into one frame per optimizer step.

The recorder is told of events (a batch came, backward began, the optimizer stepped) and
knows nothing of torch; who tells it is an integration or the explicit API. All its
methods run on the training thread, so they are short, allocate little, wait for nothing
but the decision, and never raise.

Time is tiled: every mark ends one phase and begins the next, so that the phases of a
step and the hook that ended the one before add up to the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from math import nan
from time import perf_counter_ns
from typing import Any

from esper_otel.leyline.decisions import NOT_ASKED, Action, Decision, unanswered
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import GardenFrame, StepTimeline
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.tolaria.clock import Clock
from esper_otel.tolaria.dynamics import WEIGHT
from esper_otel.tolaria.fetches import UNNAMED, Fetches, Source
from esper_otel.tolaria.memory import recalled
from esper_otel.tolaria.ports import Asks, Frames, Garden, Settles
from esper_otel.tolaria.responses import Optimizer, Responses
from esper_otel.tolaria.seal import (
    Reading,
    Sealer,
    Unless,
    Unsealed,
    Value,
    plus,
    put_optimizer,
)
from esper_otel.tolaria.tending import Tending, put_garden

log = logging.getLogger("esper_otel")

MAX_PHASES = 4096
"""Phases of one step that are remembered for its spans. Its times count all there were."""

_EMPTY_ROW = [nan] * len(STEP_KEYS)
_NO_LOSS: tuple[Value | None, int] = None, 0

# Slots as plain integers: a dictionary look-up each would be a tenth of the step's cost.
_STEP = STEP_SLOT["step"]
_SAMPLES_PER_S = STEP_SLOT["samples_per_s"]
_HOOK = STEP_SLOT["hook_latency_ms"]
_TAMIYO = STEP_SLOT["tamiyo_latency_ms"]
_GRADIENT_NORM = STEP_SLOT["gradient_norm"]
_CONFLICT_RATE = STEP_SLOT["grad_conflict_rate"]
_STEP_LATENCY = STEP_SLOT["step_latency_ms"]
_FORWARD = STEP_SLOT["forward_ms"]
_BACKWARD = STEP_SLOT["backward_ms"]
_OPTIMIZER = STEP_SLOT["optimizer_ms"]
_APPLY = STEP_SLOT["kasmina.apply_ms"]
_FINALIZE = STEP_SLOT["kasmina.finalize_ms"]
_INPUT_WAIT = STEP_SLOT["input_wait_ms"]
_H2D = STEP_SLOT["h2d_copy_ms"]
_NONFINITE = STEP_SLOT["nonfinite"]

Seeds = Sequence[tuple[str, list[float]]]
"""Seed ids and their rows."""

REPORTABLE = {
    key: STEP_SLOT[key]
    for key in ("accuracy", "grad_conflict_rate", "gradient_norm", "samples_per_s")
}
"""Keys that a loop may report itself, besides its loss, and their slots."""


class Recorder:
    """Follows one training loop; see the module for the manner.

    ``optimizer`` (settable) is whose learning rate is read and, in ``enforce``, scaled.
    ``device_values`` returns the newest device probes by key. ``client`` None means
    that nobody is asked.
    """

    # Of the step under way; all made anew by _begin_step. Marks are of perf_counter_ns.
    _mark: int
    _begun: int
    _wait_ns: int
    _forward_ns: int
    _backward_ns: int
    _prepare_ns: int
    _optimizer_ns: int
    _optimizing: bool
    _losses_before: int
    _outside_ns: int
    _span_start: int
    _samples: int
    _norm: Value | None
    _loss: Value | None
    _losses: int
    _loss_of_another: tuple[Value | None, int]
    _shares: bool
    _reported_loss: Value | None
    _reported_losses: int
    _reported: dict[int, Value]
    _phases: list[tuple[str, int, int]]

    def __init__(
        self,
        frames: Frames,
        *,
        run: str,
        responses: Responses,
        client: Asks | None = None,
        enriched: bool = True,
        device_values: Callable[[], Mapping[str, float]] = dict,
        span_every: int = 50,
        span_slow_factor: float = 2.0,
    ) -> None:
        self.optimizer: Optimizer | None = None
        self.step = 0
        """Optimizer steps seen so far."""
        self._not_asked = unanswered(run, 0, NOT_ASKED)
        self.decision: Decision = self._not_asked
        """The newest decision."""
        self.clock = Clock()
        self._frames = frames
        self._responses = responses
        self._client = client
        self._agreement: Settles | None = None
        self._enriched = enriched
        self._device_values = device_values
        self._span_every = span_every
        self._span_slow_factor = span_slow_factor
        self._tending: Tending | None = None
        self._off = False
        self._told_of_trouble = False

        self._sealer = Sealer(enriched=enriched)
        self._all_shares = False
        self._mean_latency_ms = 0.0

        self._fetches = Fetches()
        self._latest: list[float] = _EMPTY_ROW
        self._last_end = 0
        self._hook_ms = self._tamiyo_ms = self._apply_ms = 0.0
        self._begin_step(0)

    # What the loop does, in the order in which a step does it.

    def batch_came(self, asked_for: int, samples: int, source: Source = UNNAMED) -> None:
        """The loop asked for a batch at mark ``asked_for`` and has it now.

        ``samples`` is its size, 0 when not known; ``source`` says which loader it is from,
        so that those of a validation loop are never charged to training
        (:class:`~esper_otel.tolaria.fetches.Fetches`).
        """
        now = perf_counter_ns()
        self._fetches.came(source, asked_for, now, samples, self._mark)
        self._mark = now

    def batches_ended(self, iterator: int) -> None:
        """The iterator of that number, of a :class:`Source`, has no more batches."""
        self._fetches.ended(iterator, perf_counter_ns())

    def backward_begins(self) -> None:
        """The loop calls backward: what led here since the batch came was forward."""
        now = perf_counter_ns()
        if self._fetches.waiting:
            self._charge_fetches()
        mark = self._mark or now
        if self._begun == 0:
            self._begun = mark
        self._forward_ns += now - mark
        phases = self._phases
        if len(phases) > MAX_PHASES:
            del phases[: MAX_PHASES // 2]
        phases.append(("train.forward", mark, now))
        self._mark = now

    def backward_ends(self, loss: Value | None) -> None:
        """Backward is done; ``loss`` is what it began from, None when that is no scalar.

        Of the losses that an optimizer's closure computes the first counts: it is that of
        the parameters the step began with, and what ``step()`` returns.
        """
        now = perf_counter_ns()
        self._backward_ns += now - self._mark
        self._phases.append(("train.backward", self._mark, now))
        self._mark = now
        if loss is None or (self._optimizing and self._losses > self._losses_before):
            return
        self._loss = loss if self._loss is None else plus(self._loss, loss)
        self._losses += 1

    def skipped(self) -> None:
        """The optimizer did not step (a gradient scaler saw an overflow).

        What was learnt of this attempt is forgotten, its time is that of the next step.
        """
        self._norm = self._loss = self._reported_loss = None
        self._losses = self._reported_losses = 0
        self._loss_of_another = _NO_LOSS
        self._reported = {}

    def may_be_skipped(self, skipped: Reading) -> None:
        """The optimizer has stepped if ``skipped``, which a device has still to tell, is zero.

        If it is not, the step has been counted all the same, but not what it learnt.
        """
        if self._norm is not None:
            self._norm = Unless(self._norm, skipped)
        loss, parts = self._loss_of_step
        if loss is not None:
            self._reported_loss, self._reported_losses = Unless(loss, skipped), parts

    def another_stepped(self) -> None:
        """An optimizer has stepped whose steps are not the run's (a critic's, say).

        What ``backward`` began from so far was its loss; it is the step's as well only if
        no other follows, as where one loss trains both.
        """
        if self._losses:
            self._loss_of_another = self._loss, self._losses
            self._loss, self._losses = None, 0

    @property
    def _loss_of_step(self) -> tuple[Value | None, int]:
        """The losses of the step added up, and by what their sum is to be divided."""
        if self._reported_losses:
            return self._reported_loss, self._reported_losses
        loss, losses = (self._loss, self._losses) if self._losses else self._loss_of_another
        return loss, 1 if self._shares else losses

    def clipped(self, norm: Value) -> None:
        """Gradients were clipped, and ``norm`` is what their norm was before."""
        self._norm = norm

    @property
    def wants_norm(self) -> bool:
        """Whether nobody has told this step's gradient norm yet."""
        return self._norm is None

    def optimizer_begins(self, hook_began: int, norm: Value | None) -> None:
        """The optimizer is about to step; ``norm`` was computed since ``hook_began``."""
        now = perf_counter_ns()
        if norm is not None:
            self._norm = norm
        if self._fetches.waiting:
            self._charge_fetches()
        mark = self._mark
        if self._backward_ns and hook_began > mark:  # clipping, unscaling
            self._optimizer_ns += hook_began - mark
            self._phases.append(("train.optimizer", mark, hook_began))
        self._prepare_ns += now - hook_began
        self._phases.append(("tolaria.gradient_norm", hook_began, now))
        self._optimizing = True
        self._mark = now

    def closure_begins(self) -> None:
        """The optimizer is about to step, and will call forward and backward itself."""
        self._optimizing = True
        self._losses_before = self._losses

    def optimizer_ends(self) -> int:
        """The optimizer has stepped; returns the mark of now, for :meth:`end_step`."""
        now = perf_counter_ns()
        if self._optimizing:
            self._optimizing = False
            self._optimizer_ns += now - self._mark
            self._phases.append(("train.optimizer", self._mark, now))
        self._mark = now
        return now

    def measured(self, norm: Value | None) -> int:
        """The norm was computed after :meth:`optimizer_ends`; returns the mark of now."""
        now = perf_counter_ns()
        if norm is not None:
            self._norm = norm
        self._prepare_ns += now - self._mark
        self._phases.append(("tolaria.gradient_norm", self._mark, now))
        self._mark = now
        return now

    def phase(self, name: str, began: int, ended: int) -> None:
        """One phase of an explicit loop: ``forward``, ``backward`` or ``optimizer``.

        Raises ``ValueError`` for another name.
        """
        took = ended - began
        if name == "forward":
            self._forward_ns += took
        elif name == "backward":
            self._backward_ns += took
        elif name == "optimizer":
            self._optimizer_ns += took
        else:
            raise ValueError(f"phase {name!r}: expected forward, backward or optimizer")
        if self._begun == 0:
            self._begun = began
        phases = self._phases
        if len(phases) > MAX_PHASES:
            del phases[: MAX_PHASES // 2]
        phases.append((f"train.{name}", began, ended))
        self._mark = ended

    def report(self, loss: Value | None, values: Mapping[str, Value]) -> None:
        """What the loop knows of this step; ``values`` by key, of :data:`REPORTABLE`.

        A reported loss takes the place of those that backward began from.
        Raises ``ValueError`` for a key that cannot be reported.
        """
        for key, value in values.items():
            slot = REPORTABLE.get(key)
            if slot is None:
                raise ValueError(
                    f"report({key}=…): expected one of {', '.join(sorted(REPORTABLE))}"
                )
            if slot == _GRADIENT_NORM:
                self._norm = value
            elif self._enriched or slot != _CONFLICT_RATE:
                self._reported[slot] = value
        if loss is not None:
            self._reported_loss = plus(self._reported_loss, loss)
            self._reported_losses += 1

    def copied_to_device(self, milliseconds: Value) -> None:
        """How long the step's first host-to-device copy took."""
        if self._enriched:
            self._reported[_H2D] = milliseconds

    def end_step(self, ended: int = 0) -> None:
        """The step is done: seal its frame, stream it, ask about it, do what was decided.

        ``ended`` is the mark of its end, 0 for now.
        """
        if self._off:
            self._begin_step(0)
            return
        try:
            if self._tending is not None:
                self._let_seeds_learn(self._tending)
                ended = 0
            self._end_step(ended or perf_counter_ns())
        except Exception:
            if not self._told_of_trouble:
                self._told_of_trouble = True
                log.exception("a step could not be recorded; the run goes on")
            self._begin_step(perf_counter_ns())

    def finish(self) -> None:
        """No step follows: frames that wait for a device go with what has arrived."""
        for frame in self._sealer.finish():
            self._frames.frame(frame.time, frame.row, frame.seeds)

    def tend(self, garden: Garden | None) -> None:
        """Take ``garden`` along from the next end of a step on; None: none any more."""
        self._tending = None if garden is None else Tending(garden)

    def losses_are_shares(self, shares: bool = True) -> None:
        """From here on backward begins from shares: a step's loss is their sum, no mean.

        So it is where each micro-batch's loss is divided by their number. False: no longer.
        """
        self._all_shares = self._shares = shares

    def loss_is_a_share(self) -> None:
        """As :meth:`losses_are_shares`, for the step under way."""
        self._shares = True

    def agree(self, agreement: Settles, *, asks: bool) -> None:
        """Apply what all ranks have settled; ``asks``: whether this one asks for them."""
        self._agreement = agreement
        if not asks:
            self._client = None

    def state(self) -> dict[str, Any]:
        """What the rows of coming steps depend on: plain data, for :meth:`resume`."""
        return self._sealer.memory(self.step, self._latest).plain()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state` was called, in this process or in one before it.

        Steps are counted on from there, but never twice the same: a run that goes back to
        a checkpoint counts on from where it is. Raises ``ValueError`` for what is no such
        state, and changes nothing then.
        """
        memory = recalled(state)
        self.step = max(self.step, memory.step)
        self._latest = row = _EMPTY_ROW.copy()
        for key, value in memory.latest.items():
            if key in STEP_SLOT:
                row[STEP_SLOT[key]] = value
        self._sealer.recall(memory)

    def switch_off(self) -> None:
        """Do nothing from here on (a forked child must not report its parent's steps)."""
        self._off = True

    # The end of a step.

    def _end_step(self, ended: int) -> None:
        if self._fetches.waiting:
            self._charge_fetches()
        self.step = step = self.step + 1
        time = self.clock.step_end(ended)
        row = _EMPTY_ROW.copy()
        tending = self._tending
        growing: GardenFrame | None = None
        finalized = ended
        if tending is not None:
            growing = tending.finalize(step, self._latest)
            put_garden(row, growing)
            finalized = perf_counter_ns()
            self._phases.append(("kasmina.finalize", ended, finalized))
        row[_STEP] = step
        row[_HOOK] = self._hook_ms + self._prepare_ns / 1e6
        row[_TAMIYO] = self._tamiyo_ms
        row[_NONFINITE] = 0.0
        since = self._last_end or self._begun or ended
        latency_ms = (ended - since - self._outside_ns) / 1e6
        if self._samples and latency_ms > 0.0:
            row[_SAMPLES_PER_S] = self._samples * 1e3 / latency_ms
        if self._enriched:
            self._put_gated(row, latency_ms)
            row[_FINALIZE] = (finalized - ended) / 1e6
        loss, parts = self._loss, self._losses
        if self._reported_losses or self._shares or not parts:
            loss, parts = self._loss_of_step
        seeds = growing.seeds if growing is not None else ()
        usual_ms = self._mean_latency_ms
        slow = latency_ms > self._span_slow_factor * usual_ms > 0.0
        newest: tuple[int, int, list[float], Seeds] | None = None
        if self._sealer.seal_now(row, loss, parts, self._norm, self._reported):
            newest = (step, time, row, seeds)
            self._frames.frame(time, row, seeds)
        else:
            frame = Unsealed(step, time, row, loss, parts, self._norm, self._reported, seeds)
            for done in self._sealer.take(frame):
                newest = (done.step, done.time, done.row, done.seeds)
                self._frames.frame(done.time, done.row, done.seeds)
        if newest is not None:
            self._latest = newest[2]

        client = self._client
        sealed = perf_counter_ns()
        agreement = self._agreement
        decision = self._not_asked
        if client is not None and newest is not None:
            if growing is None:
                decision = client.ask(*newest)
            else:
                decision = client.ask(*newest, growing.proposal)
        if agreement is not None:
            decision = agreement.settle(step, decision)
        asked = applied = sealed
        acted = False
        if decision is not self._not_asked:
            asked = perf_counter_ns()
            acted = self._responses.apply(decision, self.optimizer)
            applied = perf_counter_ns()
        events: list[Event] = []
        if tending is not None:
            # A frame whose values are still on a device is asked about later, with the
            # proposal of then.
            if client is None or newest is not None:
                tending.asked(newest[0] if newest is not None else step)
            if tending.apply(decision, enforced=self._responses.enforcing):
                acted = True
            applied = perf_counter_ns()
            events = tending.events(step, self.clock.offset)
            for event in events:
                self._frames.event(event)
            if tending.over:
                self._tending = None
        self._tamiyo_ms = (asked - sealed) / 1e6
        self._apply_ms = (applied - asked) / 1e6
        self.decision = decision

        if (
            slow
            or decision.action is not Action.CONTINUE
            or decision.findings
            or events
            or (self._span_every and step % self._span_every == 0)
        ):
            told = client is not None or agreement is not None
            if told:
                self._phases.append(("tamiyo.decide", sealed, asked))
            if told or tending is not None:
                self._phases.append(("kasmina.apply", asked, applied))
            offset = self.clock.offset
            self._frames.timeline(
                StepTimeline(
                    step=step,
                    start_unix_nano=(self._span_start or since) + offset,
                    end_unix_nano=applied + offset,
                    phases=[
                        (name, began + offset, end + offset)
                        for name, began, end in self._phases
                    ],
                    row=row,
                    decision=decision if told else None,
                    applied=acted,
                    events=events,
                )
            )
        self._mean_latency_ms = (
            usual_ms + WEIGHT * (latency_ms - usual_ms) if usual_ms else latency_ms
        )
        self._last_end = ended
        hook_end = perf_counter_ns()
        self._hook_ms = (hook_end - ended) / 1e6
        self._begin_step(hook_end)

    def _let_seeds_learn(self, tending: Tending) -> None:
        """Before the step is measured: this is training, not telling of it."""
        began, ended = tending.learn(self.optimizer)
        self._optimizer_ns += ended - began
        self._phases.append(("train.seeds", began, ended))

    def _begin_step(self, hook_end: int) -> None:
        self._span_start = self._mark = hook_end
        self._begun = 0
        self._forward_ns = self._backward_ns = self._optimizer_ns = 0
        self._wait_ns = -1
        self._prepare_ns = 0
        self._samples = 0
        self._optimizing = False
        self._outside_ns = self._losses_before = 0
        self._norm = self._loss = self._reported_loss = None
        self._losses = self._reported_losses = 0
        self._loss_of_another = _NO_LOSS
        self._shares = self._all_shares
        self._reported = {}
        self._phases = []

    def _charge_fetches(self) -> None:
        before, since, outside, samples, waits = self._fetches.charge(self.step)
        phases = self._phases
        if outside:
            if before:
                self._outside_ns += since - before
            if not phases:
                self._span_start = since
        elif before and since > before:
            # What follows the end of a step is its rest: zero_grad, the scheduler, reading
            # the loss, which on a device waits for what was begun before.
            self._optimizer_ns += since - before
            phases.append(("train.optimizer", before, since))
        if not waits:
            # It was an evaluation, and what the step is trained on came on another way.
            self._mark = max(self._mark, since)
            return
        if self._begun == 0:
            self._begun = since
        if self._wait_ns < 0:
            self._wait_ns = 0
        for asked_for, came in waits:
            if asked_for > since:  # between two fetches of one step
                self._forward_ns += asked_for - since
                phases.append(("train.forward", since, asked_for))
            self._wait_ns += came - asked_for
            phases.append(("train.input_wait", asked_for, came))
            since = came
        self._samples += samples

    def _put_gated(self, row: list[float], latency_ms: float) -> None:
        if self._last_end:
            row[_STEP_LATENCY] = latency_ms
        if self._forward_ns:
            row[_FORWARD] = self._forward_ns / 1e6
        if self._backward_ns:
            row[_BACKWARD] = self._backward_ns / 1e6
        if self._optimizer_ns:
            row[_OPTIMIZER] = self._optimizer_ns / 1e6
        if self._wait_ns >= 0:
            row[_INPUT_WAIT] = self._wait_ns / 1e6
        row[_APPLY] = self._apply_ms
        if self.optimizer is not None:
            put_optimizer(row, self.optimizer.param_groups)
        for key, value in self._device_values().items():
            row[STEP_SLOT[key]] = value
