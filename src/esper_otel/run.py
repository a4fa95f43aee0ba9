"""The run: the interface of a training loop, which joins recorder, stream, client and
probes."""

from __future__ import annotations

import atexit
import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from esper_otel.display import DisplayedRun
from esper_otel.final_report import FinalReport
from esper_otel.goodbye import Closing, Ending, LastWords, leave_exits, watch_exits
from esper_otel.leyline.decisions import Decision
from esper_otel.leyline.faults import alone, end_each
from esper_otel.loop import LoopCalls, LoopObserver
from esper_otel.ranks.world import new_run_id, with_identity
from esper_otel.settings import EsperSettings
from esper_otel.shared_decisions import SharedDecisions, client_of, responses_of
from esper_otel.stream import Stream, StreamReport, is_disabled
from esper_otel.tolaria.devices import DeviceSampler
from esper_otel.tolaria.ports import HeldRun
from esper_otel.tolaria.recorder import Recorder

if TYPE_CHECKING:
    from esper_otel.integrations.jobs import Jobs
    from esper_otel.kasmina.garden import Garden
    from esper_otel.tamiyo.client import TamiyoClient

STATE_VERSION = 1
"""Version of the result of :meth:`Run.state_dict`."""

_runs: weakref.WeakSet[Run] = weakref.WeakSet()


