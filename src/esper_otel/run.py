"""One instrumented training run: where recorder, stream, client and probes are put together."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeVar

from esper_otel.leyline.decisions import Decision
from esper_otel.leyline.wire import default_socket_path
from esper_otel.settings import EsperSettings, Mode, SettingsError
from esper_otel.stream import Stream, StreamReport, is_disabled
from esper_otel.tamiyo.client import TamiyoClient
from esper_otel.tolaria.batches import samples_in
from esper_otel.tolaria.devices import DeviceSampler
from esper_otel.tolaria.gradients import gradient_norm
from esper_otel.tolaria.recorder import Recorder
from esper_otel.tolaria.responses import LearningRate, Responses
from esper_otel.tolaria.scalars import ScalarReader

if TYPE_CHECKING:
    from esper_otel.kasmina.garden import Garden
    from esper_otel.ranks.agreement import Agreement

log = logging.getLogger("esper_otel")
Batch = TypeVar("Batch")

_runs: weakref.WeakSet[Run] = weakref.WeakSet()
_automatic: Run | None = None
_told: set[str] = set()


class Run:
    """A training run as it is recorded, streamed and decided about.

    Made by :func:`start` for a loop that is told so, or by the instrumentor for one that
    knows nothing of it. Nothing here raises because of what happens while training; a
    wrong *argument* does, at once.
    """

    def __init__(self, settings: EsperSettings) -> None:
        self.settings = settings
        self.enabled = not is_disabled()
        """False under ``OTEL_SDK_DISABLED``: then nothing is recorded, sent or asked."""
        self.run_id = settings.run_id or _new_run_id()
        self.instance_id = secrets.token_hex(8)
        self.scalars = ScalarReader()
        self.garden: Garden | None = None
        """The garden that was planted last."""
        self._handles: list[Any] = []
        self._agreement: Agreement | None = None
        self._followed: Callable[[], Any] = lambda: None
        self._report: StreamReport | None = None
        self._stream = Stream(settings, run_id=self.run_id, instance_id=self.instance_id)
        self._client = self._make_client()
        self._devices = DeviceSampler(settings.tolaria_step_enrichment_enabled)
        self.responses = Responses(
            LearningRate(
                minimum=settings.lr_scale_min,
                maximum=settings.lr_scale_max,
                release_steps=settings.release_steps,
            ),
            enforce=settings.mode is Mode.ENFORCE,
        )
        self.recorder = Recorder(
            self._stream,
            run=self.run_id,
            responses=self.responses,
            client=self._client,
            enriched=settings.tolaria_step_enrichment_enabled,
            device_values=lambda: self._devices.latest,
            span_every=settings.span_every,
            span_slow_factor=settings.span_slow_factor,
        )
        if not self.enabled:
            self.recorder.switch_off()
            return
        self._stream.start()
        self._devices.start()
        _runs.add(self)
        atexit.register(self.close)

    # What a loop calls.

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over ``loader``, timing the wait for each batch and counting its samples."""
        batches = iter(loader)
        while True:
            asked_for = perf_counter_ns()
            try:
                batch = next(batches)
            except StopIteration:
                return
            try:
                self.recorder.batch_came(asked_for, samples_in(batch))
            except Exception:
                tell_once("a batch could not be counted")
            yield batch

    def report(self, loss: Any = None, **values: Any) -> None:
        """Tell what the loop knows of this step, before the optimizer steps.

        ``loss`` and ``values`` (``accuracy``, ``grad_conflict_rate``, ``gradient_norm``,
        ``samples_per_s``) are numbers or tensors of one element; a tensor on a device is
        read when it gets here, without waiting for it. Called once per micro-batch, the
        step's loss is their mean. Raises ``ValueError`` for a name that is none of these.
        """
        begin = self.scalars.begin
        self.recorder.report(
            None if loss is None else begin(loss),
            {key: begin(value) for key, value in values.items()},
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step: ``forward``, ``backward`` or ``optimizer``."""
        began = perf_counter_ns()
        try:
            yield
        finally:
            self.recorder.phase(name, began, perf_counter_ns())

    def step(self) -> None:
        """End the step; for loops whose optimizer was not given to :func:`start`."""
        self.recorder.end_step()

    def agree(self) -> bool:
        """Have all ranks of the run apply the same decisions at the same step.

        Rank 0 asks for all of them from here on, and what it is answered about a step is
        applied by every rank at the end of the next. Each rank calls this, at the same place
        of the script and after ``torch.distributed.init_process_group``; :meth:`plant` does
        so itself. Returns whether there is more than one. Raises ``CircleError``, a
        ``RuntimeError``, when they do not come within ``ranks_timeout_s``.
        """
        from esper_otel.ranks.agreement import Agreement
        from esper_otel.ranks.circle import is_shared, join

        if not self.enabled or not is_shared():
            return False
        if self._agreement is None:
            circle = join(self.settings.ranks_timeout_s)
            self._agreement = Agreement(circle, self.run_id)
            self.recorder.agree(self._agreement, asks=circle.leads)
            if not circle.leads and self._client is not None:
                self._client.close()
        return True

    def plant(
        self,
        model: Any,
        slots: Iterable[str],
        *,
        optimizer: Any = None,
        make_optimizer: Callable[..., Any] | None = None,
        blueprints: Iterable[str] | None = None,
        compiler: Callable[..., Any] | None = None,
        scaler: Any = None,
        **settings: Any,
    ) -> Garden:
        """Let seeds grow in ``model`` at the submodules called ``slots``.

        ``optimizer`` is the host's, by default the one whose steps are the run's.
        ``make_optimizer``, called with (parameters, learning rate), makes that of a seed;
        ``blueprints`` are those the garden germinates of its own accord. ``scaler`` is the
        ``torch.amp.GradScaler`` of a loop that scales its loss. ``settings`` are
        fields of :class:`EsperSettings` that are about seeds.

        In a run of several ranks (``torch.distributed``) every rank plants, at the same
        place of the script: they meet here, for at most ``ranks_timeout_s``.

        Raises ``GardenError`` for slots that cannot be and while another garden is planted,
        ``KeyError`` for an unknown blueprint, :class:`SettingsError` for a setting, and
        what :meth:`agree` raises.
        """
        # With torch, which not every process that imports this module has.
        from esper_otel.kasmina.garden import Garden, GardenError
        from esper_otel.kasmina.optimizers import adamw

        if self.garden is not None and self.garden.planted:
            raise GardenError("this run has a garden: uproot() it before another is planted")
        plant: Callable[..., Garden] = Garden
        self.agree()
        if self._agreement is not None:
            from esper_otel.ranks.shared_garden import SharedGarden

            plant = partial(SharedGarden, agreement=self._agreement)
        self.garden = plant(
            model,
            slots,
            settings=self.settings.changed(**settings),
            optimizer=optimizer,
            make_optimizer=make_optimizer or adamw,
            blueprints=blueprints,
            read=self.scalars.begin,
            compiler=compiler,
            scaler=scaler,
            memory=self.recorder,
        )
        followed = self._followed()
        if followed is not None:
            self.garden.follow(followed)
        self.recorder.tend(self.garden)
        return self.garden

    def owns(self, optimizer: Any) -> bool:
        """Whether ``optimizer`` trains a seed of this run: then its steps are not the run's."""
        return self.garden is not None and self.garden.owns(optimizer)

    def on_pause(self, freeze: Callable[[Decision], None]) -> None:
        """Have ``freeze`` called with every PAUSE decision that is enforced."""
        self.responses.on_pause(freeze)

    @property
    def decision(self) -> Decision:
        """The newest decision."""
        return self.recorder.decision

    @property
    def stream_report(self) -> StreamReport:
        """What became of the telemetry so far."""
        return self._report or self._stream.report()

    def close(self, timeout_s: float | None = None) -> StreamReport:
        """Send what is unsent, for at most ``timeout_s`` (default: the setting), and stop."""
        if self._report is not None:
            return self._report
        atexit.unregister(self.close)
        _runs.discard(self)
        for handle in self._handles:
            handle.remove()
        if self.garden is not None:
            self.garden.close()
        self._devices.stop()
        self.recorder.finish()
        self.recorder.switch_off()
        if self._agreement is not None:
            self._agreement.close()
        if self._client is not None:
            self._client.close()
        self._report = self._stream.close(timeout_s)
        return self._report

    # What optimizers call, of this loop or of any.

    def follow(self, optimizer: Any) -> None:
        """Take the steps of ``optimizer`` (a ``torch.optim.Optimizer``) for the run's steps."""
        self._followed = weakref.ref(optimizer)
        self._handles += [
            optimizer.register_step_pre_hook(lambda one, *_: self.optimizer_begins(one)),
            optimizer.register_step_post_hook(lambda one, *_: self.optimizer_ended(one)),
        ]

    def optimizer_begins(self, optimizer: Any) -> None:
        """``optimizer`` is about to step: measure its gradients unless they have been."""
        recorder = self.recorder
        began = perf_counter_ns()
        norm = None
        if recorder.wants_norm:
            try:
                tensor = gradient_norm(
                    p for group in optimizer.param_groups for p in group["params"]
                )
                if tensor is not None:
                    norm = self.scalars.begin(tensor)
                    if tensor.device.type == "cuda":
                        self._devices.watch(tensor.device.index)
            except Exception:
                tell_once("the gradient norm could not be taken")
        recorder.optimizer_begins(began, norm)

    def optimizer_ended(self, optimizer: Any) -> None:
        """``optimizer`` has stepped, and so has the run."""
        recorder = self.recorder
        ended = recorder.optimizer_ends()
        recorder.optimizer = optimizer
        recorder.end_step(ended)
        recorder.optimizer = None  # its owner, not this, decides how long it lives

    def _make_client(self) -> TamiyoClient | None:
        settings = self.settings
        if settings.mode is Mode.OFF or not self.enabled:
            return None
        path = Path(settings.tamiyo_socket) if settings.tamiyo_socket else default_socket_path()
        try:
            return TamiyoClient(
                path,
                run=self.run_id,
                instance=self.instance_id,
                rank=settings.rank,
                world_size=settings.world_size,
                deadline_ms=settings.tamiyo_deadline_ms,
                mode=settings.mode.value,
            )
        except ValueError as error:
            raise SettingsError(f"tamiyo_socket: {error}") from None


def start(optimizer: Any = None, **settings: Any) -> Run:
    """Begin to record this process's training loop.

    ``optimizer`` is the one whose steps are the run's; without one the loop calls
    :meth:`Run.step` itself. ``settings`` are fields of :class:`EsperSettings` and win
    over the environment; raises :class:`SettingsError` for one that cannot be used.
    Decisions are enforced unless the settings say otherwise: who writes this line has
    asked for them.

    When the process is already instrumented (``esper-otel run``) its run is returned, so
    that steps go on being counted once.
    """
    if _automatic is not None:
        tell_once("this process is instrumented already: start() gives back that run")
        return _automatic
    if not os.environ.get("ESPER_MODE"):
        settings.setdefault("mode", Mode.ENFORCE)
    run = Run(EsperSettings.from_environment(**settings))
    if optimizer is not None:
        run.follow(optimizer)
    return run


def start_automatic(**settings: Any) -> Run:
    """The run of a process that is instrumented from outside; at most one at a time."""
    global _automatic
    if _automatic is None:
        _automatic = Run(EsperSettings.from_environment(**settings))
    return _automatic


def end_automatic() -> None:
    """End what :func:`start_automatic` began, if it did."""
    global _automatic
    if _automatic is not None:
        _automatic.close()
        _automatic = None


def _new_run_id() -> str:
    # Readable, sortable, and not from the global random state.
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)


def tell_once(message: str) -> None:
    """Warn of something that may happen at every step, once per process."""
    if message not in _told:
        _told.add(message)
        log.warning(message, exc_info=sys.exc_info()[1] is not None)


def _switch_off_in_child() -> None:
    global _automatic
    for run in list(_runs):
        run.recorder.switch_off()
    _automatic = None


os.register_at_fork(after_in_child=_switch_off_in_child)
