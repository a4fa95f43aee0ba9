"""A plot: one slot of the host, its stage, and the seed that grows in it."""

from __future__ import annotations

import weakref

from torch import nn

from esper_otel.kasmina import optimizers
from esper_otel.kasmina.arrival import Arrival
from esper_otel.kasmina.checkpoint import Regrown, activation_state, seed_state
from esper_otel.kasmina.embargo import Countdown
from esper_otel.kasmina.gates import (
    BEFORE,
    PASSED,
    Facts,
    Failed,
    clean_reset,
    loss_impact,
)
from esper_otel.kasmina.ground import Ground
from esper_otel.kasmina.growth import NEXT, Sight, dwell
from esper_otel.kasmina.kernels import NOT_FINITE, Fetch
from esper_otel.kasmina.lifecycle import GROWING, ISOLATED, TARGET, Lifecycle
from esper_otel.kasmina.seed import Seed, known, origin_of
from esper_otel.kasmina.slot import Slot
from esper_otel.kasmina.state import PlotState
from esper_otel.kasmina.telling import Voice
from esper_otel.leyline import events
from esper_otel.leyline.decisions import SeedOperation, Severity
from esper_otel.leyline.stages import Stage, check_transition
from esper_otel.settings import Fossils

IN_A_ROW = 3
"""Violations, or fallbacks, one step after the other, that end a seed."""

HARM_IN_A_ROW = 20
"""Steps, one after the other, in which a seed that joins may make the loss too high. The
loss is a weighted mean over about five steps: fewer would cull for a bad batch."""