class Run(LoopCalls, Closing, DisplayedRun):
    """A training run: recorded, streamed, and subject to decisions.

    :func:`esper_otel.start` makes one; so does ``esper-otel run`` for an unchanged script. No
    method raises because of an event during training; a wrong *argument* raises at once. Call
    the methods from the training thread.
    """

    def __init__(
        self,
        settings: EsperSettings,
        *,
        outlives_script: bool = False,
        beside: Run | None = None,
        held: HeldRun | None = None,
    ) -> None:
        """``beside``: the process's run, whose delivery and probes this one shares.

        ``held``: keeps telemetry and decision requests until :meth:`_begin`.
        """
        self.enabled = not is_disabled()
        """False under ``OTEL_SDK_DISABLED``: then nothing is recorded, sent or requested."""
        if self.enabled:
            settings = with_identity(settings)
        self._final_report = FinalReport(settings)
        if self.enabled and beside is None:
            settings = self._final_report.recorded(settings)
        self.settings = settings
        """The settings in force, rank, world size and name of the run filled in."""
        self.run_id = settings.run_id or new_run_id()
        """Name of the run, the same on all its ranks."""
        self.instance_id = secrets.token_hex(8)
        """Unique id of this process; a restarted process has another one."""
        self.garden: Garden | None = None
        """The garden that was planted last."""
        self._jobs: Jobs | None = None
        self._beside = beside
        self._held = held
        self._outlives_script = outlives_script
        self._finished = False
        self._report: StreamReport | None = None
        self._stream: Stream = Stream(
            settings,
            run_id=self.run_id,
            instance_id=self.instance_id,
            beside=None if beside is None else beside._stream,
        )
        self._client = self._new_client() if self.enabled and held is None else None
        enriched = settings.tolaria_step_enrichment_enabled
        self._devices: DeviceSampler = (
            beside._devices
            if beside
            else alone("the device probes", lambda: DeviceSampler(enriched))
            or DeviceSampler(False, probes=())
        )
        self._responses = responses_of(settings)
        self._recorder = Recorder(
            held or self._stream,
            run=self.run_id,
            responses=self._responses,
            client=held or self._client,
            enriched=enriched,
            device_values=self._devices.fresh_values,
            span_every=settings.span_every,
            span_slow_factor=settings.span_slow_factor,
            waits=settings.wait_for_decisions,
        )
        if settings.losses_prescaled:
            self._recorder.losses_prescaled()
        self._goodbye = LastWords(self)
        self._sharing = SharedDecisions(self._recorder, self._client, settings, self.run_id)
        self._loop = LoopObserver(
            self._recorder,
            self._devices,
            self._sharing,
            is_seed_optimizer=self._is_seed_optimizer,
            enabled=self.enabled,
            tells_shards=settings.rank == 0,
        )
        if not self.enabled:
            self._recorder.switch_off()
            return
        _runs.add(self)
        if held is None:
            self._begin()

    def _begin(self) -> None:
        """Begin to send telemetry and decision requests."""
        self._start_stream()
        if self._beside is None:
            alone("the device probes", self._devices.start)
            atexit.register(self._end_at_exit)
            watch_exits()
        held, self._held = self._held, None
        if held is not None:
            self._client = self._new_client()
            held.release(self._stream, self._client)
            self._recorder.set_client(self._client)
            self._sharing.set_client(self._client)
        self._recorder.defer_to(self._stream)

    def _new_client(self) -> TamiyoClient | None:
        return client_of(self.settings, self.run_id, self.instance_id)

    # Ranks, and seeds.

    def agree(self) -> bool:
        """Synchronise decisions: all ranks of the run apply the same ones at the same step.

        From here on rank 0 sends the decision requests for all ranks, and every rank applies
        the answer about a step at the end of the next. Ranks that train together do this
        automatically some steps after the first (``ranks_agree``); this call starts it at
        once. Each rank calls it, at the same place of the script and after
        ``torch.distributed.init_process_group``; :meth:`plant` does so itself. Returns
        whether there is more than one rank. Raises :class:`esper_otel.ProcessGroupError` if
        not all ranks connect within ``ranks_timeout_s`` seconds.
        """
        return self.enabled and self._sharing.agree()

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

        ``optimizer`` is the host's, by default the one that defines the run's steps.
        ``make_optimizer``, called with (parameters, learning rate), makes that of a seed;
        ``blueprints`` are those that the garden germinates on its own. ``scaler`` is the
        ``torch.amp.GradScaler`` of a loop that scales its loss. ``settings`` are
        fields of :class:`EsperSettings` about seeds.

        In a run of several ranks (``torch.distributed``) every rank plants, at the same
        place of the script: they wait for each other here, for at most ``ranks_timeout_s``.

        Raises :class:`esper_otel.GardenError` for impossible slots and while another garden
        is planted, ``KeyError`` for an unknown blueprint, :class:`esper_otel.SettingsError` for
        a setting, and the errors of :meth:`agree`::

            garden = run.plant(model, ["layer2"], growth="autonomous")
        """
        # With torch, which not every process that imports this module has.
        from esper_otel.kasmina.garden import Garden, GardenError
        from esper_otel.kasmina.host import adamw

        if self.garden is not None and not self.garden.closed:
            raise GardenError("this run has a garden: uproot() it before another is planted")
        plant: Callable[..., Garden] = Garden
        self.agree()
        self._recorder.collect()  # ranks do all that they do together in the same order
        if self._sharing.agreement is not None:
            from esper_otel.ranks.shared_garden import SharedGarden

            plant = partial(SharedGarden, agreement=self._sharing.agreement)
        self.garden = plant(
            model,
            slots,
            settings=self.settings.changed(**settings),
            optimizer=optimizer,
            make_optimizer=make_optimizer or adamw,
            blueprints=blueprints,
            read=self._loop.scalars.read_async,
            compiler=compiler,
            scaler=scaler,
            recorder=self._recorder,
        )
        followed = self._loop.followed
        if followed is not None:
            self.garden.set_host_optimizer(followed)
        self._recorder.attach_garden(self.garden)
        return self.garden

    def protect(self, *modules: Any) -> None:
        """Include all parameters and buffers of ``modules`` in snapshots (``snapshot_every``).

        Snapshots always include the parameters that optimizers update, and the optimizers'
        state; without this call also the persistent buffers of their modules. Raises
        ``TypeError`` if an argument is not a ``torch.nn.Module``::

            run.protect(model, average_of_model)
        """
        for module in modules:
            if not hasattr(module, "named_buffers"):
                raise TypeError(f"protect: expected modules, got {type(module).__name__}")
            self._responses.restoring.protected.add_module(module, whole=True)

    # A restart.

    def state_dict(self) -> dict[str, Any]:
        """The factor in force and the recorder's state, as plain data.

        For a checkpoint, beside those of model and optimizer; a garden has its own
        (:meth:`Garden.state_dict`). The adapters of Lightning, Transformers and Accelerate
        put it into the framework's own checkpoints::

            torch.save({"model": model.state_dict(), "esper": run.state_dict()}, path)
        """
        return {
            "version": STATE_VERSION,
            "recorder": self._recorder.state_dict(),
            "rate": self._responses.rate.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the call of :meth:`state_dict`.

        The step count continues, and a factor that was in force on the learning rates is in
        force again (in ``enforce``). Raises ``ValueError`` for an invalid state, and then
        changes nothing.
        """
        parts = dict(state) if isinstance(state, Mapping) else {}
        if parts.get("version") != STATE_VERSION:
            raise ValueError(
                f"state of a run: version {parts.get('version')!r}, expected {STATE_VERSION}"
            )
        rate = self._responses.rate
        before = rate.state_dict()
        try:
            rate.load_state_dict(parts.get("rate") or {})
            self._recorder.load_state_dict(parts.get("recorder") or {})
        except (TypeError, ValueError) as error:
            rate.load_state_dict(before)
            raise ValueError(f"state of a run: {error}") from None

    def on_pause(self, freeze: Callable[[Decision], None]) -> None:
        """Call ``freeze`` with every enforced PAUSE decision.

        It runs on the training thread, between two updates; its exceptions are logged, and the
        run continues::

            run.on_pause(lambda decision: print(decision.reason))
        """
        self._responses.on_pause(freeze)

    @property
    def decision(self) -> Decision:
        """The newest decision, which need not be about the newest step."""
        return self._recorder.decision

    @property
    def enforcing(self) -> bool:
        """Whether decisions are applied (mode ``enforce``), and not only reported."""
        return self._responses.enforcing

    @property
    def stream_report(self) -> StreamReport:
        """The telemetry so far: produced, delivered, spooled and dropped."""
        return self._report or self._stream.snapshot()

    def close(
        self, timeout_s: float | None = None, *, error: BaseException | None = None
    ) -> StreamReport:
        """Send unsent telemetry, and stop; returns the account of the telemetry.

        ``timeout_s`` bounds the time, in seconds (default: ``flush_timeout_s``); the rest is
        left in files for ``esper-otel resend``. Further calls, and the end of the process, do
        nothing more. The run reports how it ended: by ``error``, by the exception that is
        passing or handled, or well. ``with`` calls this method.

        Under ``esper-otel run`` recording of the process continues: then this only releases
        the script's optimizer and garden.
        """
        end = self._goodbye.at_hand(error)
        return self._let_go(end) if self._outlives_script else self._end(timeout_s, end)

    def _end_at_exit(self) -> None:
        self._end(end=self._goodbye.at_exit())

    def _end(self, timeout_s: float | None = None, end: Ending = None) -> StreamReport:
        """What :meth:`close` does for a run that nobody but the script began.

        In a forked child there is nothing to send: the run is its parent's. ``end`` None:
        nobody is told how it ended.
        """
        if self._report is not None:
            return self._report
        if self._jobs is not None and self._beside is None:
            end = alone("the trainings of this process", partial(self._jobs.close, end))
        atexit.unregister(self._end_at_exit)
        _runs.discard(self)
        if not _runs:
            leave_exits()
        self._finish(end)
        if self._beside is None:
            end_each([self._devices.stop])
        self._report = self._stream.close(timeout_s)
        if self._beside is None:
            end_each([partial(self._tell_summary, self._report)])
        return self._report

    def _finish(self, end: Ending) -> None:
        """The training is over: what it has recorded is still to be sent. Once."""
        if not self._finished:
            self._finished = True
            end_each(self._ends(end))

    def _ends(self, end: Ending) -> Iterator[Callable[[], Any]]:
        """What ends each part of the run but the stream, in order."""
        yield self._loop.close
        yield self._recorder.control.updates.close
        if self.garden is not None:
            yield self.garden.close
        yield self._recorder.flush
        yield self._recorder.switch_off
        yield self._sharing.close
        yield partial(self._goodbye.say, end)
        if self._client is not None:
            yield self._client.close

    def _tell_summary(self, report: StreamReport) -> None:
        from esper_otel.summary import tell_summary

        page, report = self._final_report.write_at_end(self.settings, self.run_id, report)
        tell_summary(
            self.settings,
            self.run_id,
            self.totals,
            report,
            snapshots=self._responses.restoring.report,
            lost_values=self._loop.scalars.lost + (self._jobs.lost if self._jobs else 0),
            others=self._jobs.totals if self._jobs else (),
            page=page,
        )

    def _is_seed_optimizer(self, optimizer: Any) -> bool:
        """Whether ``optimizer`` trains a seed of this run: then its steps are not the run's."""
        return self.garden is not None and self.garden.is_seed_optimizer(optimizer)

    def _let_go(self, end: Ending) -> StreamReport:
        lets_go: list[Callable[[], Any]] = [partial(self._loop.prefer, None)]
        if self._jobs is not None:
            lets_go.append(partial(self._jobs.ended, self, end))
        if self.garden is not None:
            lets_go += [self.garden.close, partial(self._recorder.attach_garden, None)]
            lets_go.append(self._sharing.forget_garden)
        end_each(lets_go)
        return self.stream_report


def _switch_off_in_child() -> None:
    for run in list(_runs):
        run._recorder.switch_off()
        run._report = StreamReport()  # it is closed here, and only its parent tells of it


os.register_at_fork(after_in_child=_switch_off_in_child)
