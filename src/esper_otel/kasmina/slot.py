"""Slot: one submodule of the host where seeds grow, its stage, and the seed in it."""

from __future__ import annotations

import weakref

from torch import nn

from esper_otel.kasmina.checkpoint import RestoredSlot, activation_state, put_in, seed_state
from esper_otel.kasmina.context import GardenContext, SlotEvents
from esper_otel.kasmina.gates import BEFORE, PASSED, Facts, GateFailed, clean_reset, loss_impact
from esper_otel.kasmina.hook import SlotHook
from esper_otel.kasmina.host import join, leave
from esper_otel.kasmina.kernels import NOT_FINITE, Fetch
from esper_otel.kasmina.lifecycle import (
    GROWING,
    ISOLATED,
    NEXT,
    TARGET,
    Countdown,
    Lifecycle,
    SeedView,
    min_dwell,
)
from esper_otel.kasmina.loading import KernelLoader
from esper_otel.kasmina.seed import Seed, rng_seed_of
from esper_otel.kasmina.state import SlotState
from esper_otel.leyline import events
from esper_otel.leyline.decisions import SeedOperation, Severity
from esper_otel.leyline.frames import known
from esper_otel.leyline.stages import Stage, check_transition
from esper_otel.settings import Fossils

IN_A_ROW = 3
"""Violations, or fallbacks, one step after the other, that end a seed."""

HARM_IN_A_ROW = 20
"""Steps, one after the other, in which a seed that joins may make the loss too high. The
loss is a weighted mean over about five steps: fewer would cull for a bad batch."""


