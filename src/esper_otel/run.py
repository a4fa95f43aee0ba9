"""One instrumented training run: where recorder, stream, client and probes are put together."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

from esper_otel.leyline.decisions import Decision
from esper_otel.leyline.wire import default_socket_path
from esper_otel.ranks.world import is_shared, placed
from esper_otel.settings import EsperSettings, Mode, SettingsError, Summaries, new_run_id
from esper_otel.stream import Stream, StreamReport, is_disabled
from esper_otel.tamiyo.client import TamiyoClient
from esper_otel.tolaria.batches import samples_in
from esper_otel.tolaria.device_skips import release, withhold_unless_finite
from esper_otel.tolaria.devices import DeviceSampler
from esper_otel.tolaria.fetches import Names, Source
from esper_otel.tolaria.gradients import gradient_norm, is_sharded
from esper_otel.tolaria.ports import Settles
from esper_otel.tolaria.rate_factor import RateFactor
from esper_otel.tolaria.recorder import Recorder
from esper_otel.tolaria.responses import Responses
from esper_otel.tolaria.scalars import ScalarReader
from esper_otel.tolaria.step import PHASES

if TYPE_CHECKING:
    from esper_otel.kasmina.garden import Garden
    from esper_otel.ranks.agreement import Agreement
    from esper_otel.ranks.meeting import Meeting

log = logging.getLogger("esper_otel")
Batch = TypeVar("Batch")

STATE_VERSION = 1
"""Of what :meth:`Run.state_dict` gives."""

_runs: weakref.WeakSet[Run] = weakref.WeakSet()
_told: set[str] = set()
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Run:
    """A training run as it is recorded, streamed and decided about.

    Made by :func:`esper_otel.start` for a loop that is told so, or by the instrumentor for
    one that knows nothing of it. Nothing here raises because of what happens while training; a
    wrong *argument* does, at once.
    """

    def __init__(self, settings: EsperSettings) -> None:
        self.enabled = not is_disabled()
        """False under ``OTEL_SDK_DISABLED``: then nothing is recorded, sent or asked."""
        if self.enabled:
            settings = placed(settings)
        self.settings = settings
        self.run_id = settings.run_id or new_run_id()
        self.instance_id = secrets.token_hex(8)
        self.scalars = ScalarReader()
        self.names = Names()
        self.garden: Garden | None = None
        """The garden that was planted last."""
        self.outlives_script = False
        """Whether it is that of a process which is instrumented from outside."""
        self._preferred: weakref.ref[Any] | None = None
        self._withheld: Any = None
        """Tells on a device whether the update under way is left out there."""
        self._handles: list[Any] = []
        self._agreement: Agreement | None = None
        self._meeting: Meeting | None = None
        self._followed: weakref.ref[Any] | None = None
        self._report: StreamReport | None = None
        self._stream = Stream(settings, run_id=self.run_id, instance_id=self.instance_id)
        self._client = self._make_client()
        self._may_meet = settings.ranks_agree and self._client is not None
        self._devices = DeviceSampler(settings.tolaria_step_enrichment_enabled)
        self.responses = Responses(
            RateFactor(
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
            waits=settings.wait_for_decisions,
        )
        if settings.losses_are_shares:
            self.recorder.losses_are_shares()
        if not self.enabled:
            self.recorder.switch_off()
            return
        self._stream.start()
        self._devices.start()
        _runs.add(self)
        atexit.register(self.end)

    # What a loop calls.

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over ``loader``, timing the wait for each batch and counting its samples."""
        batches = iter(loader)
        source = Source(self.names.of(batches), self.names.of(loader))
        while True:
            asked_for = perf_counter_ns()
            try:
                batch = next(batches)
            except StopIteration:
                return
            try:
                self.recorder.batch_came(asked_for, samples_in(batch), source)
            except Exception:
                tell_once("a batch could not be counted")
            yield batch

    def report(self, loss: Any = None, **values: Any) -> None:
        """Tell what the loop knows of this step, before the optimizer steps.

        ``loss`` and ``values`` (``accuracy``, ``grad_conflict_rate``, ``gradient_norm``,
        ``samples_per_s``) are numbers or tensors of one element; a tensor on a device is
        read when it gets here, without waiting for it. Called once per micro-batch, the
        step's loss is their mean. A loop that clips its gradients tells their norm of
        before; without it the norm is that of what the optimizer is given. Raises
        ``ValueError`` for a name that is none of these.
        """
        begin = self.scalars.begin
        self.recorder.report(
            None if loss is None else begin(loss),
            {key: begin(value) for key, value in values.items()},
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step: ``forward``, ``backward`` or ``optimizer``.

        Raises ``ValueError`` for another name, before the block runs.
        """
        if name not in PHASES:
            raise ValueError(f"phase {name!r}: expected one of {', '.join(PHASES)}")
        began = perf_counter_ns()
        try:
            yield
        finally:
            self.recorder.phase(name, began, perf_counter_ns())

    def step(self) -> None:
        """End the step; for loops whose optimizer was not given to :func:`start`."""
        if self._may_meet:
            self._meet()
        self.recorder.end_step()

    def agree(self) -> bool:
        """Have all ranks of the run apply the same decisions at the same step.

        Rank 0 asks for all of them from here on, and what it is answered about a step is
        applied by every rank at the end of the next. Ranks that train together come to this
        by themselves some steps after the first (``ranks_agree``); calling it makes it so
        from here on. Each rank calls it, at the same place of the script and after
        ``torch.distributed.init_process_group``; :meth:`plant` does so itself. Returns
        whether there is more than one. Raises ``CircleError``, a ``RuntimeError``, when they
        do not come within ``ranks_timeout_s``.
        """
        if not self.enabled or not is_shared():
            return False
        from esper_otel.ranks.agreement import Agreement
        from esper_otel.ranks.circle import join

        self._may_meet = False
        if self._agreement is None and self._meeting is not None:
            # All ranks are at the same step, so either all have come to one or none has.
            self._agreement = self._meeting.end()
        if self._agreement is None:
            circle = join(self.settings.ranks_timeout_s)
            self._agreement = Agreement(circle, self.run_id)
            self._settle_by(self._agreement, leads=circle.leads)
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

        if self.garden is not None and not self.garden.closed:
            raise GardenError("this run has a garden: uproot() it before another is planted")
        plant: Callable[..., Garden] = Garden
        self.agree()
        self.recorder.collect()  # ranks do all that they do together in the same order
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
        followed = None if self._followed is None else self._followed()
        if followed is not None:
            self.garden.follow(followed)
        self.recorder.tend(self.garden)
        return self.garden

    # A restart.

    def state_dict(self) -> dict[str, Any]:
        """What decisions hold, and what coming records depend on: plain data.

        For a checkpoint, beside those of model and optimizer; a garden has its own
        (:meth:`Garden.state_dict`). The adapters of Lightning, Transformers and Accelerate
        put it into the framework's own checkpoints.
        """
        return {
            "version": STATE_VERSION,
            "recorder": self.recorder.state(),
            "rate": self.responses.rate.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called.

        Steps are counted on, and a factor that was in force on the learning rates is in force
        again (in ``enforce``). Raises ``ValueError`` for what is no such state, which then
        changes nothing.
        """
        parts = dict(state) if isinstance(state, Mapping) else {}
        if parts.get("version") != STATE_VERSION:
            raise ValueError(
                f"state of a run: version {parts.get('version')!r}, expected {STATE_VERSION}"
            )
        rate = self.responses.rate
        before = rate.state()
        try:
            rate.resume(parts.get("rate") or {})
            self.recorder.resume(parts.get("recorder") or {})
        except ValueError as error:
            rate.resume(before)
            raise ValueError(f"state of a run: {error}") from None

    def restore(self, state: Mapping[str, Any]) -> None:
        """As :meth:`load_state_dict`, for adapters: what cannot be used is reported, once."""
        try:
            self.load_state_dict(state)
        except ValueError as error:
            tell_once(f"esper-otel: a checkpoint's state of the run is not used: {error}")

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
        """Send what is unsent, for at most ``timeout_s`` (default: the setting), and stop.

        A process that was instrumented from outside (``esper-otel run``) goes on being
        recorded: then this lets go of the script's optimizer and garden, and no more.
        """
        return self._let_go() if self.outlives_script else self.end(timeout_s)

    def end(self, timeout_s: float | None = None) -> StreamReport:
        """What :meth:`close` does for a run that nobody but the script began.

        In a forked child there is nothing to send: the run is its parent's.
        """
        if self._report is not None:
            return self._report
        atexit.unregister(self.end)
        _runs.discard(self)
        for end in self._ends():
            try:
                end()
            except Exception:
                # Whatever it is, what was recorded is still sent.
                log.warning("a part of the run could not be ended", exc_info=True)
        self._report = self._stream.close(timeout_s)
        self._summarise(self._report)
        return self._report

    def _ends(self) -> Iterator[Callable[[], Any]]:
        """What ends each part of the run but the stream, in order."""
        for handle in self._handles:
            yield handle.remove
        yield self.recorder.updates.close
        if self.garden is not None:
            yield self.garden.close
        yield self._devices.stop
        yield self.recorder.finish
        yield self.recorder.switch_off
        yield self._end_agreement
        if self._client is not None:
            yield self._client.close

    def _end_agreement(self) -> None:
        agreement = self._agreement
        if agreement is None and self._meeting is not None:
            agreement = self._meeting.end()
        if agreement is not None:
            agreement.close()

    # What optimizers call, of this loop or of any.

    def follow(self, optimizer: Any) -> None:
        """Take the steps of ``optimizer`` (a ``torch.optim.Optimizer``) for the run's steps."""
        # With torch, which not every process that imports this module has.
        from esper_otel.tolaria.step_hooks import StepHooks

        self._followed = weakref.ref(optimizer)
        if not self.enabled:
            return
        hooks = StepHooks(self.optimizer_begins, self.optimizer_ended)
        self._handles += hooks.register(optimizer)

    def watch_others(self) -> None:
        """Scale the rates of the loop's other optimizers as well, those of seeds excepted."""
        from esper_otel.tolaria.step_hooks import StepHooks

        hooks = StepHooks(self._other_begins, self._other_ended)
        self._handles += hooks.register_for_all()

    def prefer(self, optimizer: Any) -> None:
        """Of all optimizers that step in this process, ``optimizer`` sets the run's steps.

        None takes that back: then the run chooses.
        """
        self._preferred = None if optimizer is None else weakref.ref(optimizer)

    @property
    def preferred(self) -> Any:
        """The optimizer last named to :meth:`prefer`, None when it is gone."""
        return None if self._preferred is None else self._preferred()

    def optimizer_begins(
        self, optimizer: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = _NOTHING
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        """``optimizer`` is about to step: measure its gradients unless they have been.

        ``args`` and ``kwargs`` are what its ``step`` was called with, as hooks get them;
        returns those it is to be called with instead, if any. A closure makes the gradients
        within the step, so then they are measured after it.
        """
        recorder = self.recorder
        if _has_closure(args, kwargs):
            recorder.closure_begins(optimizer)
            return self.with_own_rates(optimizer, args, kwargs)
        began = perf_counter_ns()
        norm = self._norm_of(optimizer) if recorder.wants_norm else None
        recorder.optimizer_begins(began, norm, optimizer)
        return None

    def with_own_rates(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        """Arguments of ``step`` whose closure sees the script's own rates.

        None where there is no closure, or nothing is scaled.
        """
        if not _has_closure(args, kwargs):
            return None
        positional = len(args) > 1
        closure = args[1] if positional else kwargs["closure"]
        own = self.recorder.updates.with_own_rates(optimizer, closure)
        if own is closure:
            return None
        if positional:
            return (args[0], own, *args[2:]), kwargs
        return args, {**kwargs, "closure": own}

    def measure(self, optimizer: Any) -> None:
        """``optimizer`` has stepped within backward: measure the gradients that are left."""
        recorder = self.recorder
        began = perf_counter_ns()
        norm = self._norm_of(optimizer) if recorder.wants_norm else None
        recorder.optimizer_begins(began, norm)

    def optimizer_ended(
        self, optimizer: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = _NOTHING
    ) -> None:
        """``optimizer`` has stepped, and so has the run, unless it saw an overflow."""
        recorder = self.recorder
        ended = recorder.optimizer_ends(optimizer)
        if self._withheld is not None:
            self._report_withheld(optimizer)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and self._skipped(found_inf):
            return
        if recorder.wants_norm and _has_closure(args, kwargs):
            ended = recorder.measured(self._norm_of(optimizer))
        if self._may_meet:
            self._meet()
        recorder.optimizer = optimizer
        recorder.end_step(ended)
        recorder.optimizer = None  # its owner, not this, decides how long it lives

    def _other_begins(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if not self._is_of_this_loop(optimizer):
            return None
        self.recorder.other_begins(optimizer)
        return self.with_own_rates(optimizer, args, kwargs)

    def _other_ended(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._followed is None or self._followed() is not optimizer:
            self.recorder.updates.end(optimizer)

    def _is_of_this_loop(self, optimizer: Any) -> bool:
        """Whether ``optimizer`` belongs here besides the one that sets the steps.

        So it does where this is the only run: of several, nobody can tell whose it is.
        """
        alone = all(other is self for other in _runs)
        followed = None if self._followed is None else self._followed()
        return alone and optimizer is not followed and not self.owns(optimizer)

    def norm_on_device(self, optimizer: Any, norm: Any) -> None:
        """``norm``, of all gradients of ``optimizer``, lies on a device and is not known yet.

        If it is not finite, the update is left out there where the sidecar has allowed that:
        nobody can ask about it in time.
        """
        if self.recorder.skips_nonfinite:
            self._withheld = withhold_unless_finite(optimizer, norm)

    def _report_withheld(self, optimizer: Any) -> None:
        found, self._withheld = self._withheld, None
        release(optimizer, found)
        self.recorder.update_skipped(self.scalars.begin(found))

    def _skipped(self, found_inf: Any) -> bool:
        """Whether an optimizer that a GradScaler has told ``found_inf`` left its step out.

        Fused ones are called in any case, and decide that in their kernel.
        """
        skipped = self.scalars.begin(found_inf)
        if not isinstance(skipped, float):
            self.recorder.may_be_skipped(skipped)  # nobody waits for a device
            return False
        if skipped:
            self.recorder.skipped()
        return bool(skipped)

    def gives_way_to(self, optimizer: Any) -> bool:
        """Whether ``start(optimizer)`` begins anew what this run was about.

        So it is for the same optimizer, for any when this run's is gone, and for none when
        this run never had one.
        """
        if self._followed is None:
            return optimizer is None
        followed = self._followed()
        return followed is None or followed is optimizer

    def _let_go(self) -> StreamReport:
        self.prefer(None)
        if self.garden is not None:
            self.garden.close()
            self.recorder.tend(None)
            if self._agreement is not None:
                self._agreement.shared = None
        return self.stream_report

    def _norm_of(self, optimizer: Any) -> Any:
        try:
            tensor = gradient_norm(
                p for group in optimizer.param_groups for p in group["params"]
            )
            if tensor is None:
                self._tell_of_shards(optimizer)
                return None
            # A fused optimizer under a GradScaler gets scaled gradients, and the scale.
            scale = getattr(optimizer, "grad_scale", None)
            if scale is not None:
                tensor = tensor / scale
            if tensor.device.type == "cuda":
                self._devices.watch(tensor.device.index)
                self.norm_on_device(optimizer, tensor)
            return self.scalars.begin(tensor)
        except Exception:
            tell_once("the gradient norm could not be taken")
            return None

    def _tell_of_shards(self, optimizer: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        if self.settings.rank == 0 and any(map(is_sharded, parameters)):
            tell_once(
                "the gradients are sharded over ranks, and their norm would take a "
                "collective: gradient_norm is left out of steps that do not clip them"
            )

    def _meet(self) -> None:
        """At the end of the first step: come to agree with the other ranks, if there are."""
        if not is_shared():
            # Ranks that are told of in the environment may yet form a group.
            self._may_meet = self.settings.world_size > 1
            return
        self._may_meet = False
        try:
            from esper_otel.ranks.meeting import Meeting

            settings = self.settings
            alike = (
                settings.mode,
                settings.lr_scale_min,
                settings.lr_scale_max,
                settings.release_steps,
            )
            self._meeting = Meeting(
                self.run_id,
                alike=crc32(repr(alike).encode()),
                timeout_s=settings.ranks_timeout_s,
            )
            self._settle_by(self._meeting, leads=self._meeting.leads)
        except Exception:
            tell_once("the ranks of this run cannot agree")

    def _settle_by(self, settles: Settles, *, leads: bool) -> None:
        self.recorder.agree(settles, asks=leads)
        if not leads and self._client is not None:
            self._client.close()

    def _summarise(self, report: StreamReport) -> None:
        settings, tally = self.settings, getattr(self._stream, "tally", None)
        if settings.summary is Summaries.OFF or settings.rank or not tally or not tally.steps:
            return
        try:
            from esper_otel.summary import summary_of  # with numpy, which a run has by now

            summary = summary_of(self.run_id, settings.rank, tally, report)
            as_json = settings.summary is Summaries.JSON
            print(
                summary.as_json() if as_json else summary.as_text(), file=sys.stderr, flush=True
            )
        except (OSError, ValueError):
            pass  # nobody reads any more

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


def _has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``step(*args, **kwargs)``, its optimizer first, was given a closure."""
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None


def tell_once(message: str) -> None:
    """Warn of something that may happen at every step, once per process."""
    if message not in _told:
        _told.add(message)
        log.warning(message, exc_info=sys.exc_info()[1] is not None)


def _switch_off_in_child() -> None:
    for run in list(_runs):
        run.recorder.switch_off()
        run._report = StreamReport()  # it is closed here, and only its parent tells of it


os.register_at_fork(after_in_child=_switch_off_in_child)
