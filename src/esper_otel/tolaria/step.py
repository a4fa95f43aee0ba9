"""The current step: the times of its phases, its losses, and its other values.

Time is tiled: every mark ends one phase and begins the next, so that the phases of a step
and the hook that ended the one before add up to the step. Marks are nanoseconds of
``perf_counter_ns``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from time import perf_counter_ns

from esper_otel.leyline.frames import Reading, Value, known
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.tolaria.batch_sizes import BatchSizes, TrainingPhase
from esper_otel.tolaria.fetches import NO_SIZE, UNNAMED, Fetches, Size, Source
from esper_otel.tolaria.losses import ConditionalReading, Evaluation, StepLosses
from esper_otel.tolaria.ports import NO_TIME, PhaseTimes

MAX_PHASES = 4096
"""Phases of one step that are remembered for its spans. Its times count all there were."""

PHASES = ("forward", "backward", "optimizer")
"""Phases that an explicit loop may time itself."""

_GRADIENT_NORM = STEP_SLOT["gradient_norm"]
_CONFLICT_RATE = STEP_SLOT["grad_conflict_rate"]
_SKIPPED = STEP_SLOT["update_skipped"]
_PHASE = STEP_SLOT["phase"]
_H2D = STEP_SLOT["h2d_copy_ms"]
_STEP_LATENCY = STEP_SLOT["step_latency_ms"]
_FORWARD = STEP_SLOT["forward_ms"]
_BACKWARD = STEP_SLOT["backward_ms"]
_OPTIMIZER = STEP_SLOT["optimizer_ms"]
_INPUT_WAIT = STEP_SLOT["input_wait_ms"]

REPORTABLE = {
    key: STEP_SLOT[key]
    for key in ("accuracy", "grad_conflict_rate", "gradient_norm", "samples_per_s")
}
"""Keys that a loop may report itself, besides its loss, and their slots."""


class StepUnderWay:
    """What the loop has done since the last step ended; :meth:`start_next` turns to the next.

    ``enriched`` False leaves out reported values that are gated.
    """

    # All of these are made anew by start_next().
    started: int
    """Mark at which the step before was over, 0 for the first."""
    mark: int
    begun: int
    wait_ns: int
    forward_ns: int
    backward_ns: int
    prepare_ns: int
    """What this package did between backward and the optimizer's step."""
    optimizer_ns: int
    optimizing: bool
    outside_ns: int
    """Time of evaluations, which is no step's."""
    span_start: int
    size: Size
    """Samples of its batches, and their length."""
    norm: Value | None
    gradients_kept: float | None
    """1.0 if the update has used those of the one before as well; None until one has."""
    reported: dict[int, Value]
    custom: dict[str, Value]
    """Custom values by name."""
    phases: list[tuple[str, int, int]]

    def __init__(self, *, enriched: bool) -> None:
        self._enriched = enriched
        self.losses = StepLosses()
        self.fetches = Fetches()
        self._steps = 0
        self.backwards = 0
        """Times that backward was called, in all steps."""
        self.training_phase = TrainingPhase()
        self.gradients_kept = None
        self._batch_sizes = BatchSizes()
        self.start_next(0, 0)

    def start_next(self, mark: int, steps: int) -> None:
        """The next step begins at ``mark``, after ``steps`` before it."""
        self._steps = steps
        self.started = self.span_start = self.mark = mark
        self.begun = 0
        self.forward_ns = self.backward_ns = self.optimizer_ns = 0
        self.wait_ns = -1
        self.prepare_ns = 0
        self.size = NO_SIZE
        self.optimizing = False
        self.outside_ns = 0
        self.norm = None
        self.gradients_kept = None if self.gradients_kept is None else 0.0
        self.losses.start_next()
        self.reported = {}
        self.custom = {}
        self.phases = []

    def phase_begins(self, name: str) -> None:
        """From this step on values of before are no measure for what comes."""
        self.training_phase = TrainingPhase(self.training_phase.number + 1, name)
        self._batch_sizes.forget_usual()

    def notice_phase(self, size: Size) -> None:
        """A phase begins with this step where its batches' ``size`` lasts and is new."""
        name = self._batch_sizes.change(size)
        if name:
            self.training_phase = TrainingPhase(self.training_phase.number + 1, name)

    def go_on_with_phase(self, latest: Sequence[float]) -> None:
        """The phase is that of ``latest``, the newest row before a restart."""
        number = latest[_PHASE]
        if number > self.training_phase.number:
            self.training_phase = TrainingPhase(int(number))

    def take(self, other: StepUnderWay, last_end: int, turns: PhaseTimes = NO_TIME) -> None:
        """What ``other`` has seen since its last step is of this training, and not of that.

        What lies between ``last_end``, of this one's own last step (0: none), and the end of
        that step of ``other`` is in no step's time, but for ``turns``: those of steps meanwhile
        that turned out to be a part of this one.
        """
        own, losses = (self.training_phase, self._steps, self._batch_sizes), self.losses
        backwards = self.backwards + other.backwards
        self.__dict__.update(other.__dict__)
        self.training_phase, self._steps, self._batch_sizes = own
        self.backwards, self.losses = backwards, losses
        losses.take_over(other.losses)
        if last_end and self.started:
            self.outside_ns += self.started - last_end - sum(turns)
            self.forward_ns += turns.forward
            self.backward_ns += turns.backward
            self.optimizer_ns += turns.optimizer
            if turns.wait:
                self.wait_ns = max(self.wait_ns, 0) + turns.wait
            self.prepare_ns += turns.hook
        other.start_next(0, other._steps)

    # What the loop does, in the order in which a step does it. ``now`` is the mark at which it
    # did, 0: just now.

    def batch_came(
        self, asked_for: int, size: Size, source: Source = UNNAMED, now: int = 0
    ) -> None:
        """The loop asked for a batch at mark ``asked_for`` and has it now.

        ``size`` is zero where it is not known; ``source`` says which loader it is from,
        so that those of a validation loop are never charged to training
        (:class:`~esper_otel.tolaria.fetches.Fetches`).
        """
        now = now or perf_counter_ns()
        self.fetches.came(source, asked_for, now, size, self.mark)
        self.mark = now

    def batches_ended(self, iterator: int) -> None:
        """The iterator of that number, of a :class:`Source`, has no more batches."""
        self.fetches.ended(iterator, perf_counter_ns())

    def backward_begins(self, now: int = 0) -> None:
        """The loop calls backward: what led here since the batch came was forward."""
        now = now or perf_counter_ns()
        self.backwards += 1
        if self.fetches.waiting:
            self.charge_fetches()
        mark = self.mark or now
        if self.begun == 0:
            self.begun = mark
        self.forward_ns += now - mark
        phases = self.phases
        if len(phases) > MAX_PHASES:
            del phases[: MAX_PHASES // 2]
        phases.append(("train.forward", mark, now))
        self.mark = now

    def backward_ends(
        self, loss: Value | None, evaluation: Evaluation | None = None, now: int = 0
    ) -> None:
        """Backward is done; ``loss`` is what it began from, None when that is no scalar.

        ``evaluation`` says how it is related to the others of the step, as far as known.
        """
        now = now or perf_counter_ns()
        self.backward_ns += now - self.mark
        self.phases.append(("train.backward", self.mark, now))
        self.mark = now
        if loss is not None:
            self.losses.add(loss, evaluation, optimizing=self.optimizing)

    def skipped(self) -> None:
        """The optimizer did not step (a gradient scaler saw an overflow).

        What was learnt of this attempt is forgotten, its time is that of the next step. Custom
        values stay: an evaluation was none of the attempt.
        """
        self.norm = None
        self.losses.start_next()
        self.reported = {}

    def may_be_skipped(self, skipped: Reading) -> None:
        """The optimizer has stepped if ``skipped``, which a device has still to tell, is zero.

        If it is not, the step has been counted all the same, but not what it learnt.
        """
        if self.norm is not None:
            self.norm = ConditionalReading(self.norm, skipped)
        self.losses.doubt(skipped)

    @property
    def loss(self) -> tuple[Value | None, float]:
        """The sum of the losses, and by what it is to be divided."""
        return self.losses.value

    def clipped(self, norm: Value) -> None:
        """Gradients were clipped, and ``norm`` is what their norm was before."""
        self.norm = norm

    def forget_norm(self, norm: Value) -> None:
        """``norm``, if nobody has told another since, was not of all the step's gradients."""
        if self.norm is norm:
            self.norm = None

    def optimizer_approaches(
        self, hook_began: int, norm: Value | None, begins: bool = False, now: int = 0
    ) -> None:
        """The optimizer is about to step; ``norm`` was computed since ``hook_began``.

        ``begins``: nothing else is to be done before (:meth:`optimizer_begins`).
        """
        now = now or perf_counter_ns()
        if norm is not None:
            self.norm = norm
        if self.fetches.waiting:
            self.charge_fetches()
        mark = self.mark
        if hook_began > mark > 0:
            if self.backward_ns:  # clipping, unscaling
                self.optimizer_ns += hook_began - mark
                self.phases.append(("train.optimizer", mark, hook_began))
            else:  # a loop that has its gradients without ``backward``
                self.begun = self.begun or mark
                self.forward_ns += hook_began - mark
                self.phases.append(("train.forward", mark, hook_began))
        self.phases.append(("tolaria.gradient_norm", hook_began, now))
        if begins:
            self.prepare_ns += now - hook_began
            self.optimizing, self.mark = True, now

    def optimizer_begins(self, hook_began: int) -> None:
        """All that was to be done before it has been, since ``hook_began``: it steps now."""
        now = perf_counter_ns()
        self.prepare_ns += now - hook_began
        self.optimizing = True
        self.mark = now

    def closure_begins(self) -> None:
        """The optimizer is about to step, and will call forward and backward itself."""
        self.optimizing = True
        self.losses.closure_begins()

    def optimizer_ends(self, now: int = 0) -> int:
        """The optimizer has stepped; returns the mark of now, for :meth:`end_step`."""
        now = now or perf_counter_ns()
        if self.optimizing:
            self.optimizing = False
            self.optimizer_ns += now - self.mark
            self.phases.append(("train.optimizer", self.mark, now))
        self.mark = now
        return now

    def measured(self, norm: Value | None, began: int = 0, now: int = 0) -> int:
        """The norm was computed since ``began``, or the newest mark; returns that of now.

        After :meth:`optimizer_ends`, or behind backward, before anybody has clipped.
        """
        now = now or perf_counter_ns()
        if norm is not None:
            self.norm = norm
        mark = self.mark
        if began > mark:  # unscaling
            self.optimizer_ns += began - mark
            self.phases.append(("train.optimizer", mark, began))
            mark = began
        self.prepare_ns += now - mark
        self.phases.append(("tolaria.gradient_norm", mark, now))
        self.mark = now
        return now

    def phase(self, name: str, began: int, ended: int) -> None:
        """One phase of an explicit loop: ``forward``, ``backward`` or ``optimizer``.

        ``name`` is one of :data:`PHASES`.
        """
        took = ended - began
        if name == "forward":
            self.forward_ns += took
        elif name == "backward":
            self.backward_ns += took
        else:
            self.optimizer_ns += took
        if self.begun == 0:
            self.begun = began
        phases = self.phases
        if len(phases) > MAX_PHASES:
            del phases[: MAX_PHASES // 2]
        phases.append((f"train.{name}", began, ended))
        self.mark = ended

    def loop_reported(self, loss: Value | None, values: Mapping[str, Value]) -> None:
        """What the loop knows of this step; ``values`` by key, of :data:`REPORTABLE`, or by
        the name of a custom value.

        A reported loss takes the place of those that backward began from.
        """
        for key, value in values.items():
            slot = REPORTABLE.get(key)
            if slot is None:
                self.custom[key] = value
            elif slot == _GRADIENT_NORM:
                self.norm = value
            elif self._enriched or slot != _CONFLICT_RATE:
                self.reported[slot] = value
        if loss is not None:
            self.losses.report(loss)

    def leftover(self) -> dict[str, float]:
        """Custom values behind the last step, as far as they have arrived; not given again."""
        values, self.custom = self.custom, {}
        numbers = {name: known(value) for name, value in values.items()}
        return {name: number for name, number in numbers.items() if isfinite(number)}

    def copied_to_device(self, milliseconds: Value) -> None:
        """How long the step's first host-to-device copy took."""
        if self._enriched:
            self.reported[_H2D] = milliseconds

    def update_skipped(self, skipped: Value) -> None:
        """A device was told to leave this step's update out; ``skipped`` is 1 if it did."""
        self.reported[_SKIPPED] = skipped

    def losses_prescaled(self, shares: bool = True) -> None:
        """From here on backward begins from shares: a step's loss is their sum, no mean.

        So it is where each micro-batch's loss is divided by their number. False: no longer.
        """
        self.losses.prescaled(shares, always=True)

    def charge_fetches(self) -> None:
        """Give the fetches since the last mark to this step, as far as they are its own."""
        before, since, outside, size, waits = self.fetches.charge(self._steps)
        phases = self.phases
        if outside:
            if before:
                self.outside_ns += since - before
            if not phases:
                self.span_start = since
        elif before and since > before:
            # What follows the end of a step is its rest: zero_grad, the scheduler, reading
            # the loss, which on a device waits for what was begun before.
            self.optimizer_ns += since - before
            phases.append(("train.optimizer", before, since))
        if not waits:
            # It was an evaluation, and what the step is trained on came on another way.
            self.mark = max(self.mark, since)
            return
        if self.begun == 0:
            self.begun = since
        if self.wait_ns < 0:
            self.wait_ns = 0
        for asked_for, came in waits:
            if asked_for > since:  # between two fetches of one step
                self.forward_ns += asked_for - since
                phases.append(("train.forward", since, asked_for))
            self.wait_ns += came - asked_for
            phases.append(("train.input_wait", asked_for, came))
            since = came
        had = self.size
        self.size = size if had is NO_SIZE else (had[0] + size[0], had[1] or size[1])

    def put_times(self, row: list[float], latency_ms: float | None) -> None:
        """Put the times of the step into ``row``, as far as it had the phases.

        ``latency_ms`` is that of the whole step, None where no step was before it.
        """
        if latency_ms is not None:
            row[_STEP_LATENCY] = latency_ms
        if self.forward_ns:
            row[_FORWARD] = self.forward_ns / 1e6
        if self.backward_ns:
            row[_BACKWARD] = self.backward_ns / 1e6
        if self.optimizer_ns:
            row[_OPTIMIZER] = self.optimizer_ns / 1e6
        if self.wait_ns >= 0:
            row[_INPUT_WAIT] = self.wait_ns / 1e6
