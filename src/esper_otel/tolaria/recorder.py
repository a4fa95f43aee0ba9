"""Turns what happens in a training loop into one frame per optimizer step.

The recorder is told of events (a batch came, backward began, the optimizer stepped) and
knows nothing of torch; who tells it is an integration or the explicit API. All its
methods run on the training thread, so they are short, allocate little, wait for nothing
but a decision that is late, and never raise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from math import nan
from time import perf_counter_ns
from typing import Any

from esper_otel.leyline.decisions import (
    Decision,
)
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.tolaria.asking import Asking, Taken
from esper_otel.tolaria.clock import Clock
from esper_otel.tolaria.dynamics import WEIGHT
from esper_otel.tolaria.memory import recalled
from esper_otel.tolaria.ports import Asks, Frames, Garden, Settles
from esper_otel.tolaria.responses import Responses
from esper_otel.tolaria.seal import Sealer, Unsealed, Value, put_optimizer
from esper_otel.tolaria.step import StepUnderWay
from esper_otel.tolaria.tending import Tending, put_garden
from esper_otel.tolaria.timelines import EndedStep, Timelines
from esper_otel.tolaria.update_control import UpdateControl
from esper_otel.tolaria.updates import Optimizer

log = logging.getLogger("esper_otel")

_EMPTY_ROW = [nan] * len(STEP_KEYS)

# Slots as plain integers: a dictionary look-up each would be a tenth of the step's cost.
_STEP = STEP_SLOT["step"]
_SAMPLES_PER_S = STEP_SLOT["samples_per_s"]
_HOOK = STEP_SLOT["hook_latency_ms"]
_TAMIYO = STEP_SLOT["tamiyo_latency_ms"]
_LR_SCALE = STEP_SLOT["lr_scale"]
_SKIPPED = STEP_SLOT["update_skipped"]
_UNJUDGED = STEP_SLOT["unjudged_steps"]
_STEP_LATENCY = STEP_SLOT["step_latency_ms"]
_FORWARD = STEP_SLOT["forward_ms"]
_BACKWARD = STEP_SLOT["backward_ms"]
_OPTIMIZER = STEP_SLOT["optimizer_ms"]
_APPLY = STEP_SLOT["kasmina.apply_ms"]
_FINALIZE = STEP_SLOT["kasmina.finalize_ms"]
_INPUT_WAIT = STEP_SLOT["input_wait_ms"]
_NONFINITE = STEP_SLOT["nonfinite"]


class Recorder:
    """Follows one training loop; see the module for the manner.

    ``optimizer`` (settable) is whose learning rate is recorded. ``device_values`` returns
    the newest device probes by key. ``client`` None means that nobody is asked. ``waits``:
    each answer is waited for at the end of its own step, within the deadline.
    """

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
        waits: bool = False,
    ) -> None:
        self.optimizer: Optimizer | None = None
        self.step = 0
        """Optimizer steps seen so far."""
        self.clock = Clock()
        self._frames = frames
        self._responses = responses
        self._asking = Asking(run, client)
        self.decision: Decision = self._asking.not_asked
        """The newest decision."""
        self._waits = waits
        self._enriched = enriched
        self._device_values = device_values
        self._span_every = span_every
        self._span_slow_factor = span_slow_factor
        self._tending: Tending | None = None
        self._off = False
        self._faults: set[str] = set()

        self._sealer = Sealer(enriched=enriched)
        self._timelines = Timelines(frames.timeline, self.clock.offset)
        self._mean_latency_ms = 0.0
        self._latest: list[float] = _EMPTY_ROW
        self._last_end = 0
        self._hook_ms = self._apply_ms = 0.0
        self._in_hand: Decision | None = None
        """A decision that seeds have not been told of yet."""
        self._in_hand_of: EndedStep | None = None

        step = self._under_way = StepUnderWay(enriched=enriched)
        self._control = UpdateControl(
            step,
            asking=self._asking,
            responses=responses,
            sealer=self._sealer,
            clock=self.clock,
        )
        self.updates = self._control.updates
        # What the loop does is told to the step under way, without a detour.
        self.batch_came = step.batch_came
        self.batches_ended = step.batches_ended
        self.backward_begins = step.backward_begins
        self.backward_ends = step.backward_ends
        self.skipped = step.skipped
        self.may_be_skipped = step.may_be_skipped
        self.another_stepped = step.another_stepped
        self.clipped = step.clipped
        self.measured = step.measured
        self.phase = step.phase
        self.report = step.report
        self.copied_to_device = step.copied_to_device
        self.update_skipped = step.update_skipped
        self.losses_are_shares = step.losses_are_shares
        self.loss_is_a_share = step.loss_is_a_share
        self._stages = (
            self._seeds,
            self._seal,
            self._stream,
            self._ask,
            self._apply,
            self._spans,
        )

    # Around an optimizer's step.

    @property
    def wants_norm(self) -> bool:
        """Whether nobody has told this step's gradient norm yet, and it will be recorded."""
        return self._under_way.norm is None and not self._off

    @property
    def skips_nonfinite(self) -> bool:
        """Whether an update that is not finite may be left out where nobody can ask in time."""
        guards = self._asking.guards if self._responses.enforcing else None
        return guards is not None and guards.skips_nonfinite

    def optimizer_begins(
        self, hook_began: int, norm: Value | None, optimizer: Optimizer | None = None
    ) -> None:
        """The run's optimizer is about to step; ``norm`` was computed since ``hook_began``.

        The decision about the step before is taken, and ``optimizer`` steps under it.
        """
        step = self._under_way
        step.optimizer_approaches(hook_began, norm)
        if self._asking.decides:
            self._before_update(optimizer, is_primary=True)
        step.optimizer_begins(hook_began)

    def closure_begins(self, optimizer: Optimizer | None = None) -> None:
        """As :meth:`optimizer_begins`, for a step that calls forward and backward itself.

        Nothing is known of its loss and gradients, so it is not held against guards.
        """
        self._before_update(optimizer)
        self._under_way.closure_begins()

    def other_begins(self, optimizer: Optimizer, *, collects: bool = True) -> None:
        """Another optimizer of the loop is about to step, with the same factor.

        ``collects`` False where the thread is not the one that asks.
        """
        self._before_update(optimizer, collects=collects)

    def optimizer_ends(self, optimizer: Optimizer | None = None) -> int:
        """The run's optimizer has stepped; returns the mark of now, for :meth:`end_step`."""
        now = self._under_way.optimizer_ends()
        if optimizer is not None:
            self.updates.end(optimizer)
        return now

    def collect(self) -> None:
        """Take the decision about the step before, if it has not been taken."""
        taken = self._asking.collect()
        if taken is not None and not self._off:
            self._take(taken)

    def end_step(self, ended: int = 0) -> None:
        """The step is done: seal its frame, stream it, ask about it, do what was decided.

        ``ended`` is the mark of its end, 0 for now. Each stage has a boundary of its own: what
        raises in one takes nothing from the others.
        """
        if self._off:
            self._under_way.begin(0, self.step)
            return
        asking, under_way, tending = self._asking, self._under_way, self._tending
        # Of a loop whose optimizers nobody watches; before seeds learn, as ranks do all that
        # they do together in the same order.
        leftover = asking.collect() if asking.sent else None
        if tending is not None:
            self._let_seeds_learn(tending)
            ended = 0
        ended = ended or perf_counter_ns()
        self.step = step = self.step + 1
        ending = EndedStep(
            step,
            ended,
            self._last_end,
            under_way.span_start,
            under_way.phases,
            _EMPTY_ROW.copy(),
        )
        if leftover is not None:
            ending.taken = (leftover,)
        self._last_end = ended
        for stage in self._stages:
            try:
                stage(ending)
            except Exception:
                self._report_fault(stage.__name__)
        hook_end = perf_counter_ns()
        self._control.turn()
        self._hook_ms = (hook_end - ended) / 1e6
        self._apply_ms = ending.apply_ns / 1e6
        under_way.begin(hook_end, step)

    def finish(self) -> None:
        """No step follows: take the last answer, and frames go with what has arrived."""
        try:
            taken = self._asking.collect()
            if taken is not None:
                self.decision = taken.decision
                self._timelines.decided(taken, self.step + 1)
        finally:
            self._timelines.finish()
            for frame in self._sealer.finish():
                self._frames.frame(frame.time, frame.row, frame.seeds)

    def tend(self, garden: Garden | None) -> None:
        """Take ``garden`` along from the next end of a step on; None: none any more."""
        self._tending = None if garden is None else Tending(garden)

    def ask_of(self, client: Asks | None) -> None:
        """Ask ``client`` from here on; None: nobody."""
        self._asking.ask_of(client)

    def agree(self, agreement: Settles, *, asks: bool) -> None:
        """Apply what all ranks have settled; ``asks``: whether this one asks for them."""
        self._asking.agree(agreement, asks=asks)

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
        self.updates.close()

    # Before an update.

    def _before_update(
        self, optimizer: Optimizer | None, *, is_primary: bool = False, collects: bool = True
    ) -> None:
        if self._off:
            return
        if collects and self._asking.sent:
            try:
                self.collect()
            except Exception:
                self._report_fault("collect")
        if optimizer is not None:
            try:
                self._control.begin(optimizer, self.step + 1, is_primary=is_primary)
            except Exception:
                self._report_fault("update")

    def _take(self, taken: Taken) -> None:
        """Do what ``taken`` says of the rate, and of what is paused; seeds follow later."""
        decision = self.decision = self._in_hand = taken.decision
        timeline = self._in_hand_of = self._timelines.decided(taken, self.step + 1)
        scales = self._responses.apply_rate(decision)
        if timeline is not None:
            timeline.scales = scales
        if self._responses.pause(decision) and timeline is not None:
            timeline.acted = True

    # The stages of a step's end.

    def _seeds(self, ending: EndedStep) -> None:
        """The garden hears the decision about the step before, and proposes after that."""
        if self._in_hand is not None:
            self._let_seeds_act(ending)

    def _seal(self, ending: EndedStep) -> None:
        step, asking = self._under_way, self._asking
        if step.fetches.waiting:
            step.charge_fetches()
        row, ended = ending.row, ending.ended
        tending = self._tending
        finalize_ms = 0.0
        if tending is not None:
            began = perf_counter_ns()
            ending.growing = tending.finalize(self.step, self._latest)
            put_garden(row, ending.growing)
            finalized = perf_counter_ns()
            step.phases.append(("kasmina.finalize", began, finalized))
            finalize_ms = (finalized - began) / 1e6
        row[_STEP] = self.step
        row[_HOOK] = self._hook_ms + step.prepare_ns / 1e6
        row[_TAMIYO] = asking.spent_ns / 1e6
        asking.spent_ns = 0
        row[_NONFINITE] = 0.0
        control = self._control
        scale = self._responses.lr_scale if control.scale is None else control.scale
        row[_LR_SCALE] = scale
        row[_SKIPPED] = 1.0 if control.skipped else 0.0
        if asking.decides:
            row[_UNJUDGED] = asking.unjudged
        since = ending.since = ending.since or step.begun or ended
        ending.latency_ms = latency_ms = (ended - since - step.outside_ns) / 1e6
        if step.samples and latency_ms > 0.0:
            row[_SAMPLES_PER_S] = step.samples * 1e3 / latency_ms
        if self._enriched:
            self._put_gated(row, ending, scale)
            row[_FINALIZE] = finalize_ms

    def _put_gated(self, row: list[float], ending: EndedStep, scale: float) -> None:
        step = self._under_way
        if ending.has_step_before:
            row[_STEP_LATENCY] = ending.latency_ms
        if step.forward_ns:
            row[_FORWARD] = step.forward_ns / 1e6
        if step.backward_ns:
            row[_BACKWARD] = step.backward_ns / 1e6
        if step.optimizer_ns:
            row[_OPTIMIZER] = step.optimizer_ns / 1e6
        if step.wait_ns >= 0:
            row[_INPUT_WAIT] = step.wait_ns / 1e6
        row[_APPLY] = self._apply_ms
        if self.optimizer is not None:
            put_optimizer(row, self.optimizer.param_groups, scale)
        for key, value in self._device_values().items():
            row[STEP_SLOT[key]] = value

    def _stream(self, ending: EndedStep) -> None:
        step, row = self._under_way, ending.row
        loss, parts = step.loss
        time = self.clock.step_end(ending.ended)
        seeds = ending.growing.seeds if ending.growing is not None else ()
        if self._sealer.seal_now(row, loss, parts, step.norm, step.reported):
            ending.newest = (self.step, time, row, seeds)
            self._frames.frame(time, row, seeds)
        else:
            frame = Unsealed(self.step, time, row, loss, parts, step.norm, step.reported, seeds)
            for done in self._sealer.take(frame):
                ending.newest = (done.step, done.time, done.row, done.seeds)
                self._frames.frame(done.time, done.row, done.seeds)
        if ending.newest is not None:
            self._latest = ending.newest[2]

    def _ask(self, ending: EndedStep) -> None:
        asking, newest, tending = self._asking, ending.newest, self._tending
        ending.update = self._control.decision
        self._timelines.open(ending)
        if asking.decides:
            ending.waits = asking.is_shared
            settled = None
            try:
                if asking.asks and newest is not None:
                    growing = ending.growing
                    asking.send(*newest, None if growing is None else growing.proposal)
                    ending.waits, ending.asked = True, newest[0]
            finally:  # ranks do all that they do together, whatever one of them meets
                if asking.is_shared:
                    settled = asking.settle(self.step)
            if self._waits and not asking.is_shared:
                settled = asking.collect()
            if settled is not None:
                ending.taken = (*ending.taken, settled)
        if tending is not None and (not asking.asks or newest is not None):
            # A frame whose values are still on a device is asked about later, with the
            # proposal of then.
            tending.asked(newest[0] if newest is not None else self.step)

    def _apply(self, ending: EndedStep) -> None:
        """Decisions that were taken at the end of this step itself, and by all ranks."""
        for taken in ending.taken:
            self._take(taken)
        if ending.taken or (self._tending is not None and not self._asking.decides):
            self._let_seeds_act(ending)

    def _let_seeds_act(self, ending: EndedStep) -> None:
        """Do what the decision in hand says of the garden's proposal."""
        began = perf_counter_ns()
        decision, self._in_hand = self._in_hand, None
        timeline, self._in_hand_of = self._in_hand_of, None
        tending = self._tending
        if tending is not None:
            if decision is None and not self._asking.decides:
                decision = self._asking.not_asked
            if decision is not None:
                acted = tending.apply(decision, enforced=self._responses.enforcing)
                if acted and timeline is not None:
                    timeline.acted = True
        applied = perf_counter_ns()
        ending.apply_ns += applied - began
        (timeline or ending).phases.append(("kasmina.apply", began, applied))

    def _spans(self, ending: EndedStep) -> None:
        if self._tending is not None:
            self._tell_events(ending, self._tending)
        latency_ms, usual_ms = ending.latency_ms, self._mean_latency_ms
        slow = latency_ms > self._span_slow_factor * usual_ms > 0.0
        if latency_ms == latency_ms:
            self._mean_latency_ms = (
                usual_ms + WEIGHT * (latency_ms - usual_ms) if usual_ms else latency_ms
            )
        every = self._span_every
        ending.wanted = slow or bool(ending.events) or bool(every and self.step % every == 0)
        control = self._control
        self._timelines.updated(self.step, control.made, skipped=control.skipped)

    def _tell_events(self, ending: EndedStep, tending: Tending) -> None:
        ending.events = tending.events(self.step, self.clock.offset)
        for event in ending.events:
            self._frames.event(event)
        if tending.over:
            self._tending = None

    def _let_seeds_learn(self, tending: Tending) -> None:
        """Before the step is measured: this is training, not telling of it."""
        began, ended = tending.learn(self.optimizer)
        self._under_way.optimizer_ns += ended - began
        self._under_way.phases.append(("train.seeds", began, ended))

    def _report_fault(self, where: str) -> None:
        if where not in self._faults:
            self._faults.add(where)
            log.exception("esper-otel: %r of a step failed; the run goes on", where)
