"""Ordinary steps: a noted step of one batch, one loss and one update, recorded at once.

The notes of such a step have a known form, so its row needs no step under way that events are
told to one by one. Whatever has another form is told so
(:mod:`~esper_otel.tolaria.noted_steps`); a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.tolaria.fetches import Size, Source
from esper_otel.tolaria.ports import FrameSink
from esper_otel.tolaria.rates import BaseRate, Rates, put_optimizer
from esper_otel.tolaria.seal import Sealer
from esper_otel.tolaria.step import REPORTABLE, StepUnderWay
from esper_otel.tolaria.timelines import Clock, EndedStep, Timelines

BATCH, BACKWARD, BACKWARD_ENDS, REPORTED = range(4)
CLIPPED, MEASURED, OPTIMIZER, OPTIMIZER_ENDS = range(4, 8)
"""Kinds of notes."""

_Marks = tuple[int, ...]
_Known = tuple[_Marks, Source, Size, float | None, float | None, Mapping[str, float] | None]

_STEP = STEP_SLOT["step"]
_SAMPLES_PER_S = STEP_SLOT["samples_per_s"]
_HOOK = STEP_SLOT["hook_latency_ms"]
_PHASE = STEP_SLOT["phase"]
_KEPT = STEP_SLOT["gradients_kept"]
_STEP_LATENCY = STEP_SLOT["step_latency_ms"]
_FORWARD = STEP_SLOT["forward_ms"]
_BACKWARD = STEP_SLOT["backward_ms"]
_OPTIMIZER = STEP_SLOT["optimizer_ms"]
_INPUT_WAIT = STEP_SLOT["input_wait_ms"]
_CONFLICT_RATE = STEP_SLOT["grad_conflict_rate"]
_GRADIENT_NORM = STEP_SLOT["gradient_norm"]

_NOTHING: Mapping[int, float] = {}
_BEGINNING = (BATCH, BACKWARD, BACKWARD_ENDS)


def _row_of_nothing(*, enriched: bool) -> list[float]:
    """A row with what every ordinary step has in common."""
    row = step_row()
    for key in ("tamiyo_latency_ms", "nonfinite", "update_skipped"):
        row[STEP_SLOT[key]] = 0.0
    row[STEP_SLOT["lr_scale"]] = 1.0
    if enriched:
        row[STEP_SLOT["kasmina.apply_ms"]] = row[STEP_SLOT["kasmina.finalize_ms"]] = 0.0
    return row


class OrdinarySteps:
    """Records the ordinary ones of noted steps."""

    def __init__(
        self,
        frames: FrameSink,
        *,
        step: StepUnderWay,
        sealer: Sealer,
        timelines: Timelines,
        clock: Clock,
        base_rate: BaseRate,
        device_values: Callable[[], Mapping[str, float]],
        enriched: bool,
    ) -> None:
        self._frames = frames
        self._step = step
        self._sealer = sealer
        self._timelines = timelines
        self._clock = clock
        self._base_rate = base_rate
        self._device_values = device_values
        self._enriched = enriched
        self._nothing = _row_of_nothing(enriched=enriched)
        self._blank = self._nothing
        """A row with what devices and rates are known to have."""
        self._of_devices: Mapping[str, float] | None = None
        self._of_rates: Rates = ()
        self._of_first: float | None = None

    def record(
        self,
        notes: Sequence[Any],
        started: int,
        number: int,
        ended: int,
        rates: Rates,
        last_end: int,
    ) -> list[float] | None:
        """The row of step ``number``, which is streamed; None where it is not ordinary.

        It began at mark ``started`` (0: before notes did) and ended at ``ended``, the step
        before at ``last_end``.
        """
        known = self._read(notes, started) if started and last_end else None
        if known is None:
            return None
        marks, source, size, loss, norm, told = known
        step, sealer, timelines = self._step, self._sealer, self._timelines
        if not step.fetches.is_usual(source) or step.losses.divisor:
            return None
        if sealer.waiting or timelines.waiting:
            return None
        others = self._slots(told) if told else _NOTHING
        if others is None or not self._has_blank(rates):
            return None
        row = self._blank.copy()
        step.backwards += 1
        step.notice_phase(size)
        latency_ms, phase = (ended - last_end) / 1e6, step.training_phase
        row[_STEP] = number
        row[_PHASE] = phase.number
        if step.gradients_kept is not None:
            row[_KEPT] = 0.0
        if size[0] and latency_ms > 0.0:
            row[_SAMPLES_PER_S] = size[0] * 1e3 / latency_ms
        prepare_ns = self._put_times(row, marks)
        row[_HOOK] = (started - last_end) / 1e6 + prepare_ns / 1e6
        if self._enriched:
            row[_STEP_LATENCY] = latency_ms
        sealer.put_numbers(row, loss, 1, norm, others)
        self._frames.frame(self._clock.step_end(ended), row)
        if timelines.wants(number, latency_ms, phase):
            telling = EndedStep(number, ended, last_end, started, _phases(marks))
            telling.row, telling.phase, telling.wanted = row, phase, True
            timelines.tell_undecided(telling)
        return row

    def _read(self, notes: Sequence[Any], started: int) -> _Known | None:
        """What ``notes`` say, None where they are not those of an ordinary step."""
        count = len(notes)
        if count < 18 or (notes[0], notes[5], notes[7]) != _BEGINNING:
            return None
        _, asked_for, size, source, came, _, forwarded, _, loss, evaluation, mark = notes[:11]
        norm, told, at = None, None, 11
        measured_from = measured = 0
        while at + 7 < count:
            kind = notes[at]
            if kind == MEASURED and not measured:
                _, known, measured_from, measured = notes[at : at + 4]
                measured_from = measured_from or mark
                norm = norm if known is None else known
                at += 4
            elif kind == CLIPPED:
                norm = notes[at + 1]
                at += 2
            elif kind == REPORTED and told is None and notes[at + 1] is None:
                told = notes[at + 2]
                norm = told.get("gradient_norm", norm)
                at += 3
            else:
                return None
        if at + 7 != count or notes[at] != OPTIMIZER or notes[at + 5] != OPTIMIZER_ENDS:
            return None
        _, hook_began, newest, _, begun, _, stepped = notes[at:]
        in_order = started <= asked_for and forwarded < mark <= (measured_from or mark)
        if evaluation is not None or not in_order or hook_began < (measured or mark):
            return None
        marks: _Marks = (started, asked_for, came, forwarded, mark)
        marks += (measured_from, measured, hook_began, begun, stepped)
        return marks, source, size, loss, norm if newest is None else newest, told

    def _slots(self, told: Mapping[str, float]) -> Mapping[int, float] | None:
        """What the loop reported, by slot; None where that is not of the registry alone."""
        slots = {}
        for key, value in told.items():
            slot = REPORTABLE.get(key)
            if slot is None:
                return None
            if slot != _GRADIENT_NORM and (self._enriched or slot != _CONFLICT_RATE):
                slots[slot] = value
        return slots

    def _has_blank(self, rates: Rates) -> bool:
        """Whether there is a blank row with the newest values of devices, and ``rates``: mostly
        that of the step before."""
        if not self._enriched:
            return True
        try:
            devices = self._device_values()
            known = devices is self._of_devices and rates == self._of_rates
            if known and self._base_rate.first == self._of_first:
                return True
            row = self._nothing.copy()
            for key, value in devices.items():
                row[STEP_SLOT[key]] = value
        except Exception:
            return False  # it is told of where other steps are recorded
        if rates:
            put_optimizer(row, rates, 1.0, self._base_rate)
        self._blank, self._of_devices, self._of_rates = row, devices, rates
        self._of_first = self._base_rate.first
        return True

    def _put_times(self, row: list[float], marks: _Marks) -> int:
        """Put the times of phases into ``row``; returns what was spent on the norm."""
        started, asked_for, came, forwarded, mark, *rest = marks
        measured_from, measured, hook_began, begun, stepped = rest
        prepare_ns = begun - hook_began
        optimizer_ns = asked_for - started + hook_began - mark + stepped - begun
        if measured:
            prepare_ns += measured - measured_from
            optimizer_ns -= measured - measured_from
        if self._enriched:
            if came < forwarded:
                row[_FORWARD] = (forwarded - came) / 1e6
            row[_BACKWARD] = (mark - forwarded) / 1e6
            if optimizer_ns:
                row[_OPTIMIZER] = optimizer_ns / 1e6
            row[_INPUT_WAIT] = (came - asked_for) / 1e6
        return prepare_ns


def _phases(marks: _Marks) -> list[tuple[str, int, int]]:
    """What such a step is made of, for its spans."""
    started, asked_for, came, forwarded, mark, *rest = marks
    measured_from, measured, hook_began, begun, stepped = rest
    phases = [("train.optimizer", started, asked_for)] if asked_for > started else []
    phases.append(("train.input_wait", asked_for, came))
    phases.append(("train.forward", came, forwarded))
    phases.append(("train.backward", forwarded, mark))
    if measured:
        if measured_from > mark:
            phases.append(("train.optimizer", mark, measured_from))
        phases.append(("tolaria.gradient_norm", measured_from, measured))
        mark = measured
    if hook_began > mark:
        phases.append(("train.optimizer", mark, hook_began))
    phases.append(("tolaria.gradient_norm", hook_began, begun))
    phases.append(("train.optimizer", begun, stepped))
    return phases
