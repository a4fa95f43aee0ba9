"""Turns the events of a training loop into one step record per optimizer step.

The recorder is told of events (a batch came, backward began, the optimizer stepped) and
knows nothing of torch; who tells it is an integration or the explicit API. All its
methods run on the training thread, so they are short, allocate little, wait for nothing
but a decision that is late, and never raise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any

from esper_otel.leyline.decisions import Decision
from esper_otel.leyline.frames import Value
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.tolaria.asking import Asking, Taken
from esper_otel.tolaria.garden_calls import SafeGarden
from esper_otel.tolaria.loop_events import LoopEvents
from esper_otel.tolaria.noted_steps import Follower, NotedSteps
from esper_otel.tolaria.ordinary_steps import OrdinarySteps
from esper_otel.tolaria.ports import DecisionAgreement, DecisionClient, FrameSink, GardenPort
from esper_otel.tolaria.rates import put_optimizer
from esper_otel.tolaria.responses import Responses
from esper_otel.tolaria.seal import PendingFrame, Sealer, parse_state
from esper_otel.tolaria.step import StepUnderWay
from esper_otel.tolaria.timelines import Clock, EndedStep, Timelines
from esper_otel.tolaria.update_control import Measure, UpdateControl
from esper_otel.tolaria.updates import Optimizer

# Slots as plain integers: a dictionary look-up each would be a tenth of the step's cost.
_STEP = STEP_SLOT["step"]
_SAMPLES_PER_S = STEP_SLOT["samples_per_s"]
_HOOK = STEP_SLOT["hook_latency_ms"]
_TAMIYO = STEP_SLOT["tamiyo_latency_ms"]
_UNJUDGED = STEP_SLOT["unjudged_steps"]
_PHASE = STEP_SLOT["phase"]
_APPLY = STEP_SLOT["kasmina.apply_ms"]
_FINALIZE = STEP_SLOT["kasmina.finalize_ms"]
_NONFINITE = STEP_SLOT["nonfinite"]
_KEPT = STEP_SLOT["gradients_kept"]


class Recorder(LoopEvents):
    """Follows one training loop; see the module for the manner.

    ``optimizer`` (settable) is whose learning rate is recorded. ``device_values`` returns
    the newest device probes by key. ``client`` None means that nobody is asked. ``waits``:
    each answer is waited for at the end of its own step, within the deadline.
    """

    def __init__(
        self,
        frames: FrameSink,
        *,
        run: str,
        responses: Responses,
        client: DecisionClient | None = None,
        enriched: bool = True,
        device_values: Callable[[], Mapping[str, float]] = dict,
        span_every: int = 50,
        span_slow_factor: float = 2.0,
        waits: bool = False,
    ) -> None:
        step = StepUnderWay(enriched=enriched)
        super().__init__(step)
        self.optimizer: Optimizer | None = None
        self.step = 0  # optimizer steps seen so far
        self.clock = Clock()
        self._frames = frames
        self._responses = responses
        self._asking = Asking(run, client)
        self.decision: Decision = self._asking.not_asked  # the newest
        self._waits = waits
        self._enriched = enriched
        self._device_values = device_values
        self._garden: SafeGarden | None = None
        sealer = self._sealer = Sealer(enriched=enriched)
        self._timelines = Timelines(
            frames.timeline, self.clock.offset, every=span_every, slow_factor=span_slow_factor
        )
        self._in_hand: Decision | None = None  # seeds have not been told of it yet
        self._in_hand_of: EndedStep | None = None
        self._backwards_asked = 0  # times that backward was called at the newest request
        self.control = UpdateControl(
            step, asking=self._asking, responses=responses, sealer=sealer, clock=self.clock
        )
        ask = (self._seeds, self._seal, self._stream, self._ask, self._apply, self._spans)
        keep = (self.control.end_update, self.control.keep)
        self._keeps = responses.restoring.keeps  # snapshots
        self._stages = (keep[0], *ask, keep[1]) if self._keeps else ask
        self._alone = (self._seal, self._stream, self._timelines.end_undecided)
        self._changed = self.control.updates.within
        self._notes = NotedSteps(self, step, self._tell_directly)
        self._ordinary = OrdinarySteps(
            frames,
            step=step,
            sealer=sealer,
            timelines=self._timelines,
            clock=self.clock,
            base_rate=self.control.base_rate,
            device_values=device_values,
            enriched=enriched,
        )

    # Around an optimizer's step.

    def _optimizer_begins(
        self, hook_began: int, norm: Value | None, optimizer: Optimizer | None = None
    ) -> None:
        """``norm`` was computed since ``hook_began``.

        The decision about the step before is taken, and ``optimizer`` steps under it.
        """
        step, decides = self._under_way, self._asking.decides
        step.optimizer_approaches(hook_began, norm, begins=not decides)
        if decides:
            self.before_update(optimizer, is_primary=True)
            step.optimizer_begins(hook_began)

    def closure_begins(
        self, optimizer: Optimizer | None = None, measure: Measure | None = None
    ) -> None:
        """As ``optimizer_begins``, for a step that calls forward and backward itself.

        ``measure`` gives the gradient norm once they have been called.
        """
        if self._asking.decides:
            self.before_update(optimizer, is_primary=measure is not None, measure=measure)
        self.under_way.closure_begins()

    def _optimizer_ends(self, optimizer: Optimizer | None = None) -> int:
        now = self._under_way.optimizer_ends()
        if optimizer is not None and self._changed:
            self.control.updates.put_back(optimizer)
        return now

    def collect(self) -> None:
        """Take the decision about the step before, if it has not been taken."""
        if (taken := self._asking.collect()) is not None and not self._off:
            self._take(taken)

    def end_settled(self, ended: int = 0) -> None:
        """The step is done: seal its frame, stream it, ask about it, do what was decided.

        ``ended`` is the mark of its end, 0 for now. Each stage has a boundary of its own: what
        raises in one takes nothing from the others.
        """
        if self._off:
            self._under_way.start_next(0, self.step)
            return
        asking, under_way, garden = self._asking, self._under_way, self._garden
        # Of a loop whose optimizers nobody watches; before seeds learn, as ranks do all that
        # they do together in the same order.
        leftover = asking.collect() if asking.sent else None
        if garden is not None:
            # Before the step is measured: this is training, not telling of it.
            garden.train_seeds(self.optimizer, under_way)
            ended = 0
        ended = ended or perf_counter_ns()
        self.step = step = self.step + 1
        ending = EndedStep(step, ended, self._last_end, under_way.span_start, under_way.phases)
        self._rates = self._rates_of(self.optimizer)
        if leftover is not None:
            ending.taken = (leftover,)
        self._last_end = ended
        alone = not (asking.decides or garden or ending.taken or self._in_hand or self._keeps)
        self._go_through(self._alone if alone else self._stages, ending)
        self._rates = ()  # they hold parameters, whose owner decides how long these live
        hook_end = perf_counter_ns()
        if not alone:
            self.control.start_next()
        self._hook_ms = (hook_end - ended) / 1e6
        self._apply_ms = ending.apply_ns / 1e6
        under_way.start_next(hook_end, step)

    # Steps that nobody decides about, and another thread makes of what was noted of them.

    def defer_to(self, follower: Follower) -> None:
        """Have ``follower`` do what nobody waits for, as long as nobody decides."""
        self._notes.bell = follower.follow(self._notes)
        self._note_if_alone()

    def _note_if_alone(self) -> None:
        decides = self._asking.decides or self._garden is not None or self._in_hand is not None
        changes = self._responses.enforcing or self._keeps
        if self._notes.bell is not None and not (self._off or decides or changes):
            self._note(self._notes)

    def set_client(self, client: DecisionClient | None) -> None:
        """Ask ``client`` from here on; None: nobody."""
        self._tell_directly()
        self._asking.set_client(client)
        self._note_if_alone()

    def share_decisions(self, agreement: DecisionAgreement, *, asks: bool) -> None:
        """From here on take what all ranks have settled; ``asks``: for all of them."""
        self._tell_directly()
        self._asking.share_decisions(agreement, asks=asks)

    def flush(self) -> None:
        """No step follows: take the last answer, and frames go with what has arrived."""
        self._tell_directly()
        try:
            if (taken := self._asking.collect()) is not None:
                self.decision = taken.decision
                self._timelines.on_decision(taken, self.step + 1)
        finally:
            self._timelines.flush()
            for frame in self._sealer.flush():
                self._frames.frame(*frame.told)

    def attach_garden(self, garden: GardenPort | None) -> None:
        """Take ``garden`` along from the next end of a step on; None: none any more."""
        self._tell_directly()
        self._garden = None if garden is None else SafeGarden(garden)
        self._note_if_alone()

    def state_dict(self) -> dict[str, Any]:
        """What the rows of coming steps depend on: plain data, for :meth:`load_state_dict`."""
        if self._noted is not None:
            self._noted.take_up_all()
        return self._sealer.state_after(self.step, self._latest).plain()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, in this process or in one before it.

        Steps are counted on, but never twice the same: a run that goes back to a checkpoint
        counts on from where it is. ``ValueError`` for what is no such state changes nothing.
        """
        parsed, under_way = parse_state(state), self.under_way
        self.step = max(self.step, parsed.step)
        self._latest = parsed.row()
        under_way.go_on_with_phase(self._latest)
        self._sealer.load_state(parsed)

    def switch_off(self) -> None:
        """Do nothing from here on (a forked child must not report its parent's steps)."""
        self._off = True
        self._tell_directly(forget=True)
        self.control.updates.close()

    def before_update(
        self,
        optimizer: Optimizer | None,
        *,
        is_primary: bool = False,
        collects: bool = True,
        measure: Measure | None = None,
    ) -> None:
        """Any optimizer of the loop is about to step, with the factor in force.

        ``collects`` False where the thread is not the one that asks. One that steps right
        behind the run's own does not wait for the answer about that very step.
        """
        if self._off:
            return
        moved_on = is_primary or self._under_way.backwards != self._backwards_asked
        if collects and moved_on and self._asking.sent:
            try:
                self.collect()
            except Exception:
                self._report_fault("collect")
        if optimizer is not None:
            try:
                self.control.before_update(
                    optimizer, self.step + 1, is_primary=is_primary, measure=measure
                )
            except Exception:
                self._report_fault("update")

    def _take(self, taken: Taken) -> None:
        """Do what ``taken`` says of the rate, and of what is paused; seeds follow later."""
        decision = self.decision = self._in_hand = taken.decision
        timeline = self._in_hand_of = self._timelines.on_decision(taken, self.step + 1)
        self.control.decided(decision, timeline)
        scales = self._responses.apply_rate(decision)
        if timeline is not None:
            timeline.scales = scales
        if self._responses.apply_pause(decision) and timeline is not None:
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
        garden, finalize_ms = self._garden, 0.0
        if garden is not None:
            ending.growing, finalize_ms = garden.put_frame(row, self.step, self._latest, step)
        row[_STEP] = ending.step
        row[_HOOK] = self._hook_ms + step.prepare_ns / 1e6
        row[_TAMIYO] = asking.spent_ns / 1e6
        asking.spent_ns = 0
        row[_NONFINITE] = 0.0
        scale = self.control.put_values(row)
        if step.gradients_kept is not None:
            row[_KEPT] = step.gradients_kept
        step.notice_phase(step.size)
        row[_PHASE], ending.phase = step.training_phase.number, step.training_phase
        if asking.decides:
            row[_UNJUDGED] = asking.unjudged
        since = ending.since = ending.since or step.begun or ended
        ending.latency_ms = latency_ms = (ended - since - step.outside_ns) / 1e6
        if step.size[0] and latency_ms > 0.0:
            row[_SAMPLES_PER_S] = step.size[0] * 1e3 / latency_ms
        if not self._enriched:
            return
        step.put_times(row, latency_ms if ending.has_step_before else None)
        row[_APPLY], row[_FINALIZE] = self._apply_ms, finalize_ms
        if self._rates:
            control = self.control
            put_optimizer(row, self._rates, scale, control.base_rate, control.momentum_scale)
        for key, value in self._device_values().items():
            row[STEP_SLOT[key]] = value

    def _stream(self, ending: EndedStep) -> None:
        step, row = self._under_way, ending.row
        loss, parts = step.losses.value
        time = self.clock.step_end(ending.ended)
        seeds = ending.growing.seeds if ending.growing is not None else ()
        own = step.custom
        if not own and self._sealer.seal_now(row, loss, parts, step.norm, step.reported):
            ending.newest = (ending.step, time, row, seeds)
            self._frames.frame(time, row, seeds)
        else:
            known = ending.step, time, row, loss, parts, step.norm, step.reported, seeds, own
            for done in self._sealer.seal_in_order(PendingFrame(*known)):
                ending.newest, ending.custom = done.asked, done.numbers
                self._frames.frame(*done.told)
        if ending.newest is not None:
            self._latest = ending.newest[2]

    def _ask(self, ending: EndedStep) -> None:
        asking, newest, garden = self._asking, ending.newest, self._garden
        ending.update = self.control.decision
        self.control.sealed(newest)
        self._timelines.open(ending)
        if asking.decides:
            ending.waits = asking.is_shared
            settled = None
            try:
                if asking.asks and newest is not None:
                    asking.send(*newest, ending.proposal, ending.custom)
                    ending.waits, ending.asked = True, newest[0]
                    self._backwards_asked = self._under_way.backwards
            finally:  # ranks do all that they do together, whatever one of them meets
                if asking.is_shared:
                    settled = asking.collect_agreed(self.step)
            if self._waits and not asking.is_shared:
                settled = asking.collect()
            if settled is not None:
                ending.taken = (*ending.taken, settled)
        if garden is not None and (not asking.asks or newest is not None):
            # A frame that waits for a device is asked about later, with the proposal of then.
            garden.proposal_sent(newest[0] if newest is not None else self.step)

    def _apply(self, ending: EndedStep) -> None:
        """Decisions that were taken at the end of this step itself, and by all ranks."""
        for taken in ending.taken:
            self._take(taken)
        if ending.taken or (self._garden is not None and not self._asking.decides):
            self._let_seeds_act(ending)

    def _let_seeds_act(self, ending: EndedStep) -> None:
        """Do what the decision in hand says of the garden's proposal."""
        began = perf_counter_ns()
        decision, self._in_hand = self._in_hand, None
        timeline, self._in_hand_of = self._in_hand_of, None
        if (garden := self._garden) is not None:
            if decision is None and not self._asking.decides:
                decision = self._asking.not_asked
            if decision is not None:
                acted = garden.act_on(decision, enforced=self._responses.enforcing)
                if acted and timeline is not None:
                    timeline.acted = True
        applied = perf_counter_ns()
        ending.apply_ns += applied - began
        (timeline or ending).phases.append(("kasmina.apply", began, applied))

    def _spans(self, ending: EndedStep) -> None:
        if (garden := self._garden) is not None:
            ending.events = garden.events(self.step, self.clock.offset)
            if garden.over:
                self._garden = None
        ending.events = [*ending.events, *self.control.take_events()]
        for event in ending.events:
            self._frames.event(event)
        self._timelines.choose(ending)
        self._timelines.on_update(self.step, self.control)