class Slot:
    """One slot and its life. Methods are called between steps, on the training thread.

    ``hook`` is what the host has of it.
    """

    def __init__(self, hook: SlotHook, context: GardenContext) -> None:
        self.hook = hook
        self.lifecycle = Lifecycle()
        self.seed: Seed | None = None
        self.cull_reason = ""
        """Why the seed should be culled; empty when it should not, as last seen."""
        self.germinated = 0
        """Seeds germinated here so far."""
        self._context = context
        self._joined: list[nn.Parameter] = []
        self._culled_module: weakref.ref[nn.Module] | None = None
        self._embargo = Countdown(0.0, context.clock)
        self._events = SlotEvents(hook.name, context)
        self._loader = KernelLoader(hook, context, self._events)

    @property
    def stage(self) -> Stage:
        """Where in its life the slot is."""
        return self.lifecycle.stage

    @property
    def name(self) -> str:
        """Path of its module in the host."""
        return self.hook.name

    @property
    def kernel_fetch(self) -> Fetch | None:
        """The fetch of its seed's kernel, while that is on its way."""
        return self._loader.fetch

    # Operations.

    def germinate(self, seed_id: str, blueprint: str) -> None:
        """Put a seed here: its kernel is fetched from now on."""
        if self.hook.activation is None:
            raise ValueError(f"slot {self.name!r} has not been called yet")
        check_transition(self.stage, Stage.GERMINATED)
        context = self._context
        self.seed = seed = Seed(seed_id, blueprint, rng_seed_of(seed_id, context.rng_root))
        seed.step_ms_before = context.step_ms
        self.germinated += 1
        self._events.seed_changed()
        self._loader.request(seed)
        self._move(Stage.GERMINATED, "germinated")

    def advance(self, operation: SeedOperation) -> None:
        """Lead the seed on; raises ``IllegalTransitionError`` where that is not next."""
        seed, context = self._live(), self._context
        target = TARGET[operation]
        check_transition(self.stage, target)
        if target is Stage.BLENDING:
            seed.loss_before = context.loss
            seed.alpha_schedule = context.alpha_schedule
            self.hook.set_alpha(seed.alpha_schedule.alpha(0))
        elif target is Stage.FOSSILIZED:
            self.hook.fossilize(self._context.followers)
            self._fossilize(seed)
        self._move(target, operation.value)

    def cull(self, reason: str, severity: Severity = Severity.WARNING) -> None:
        """Remove the seed and all that is its own, from the next forward on."""
        seed = self._live()
        check_transition(self.stage, Stage.CULLED)
        module = self.hook.seed
        self._culled_module = None if module is None else weakref.ref(module)
        self._move(Stage.CULLED, reason)
        text = f"{seed.id} was culled: {reason}"
        self._events.add(seed, events.CULLED, severity, text, reason=reason)
        self._clear()
        self._move(Stage.EMBARGOED, "culled")
        self._embargo = Countdown(self._context.settings.embargo_s, self._context.clock)

    def terminate(self) -> None:
        """End the slot's life, whatever is in it; the host is then what it was."""
        if self.stage in GROWING:
            self.cull("uprooted", Severity.NORMAL)
        if self.stage is Stage.EMBARGOED:
            self._move(Stage.RESETTING, "uprooted")
        if self.stage is Stage.RESETTING:
            self._move(Stage.DORMANT, "uprooted")
        if self.stage is not Stage.TERMINATED:
            self._move(Stage.TERMINATED, "uprooted")
        host = self._context.host_optimizer()
        if host is not None and self._joined:
            leave(host, self._joined)
        self._clear()
        self.hook.uproot()

    # Before and after a restart.

    def state(self) -> SlotState:
        """All that :meth:`restore_from` needs, as of the end of the newest step."""
        hook, seed, reported = self.hook, self.seed, self._events
        host = self._context.host_optimizer() if self._joined else None
        return SlotState(
            stage=self.stage.name,
            dwelt=self.lifecycle.dwelt,
            germinated=self.germinated,
            embargo_s=self._embargo.left,
            activation=activation_state(hook.activation),
            returns=hook.returns,
            seed=None if seed is None else seed_state(seed, hook, host),
            reported_unused=reported.unused,
            reported_fallback=reported.fallback,
            reported_faults=sorted(reported.faults),
        )

    def restore_from(self, restored: RestoredSlot) -> None:
        """Take over ``restored`` in a dormant slot; a kernel under way is fetched anew."""
        state, seed, context, hook = restored.state, restored.seed, self._context, self.hook
        self.lifecycle = Lifecycle(restored.stage, state.dwelt)
        self.germinated = state.germinated
        self._embargo = Countdown(state.embargo_s, context.clock)
        reported = self._events
        reported.unused, reported.fallback = state.reported_unused, state.reported_fallback
        reported.faults = set(state.reported_faults)
        hook.activation, hook.returns = restored.activation, state.returns
        self.seed = seed
        if seed is None:
            return
        if restored.module is None or restored.blend is None:
            if not seed.trouble:
                self._loader.request(seed)
            return
        put_in(hook, restored)
        if seed.params_finite != seed.params_finite:  # a device had not said it yet
            self._loader.check_finite(seed)
        self._joined = list(hook.parameters()) if restored.joined is not None else []
        hook.occupant = self._occupant
        if restored.stage is not Stage.FOSSILIZED:
            self._loader.compile(restored.module)

    # Each step.

    def step_optimizer(self) -> None:
        """The host's optimizer has stepped: so does the seed's, and its gradients go."""
        seed = self.seed
        if seed is None:
            return
        if self._joined:
            # model.zero_grad() does not know of them.
            for parameter in self._joined:
                parameter.grad = None
        elif seed.optimizer is not None:
            training_steps = self._context.settings.training_steps
            # Isolated, it is told where to go and never how far: its output changes no
            # loss. So it gets a number of steps, however long it has to wait then.
            hold = self.stage in ISOLATED and seed.train_steps >= training_steps
            # Gate G1 is asked at the end of this step, if it is the last of the dwell.
            training = self.stage is Stage.TRAINING
            measures = training and self.lifecycle.dwelt + 1 >= training_steps
            seed.step_optimizer(self._context.read if measures else None, hold=hold)

    def end_step(self, frozen: bool, sample: bool) -> list[float] | None:
        """End a step: look at what happened, go on where nothing is asked for that.

        Returns the seed's row, None when there is none. ``sample``: the next step takes
        isolation statistics.
        """
        lifecycle, seed = self.lifecycle, self.seed
        if seed is None:
            if lifecycle.stage is not Stage.DORMANT:
                self._count_embargo(frozen)
            return None
        hook = self.hook
        self._loader.poll(seed)
        fell_back = bool(seed.trouble)
        if hook.calls or hook.fallback:
            fell_back = self._check_calls(seed) or fell_back
        if not frozen:
            lifecycle.pass_step()
            if lifecycle.stage is Stage.BLENDING and (alpha := seed.next_alpha()) is not None:
                hook.set_alpha(alpha)
        hook.start_step(sample)
        return seed.row(lifecycle.stage, hook.alpha, hook.occupied, fell_back)

    def view(self, frozen: bool) -> SeedView:
        """What there is to know of the seed to choose the next operation."""
        seed = self._live()
        operation = NEXT.get(self.stage)
        reason = self._cull_reason(seed)
        ready = False
        there = self.kernel_fetch is None
        if not reason and operation is not None and self._has_dwelt and there:
            ready = self._gates_open(seed, operation)
            if not frozen:
                seed.shut_steps = 0 if ready else seed.shut_steps + 1
        if not reason and seed.shut_steps > self._context.settings.patience_steps:
            reason = next((why for why in seed.gates.values() if why), "")
        self.cull_reason = reason
        return SeedView(seed.id, operation, ready, reason, frozen)

    def report_if_unused(self) -> None:
        """Report once that nothing can grow here."""
        hook = self.hook
        if hook.activation is None or hook.trouble:
            why = hook.trouble or f"slot {self.name!r} was not called in a whole step"
            self._events.slot_unused(self.seed, why)

    def report_fault(self, what: str, error: Exception) -> None:
        """Report, once per seed, that something of this slot raised."""
        self._events.fault_raised(self.seed, what, error)

    @property
    def breaker_open(self) -> bool:
        """Whether the seed has to go at once: it keeps reaching the host it must not."""
        return self.seed is not None and self.seed.violations_in_a_row >= IN_A_ROW

    # Parts of them.

    @property
    def _has_dwelt(self) -> bool:
        seed = self.seed
        if seed is not None and self.stage is Stage.BLENDING and not seed.is_fully_blended:
            return False
        return self.lifecycle.dwelt >= min_dwell(self.stage, self._context.settings)

    @property
    def _occupant(self) -> str:
        return "" if self.seed is None else f"seed {self.seed.id!r} in stage {self.stage.name}"

    def _live(self) -> Seed:
        if self.seed is None:
            raise ValueError(f"slot {self.name!r} has no seed")
        return self.seed

    def _check_calls(self, seed: Seed) -> bool:
        """Look at what the hook saw in this step; returns whether identity took its place."""
        hook, context = self.hook, self._context
        seed.kernel_ms = hook.latency_ms
        self._loader.poll_compiled(seed)
        failed = self._failure(seed)
        if failed:
            seed.faults_in_a_row += 1
            self._events.fell_back(seed, failed)
        elif failed is not None:
            seed.faults_in_a_row = 0
        if hook.leaked:
            seed.violations += 1
            seed.violations_in_a_row += 1
            context.violations += 1
            text = f"{seed.id} must be isolated and reached the host's gradients"
            self._events.add(
                seed, events.VIOLATION, Severity.HIGH, text, violations=seed.violations
            )
        else:
            seed.violations_in_a_row = 0
        try:
            statistics = hook.statistics()
            if statistics is not None:
                seed.add_statistics(statistics, context.read)
        except Exception as error:
            self.report_fault("isolation statistics", error)
        return bool(failed)

    def _failure(self, seed: Seed) -> str | None:
        """Why identity took the seed's place; empty: it did not, None: nobody knows yet.

        On a device a value that is not finite is known a step late or more, and until then
        nothing is.
        """
        hook = self.hook
        finite = hook.finite
        if finite is not None:
            seed.add_finite_check(self._context.read(finite.float()))
        unsound = seed.saw_nonfinite()
        if hook.fallback:
            return hook.fallback
        if unsound:
            return NOT_FINITE
        return None if unsound is None and finite is not None else ""

    def _gates_open(self, seed: Seed, operation: SeedOperation) -> bool:
        facts, limits = self._facts(seed), self._context.limits
        is_open = True
        for name, gate in BEFORE[operation]:
            verdict = gate(facts, limits)
            is_open = is_open and verdict is PASSED
            self._events.gate_checked(seed, f"{name} before {operation.value}", verdict)
        return is_open

    def _facts(self, seed: Seed) -> Facts:
        context = self._context
        return Facts(
            attached=self.hook.occupied,
            trouble=seed.trouble or self.hook.fallback,
            finite=known(seed.params_finite) == 1.0,
            fits=self.hook.occupied and not self.hook.fallback,
            seed_norm=seed.norm,
            host_norm=context.host_norm,
            kernel_ms=seed.kernel_ms,
            loss=context.loss,
            loss_before=seed.loss_before,
            step_ms=context.step_ms,
            step_ms_before=seed.step_ms_before,
        )

    def _cull_reason(self, seed: Seed) -> str:
        if seed.trouble:
            return seed.trouble
        if seed.faults_in_a_row >= IN_A_ROW:
            return f"its kernel failed {IN_A_ROW} steps in a row: {self._events.fallback}"
        if self.stage in ISOLATED:
            return ""
        context = self._context
        verdict = loss_impact(self._facts(seed), context.limits)
        seed.harmful_steps = 0 if verdict is PASSED else seed.harmful_steps + 1
        return str(verdict) if seed.harmful_steps >= HARM_IN_A_ROW else ""

    def _fossilize(self, seed: Seed) -> None:
        context = self._context
        host = context.host_optimizer()
        if context.settings.fossils is Fossils.STAY or host is None or seed.optimizer is None:
            return
        join(host, seed.optimizer)
        self._joined = list(self.hook.parameters())
        seed.optimizer = None

    def _count_embargo(self, frozen: bool) -> None:
        lifecycle, embargo = self.lifecycle, self._embargo
        embargo.tick(frozen)
        if frozen:
            return
        lifecycle.pass_step()
        if lifecycle.stage is Stage.EMBARGOED:
            if lifecycle.dwelt < self._context.settings.embargo_steps or not embargo.over:
                return
            self._move(Stage.RESETTING, "the embargo is over")
        if lifecycle.stage is not Stage.RESETTING:
            return
        culled = None if self._culled_module is None else self._culled_module()
        held = self.hook.occupied or culled is not None
        verdict = clean_reset(Facts(remnants=held), self._context.limits)
        if isinstance(verdict, GateFailed):
            if lifecycle.dwelt == 1:
                self._events.add(None, events.GATE, Severity.WARNING, verdict.reason, gate="G5")
            return
        self._culled_module = None
        self._move(Stage.DORMANT, "G5 passed")

    def _clear(self) -> None:
        self.hook.release()
        self._loader.cancel()
        self.seed = None
        self.cull_reason = ""
        self._joined = []

    def _move(self, target: Stage, why: str) -> None:
        left = self.lifecycle.move(target)
        self.hook.occupant = self._occupant
        self._events.stage_changed(self.seed, left, target, why)