class Plot:
    """One slot and its life. Methods are called between steps, on the training thread."""

    def __init__(self, slot: Slot, ground: Ground) -> None:
        self.slot = slot
        self.lifecycle = Lifecycle()
        self.seed: Seed | None = None
        self.hopeless = ""
        """Why the seed should be culled; empty when it should not, as last seen."""
        self.sown = 0
        """Seeds germinated here so far."""
        self._ground = ground
        self._joined: list[nn.Parameter] = []
        self._ghost: weakref.ref[nn.Module] | None = None
        self._embargo = Countdown(0.0, ground.clock)
        self._voice = Voice(slot.name, ground)
        self._arrival = Arrival(slot, ground, self._voice)

    @property
    def stage(self) -> Stage:
        """Where in its life the slot is."""
        return self.lifecycle.stage

    @property
    def name(self) -> str:
        """Path of its module in the host."""
        return self.slot.name

    @property
    def kernel_fetch(self) -> Fetch | None:
        """The fetch of its seed's kernel, while that is on its way."""
        return self._arrival.fetch

    # Operations.

    def germinate(self, seed_id: str, blueprint: str) -> None:
        """Sow a seed: its kernel is fetched from now on."""
        if self.slot.activation is None:
            raise ValueError(f"slot {self.name!r} has not been called yet")
        check_transition(self.stage, Stage.GERMINATED)
        ground = self._ground
        self.seed = seed = Seed(seed_id, blueprint, origin_of(seed_id, ground.root))
        seed.step_ms_before = ground.step_ms
        self.sown += 1
        self._voice.forget_seed()
        self._arrival.begin(seed)
        self._move(Stage.GERMINATED, "germinated")

    def advance(self, operation: SeedOperation) -> None:
        """Lead the seed on; raises ``IllegalTransitionError`` where that is not next."""
        seed, ground = self._live(), self._ground
        target = TARGET[operation]
        check_transition(self.stage, target)
        if target is Stage.BLENDING:
            seed.loss_before = ground.loss
            seed.course = ground.course
            self.slot.mix(seed.course.alpha(0))
        elif target is Stage.FOSSILIZED:
            self._fossilize(seed)
        self._move(target, operation.value)

    def cull(self, reason: str, severity: Severity = Severity.WARNING) -> None:
        """Remove the seed and all that is its own, from the next forward on."""
        seed = self._live()
        check_transition(self.stage, Stage.CULLED)
        module = self.slot.seed
        self._ghost = None if module is None else weakref.ref(module)
        self._move(Stage.CULLED, reason)
        text = f"{seed.id} was culled: {reason}"
        self._voice.tell(seed, events.CULLED, severity, text, reason=reason)
        self._clear()
        self._move(Stage.EMBARGOED, "culled")
        self._embargo = Countdown(self._ground.settings.embargo_s, self._ground.clock)

    def terminate(self) -> None:
        """The slot comes to its end, whatever lives in it, and the host is what it was."""
        if self.stage in GROWING:
            self.cull("uprooted", Severity.NORMAL)
        if self.stage is Stage.EMBARGOED:
            self._move(Stage.RESETTING, "uprooted")
        if self.stage is Stage.RESETTING:
            self._move(Stage.DORMANT, "uprooted")
        if self.stage is not Stage.TERMINATED:
            self._move(Stage.TERMINATED, "uprooted")
        host = self._ground.host()
        if host is not None and self._joined:
            optimizers.leave(host, self._joined)
        self._clear()
        self.slot.uproot()

    # Before and after a restart.

    def state(self) -> PlotState:
        """All that :meth:`resume` needs, as of the end of the newest step."""
        slot, seed, voice = self.slot, self.seed, self._voice
        host = self._ground.host() if self._joined else None
        return PlotState(
            stage=self.stage.name,
            dwelt=self.lifecycle.dwelt,
            sown=self.sown,
            embargo_s=self._embargo.left,
            activation=activation_state(slot.activation),
            seed=None if seed is None else seed_state(seed, slot, host),
            told_unused=voice.unused,
            told_fallback=voice.fallback,
            told_faults=sorted(voice.faults),
        )

    def resume(self, regrown: Regrown) -> None:
        """Be what ``regrown`` is; the slot must be dormant. A kernel is fetched anew."""
        state, seed, ground, slot = regrown.state, regrown.seed, self._ground, self.slot
        self.lifecycle = Lifecycle(regrown.stage, state.dwelt)
        self.sown = state.sown
        self._embargo = Countdown(state.embargo_s, ground.clock)
        voice = self._voice
        voice.unused, voice.fallback = state.told_unused, state.told_fallback
        voice.faults = set(state.told_faults)
        slot.activation = regrown.activation
        self.seed = seed
        if seed is None:
            return
        if regrown.module is None or regrown.blend is None:
            if not seed.trouble:
                self._arrival.begin(seed)
            return
        slot.attach(regrown.module, regrown.blend)
        slot.banned = regrown.banned
        if seed.kernel_ms == seed.kernel_ms:
            slot.latency_ms = seed.kernel_ms
        if regrown.stage not in ISOLATED:
            slot.mix(regrown.alpha)
        if seed.sane != seed.sane:  # a device had not said it yet
            self._arrival.examine(seed)
        self._joined = list(slot.parameters()) if regrown.back is not None else []
        self._arrival.compile(regrown.module)

    # Each step.

    def learn(self) -> None:
        """The host's optimizer has stepped: so does the seed's, and its gradients go."""
        seed = self.seed
        if seed is None:
            return
        if self._joined:
            # model.zero_grad() does not know of them.
            for parameter in self._joined:
                parameter.grad = None
        elif seed.optimizer is not None:
            training_steps = self._ground.settings.training_steps
            # Isolated, it is told where to go and never how far: its output changes no
            # loss. So it gets a number of lessons, however long it has to wait then.
            hold = self.stage in ISOLATED and seed.lessons >= training_steps
            # Gate G1 is asked at the end of this step, if it is the last of the dwell.
            training = self.stage is Stage.TRAINING
            measures = training and self.lifecycle.dwelt + 1 >= training_steps
            seed.learn(self._ground.read if measures else None, hold=hold)

    def tend(self, frozen: bool, sample: bool) -> list[float] | None:
        """End a step: look at what happened, go on where nothing is asked for that.

        Returns the seed's row, None when there is none. ``sample``: the next step takes
        isolation statistics.
        """
        lifecycle, seed = self.lifecycle, self.seed
        if seed is None:
            if lifecycle.stage is not Stage.DORMANT:
                self._lie_fallow(frozen)
            return None
        slot = self.slot
        self._arrival.look_for_kernel(seed)
        fell_back = bool(seed.trouble)
        if slot.calls or slot.fallback:
            fell_back = self._look_at_calls(seed) or fell_back
        if not frozen:
            lifecycle.pass_step()
            if lifecycle.stage is Stage.BLENDING:
                self._advance_alpha(seed)
        slot.turn(sample)
        return seed.row(lifecycle.stage, slot.alpha, slot.occupied, fell_back)

    def sight(self, frozen: bool) -> Sight:
        """What growth sees of the seed."""
        seed = self._live()
        operation = NEXT.get(self.stage)
        hopeless = self._hopelessness(seed)
        ready = False
        there = self.kernel_fetch is None
        if not hopeless and operation is not None and self._has_dwelt and there:
            ready = self._gates_open(seed, operation)
            if not frozen:
                seed.shut_steps = 0 if ready else seed.shut_steps + 1
        if not hopeless and seed.shut_steps > self._ground.settings.patience_steps:
            hopeless = next((why for why in seed.gates.values() if why), "")
        self.hopeless = hopeless
        return Sight(seed.id, operation, ready, hopeless, frozen)

    def tell_if_unused(self) -> None:
        """Say once that nothing can grow here."""
        slot = self.slot
        if slot.activation is None or slot.trouble:
            why = slot.trouble or f"slot {self.name!r} was not called in a whole step"
            self._voice.useless(self.seed, why)

    def tell_fault(self, what: str, error: Exception) -> None:
        """Say, once per seed, that something of this plot raised."""
        self._voice.fault(self.seed, what, error)

    @property
    def breaker_open(self) -> bool:
        """Whether the seed has to go at once: it keeps reaching the host it must not."""
        return self.seed is not None and self.seed.violations_in_a_row >= IN_A_ROW

    # Parts of them.

    @property
    def _has_dwelt(self) -> bool:
        seed = self.seed
        if seed is not None and self.stage is Stage.BLENDING and not _is_whole(seed):
            return False
        return self.lifecycle.dwelt >= dwell(self.stage, self._ground.settings)

    def _live(self) -> Seed:
        if self.seed is None:
            raise ValueError(f"slot {self.name!r} has no seed")
        return self.seed

    def _look_at_calls(self, seed: Seed) -> bool:
        """What the slot saw in this step; returns whether identity took its place."""
        slot, ground = self.slot, self._ground
        seed.kernel_ms = slot.latency_ms
        self._arrival.look_for_compiled(seed)
        failed = self._failure(seed)
        if failed:
            seed.faults_in_a_row += 1
            self._voice.fell_back(seed, failed)
        elif failed is not None:
            seed.faults_in_a_row = 0
        if slot.leaked:
            seed.violations += 1
            seed.violations_in_a_row += 1
            ground.violations += 1
            text = f"{seed.id} must be isolated and reached the host's gradients"
            self._voice.tell(
                seed, events.VIOLATION, Severity.HIGH, text, violations=seed.violations
            )
        else:
            seed.violations_in_a_row = 0
        try:
            statistics = slot.statistics()
            if statistics is not None:
                seed.told(statistics, ground.read)
        except Exception as error:
            self.tell_fault("isolation statistics", error)
        return bool(failed)

    def _failure(self, seed: Seed) -> str | None:
        """Why identity took the seed's place; empty: it did not, None: nobody knows yet.

        On a device a value that is not finite is known a step late or more, and until then
        nothing is.
        """
        slot = self.slot
        finite = slot.finite
        if finite is not None:
            seed.watch(self._ground.read(finite.float()))
        unsound = seed.was_unsound()
        if slot.fallback:
            return slot.fallback
        if unsound:
            return NOT_FINITE
        return None if unsound is None and finite is not None else ""

    def _advance_alpha(self, seed: Seed) -> None:
        if seed.course is not None and not _is_whole(seed):
            seed.alpha_steps += 1
            self.slot.mix(seed.course.alpha(seed.alpha_steps))

    def _gates_open(self, seed: Seed, operation: SeedOperation) -> bool:
        facts, limits = self._facts(seed), self._ground.limits
        is_open = True
        for name, gate in BEFORE[operation]:
            verdict = gate(facts, limits)
            is_open = is_open and verdict is PASSED
            self._voice.gate(seed, f"{name} before {operation.value}", verdict)
        return is_open

    def _facts(self, seed: Seed) -> Facts:
        ground = self._ground
        return Facts(
            attached=self.slot.occupied,
            trouble=seed.trouble or self.slot.fallback,
            finite=known(seed.sane) == 1.0,
            fits=self.slot.occupied and not self.slot.fallback,
            seed_norm=seed.norm,
            host_norm=ground.host_norm,
            kernel_ms=seed.kernel_ms,
            loss=ground.loss,
            loss_before=seed.loss_before,
            step_ms=ground.step_ms,
            step_ms_before=seed.step_ms_before,
        )

    def _hopelessness(self, seed: Seed) -> str:
        if seed.trouble:
            return seed.trouble
        if seed.faults_in_a_row >= IN_A_ROW:
            return f"its kernel failed {IN_A_ROW} steps in a row: {self._voice.fallback}"
        if self.stage in ISOLATED:
            return ""
        ground = self._ground
        verdict = loss_impact(self._facts(seed), ground.limits)
        seed.harmful_steps = 0 if verdict is PASSED else seed.harmful_steps + 1
        return str(verdict) if seed.harmful_steps >= HARM_IN_A_ROW else ""

    def _fossilize(self, seed: Seed) -> None:
        ground = self._ground
        host = ground.host()
        if ground.settings.fossils is Fossils.STAY or host is None or seed.optimizer is None:
            return
        optimizers.join(host, seed.optimizer)
        self._joined = list(self.slot.parameters())
        seed.optimizer = None

    def _lie_fallow(self, frozen: bool) -> None:
        lifecycle, embargo = self.lifecycle, self._embargo
        embargo.tick(frozen)
        if frozen:
            return
        lifecycle.pass_step()
        if lifecycle.stage is Stage.EMBARGOED:
            if lifecycle.dwelt < self._ground.settings.embargo_steps or not embargo.over:
                return
            self._move(Stage.RESETTING, "the embargo is over")
        if lifecycle.stage is not Stage.RESETTING:
            return
        held = self.slot.occupied or (self._ghost is not None and self._ghost() is not None)
        verdict = clean_reset(Facts(remnants=held), self._ground.limits)
        if isinstance(verdict, Failed):
            if lifecycle.dwelt == 1:
                self._voice.tell(None, events.GATE, Severity.WARNING, verdict.reason, gate="G5")
            return
        self._ghost = None
        self._move(Stage.DORMANT, "G5 passed")

    def _clear(self) -> None:
        self.slot.release()
        self._arrival.forget()
        self.seed = None
        self.hopeless = ""
        self._joined = []

    def _move(self, target: Stage, why: str) -> None:
        left = self.lifecycle.move(target)
        self._voice.moved(self.seed, left, target, why)


def _is_whole(seed: Seed) -> bool:
    """Whether its alpha has come to the end of its course."""
    return seed.course is None or seed.alpha_steps >= seed.course.steps
