"""The training that a framework announces, instrumented from its beginning to its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from packaging.version import InvalidVersion, Version

from esper_otel import process
from esper_otel.goodbye import INTERRUPTED
from esper_otel.leyline.endings import RunEnd
from esper_otel.loop import tell_once
from esper_otel.run import Run
from esper_otel.settings import EsperSettings, SettingsError

if TYPE_CHECKING:
    from esper_otel.integrations.watch import Watch

log = logging.getLogger("esper_otel")


class Training:
    """One training of a framework, as its callbacks tell of it.

    It is watched as zero-code instrumentation would, by the same hooks, for as long as it
    lasts. In a process that is instrumented already, nothing is watched twice: the run
    that is there only learns which optimizer is the one.
    """

    _watching: ClassVar[Training | None] = None
    """The one that has hooks on torch."""

    def __init__(self, **settings: Any) -> None:
        self.run: Run | None = None
        """The run; None before the training begins."""
        self._settings = settings
        self.watch: Watch | None = None
        """The hooks on torch that are its own; None before and after, and where others are."""
        self._restored: Mapping[str, Any] | None = None

    def start(self, *optimizers: Any, model: Any = None, phase: str = "training") -> None:
        """Training of ``model`` begins with ``optimizers``, whose first one sets its steps.

        ``phase`` is what it is called where the model was trained before. Never raises.
        """
        try:
            self._start([each for each in optimizers if each is not None], phase)
            if model is not None and self.run is not None:
                self.run._responses.restoring.protected.add_module(model, whole=False)
        except Exception:
            log.exception("the training could not be instrumented; it continues without")

    def _start(self, optimizers: Sequence[Any], phase: str) -> None:
        before = Training._watching
        if before is not None:
            # It was interrupted, of which not every framework tells; what it has left on
            # torch would record this training as well.
            before.stop(INTERRUPTED)
        automatic = process.automatic()
        self.run = run = self._own_run() if automatic is None else automatic
        if automatic is None:
            import torch

            from esper_otel.integrations.watch import Watch

            self.watch = Watch(torch, run)
            Training._watching = self
        elif self._settings:
            process.tell_ignored(run.settings, self._settings)
        if run._jobs is not None:
            # Accelerate wraps optimizers.
            inner = [getattr(each, "optimizer", each) for each in optimizers]
            self.run = run = run._jobs.announced(inner, phase)
        if self._restored is not None:
            _load_state(run, self._restored)
            self._restored = None

    def _own_run(self) -> Run:
        return Run(EsperSettings.from_environment(**self._settings))

    def state_dict(self) -> dict[str, Any]:
        """What the framework's checkpoint is to hold of the run.

        Empty where decisions are not applied: then nothing is held, and the checkpoint is
        what it would be without us.
        """
        run = self.run
        return run.state_dict() if run is not None and run.enforcing else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, now or when the training begins. Never raises."""
        if not state:
            return
        if self.run is None:
            self._restored = state
        else:
            _load_state(self.run, state)

    def share_losses(self) -> None:
        """The framework divides each loss by the number of micro-batches in a step."""
        if self.run is not None:
            self.run._loop.recorder.losses_prescaled()

    def evaluated(self, values: Mapping[str, Any]) -> None:
        """The framework has measured ``values`` on held-out data. Never raises."""
        self._report(values, evaluated=True)

    def reported(self, values: Mapping[str, Any]) -> None:
        """The script has told the framework to log ``values``. Never raises."""
        numbers = {k: v for k, v in values.items() if not isinstance(v, str | Mapping)}
        self._report(numbers, evaluated=False)

    def _report(self, values: Mapping[str, Any], *, evaluated: bool) -> None:
        if self.run is None or not values:
            return
        try:
            read = self.run._loop.custom.read(values, evaluated=evaluated)
            self.run._in_use.loop_reported(None, read)
        except Exception:
            log.exception("values of the framework could not be recorded")

    def configured(self, values: Mapping[str, Any]) -> None:
        """The framework was given hyper-parameters. Never raises."""
        try:
            if self.run is not None:
                self.run.config(values)
        except Exception:
            log.exception("the configuration could not be recorded")

    def stop(self, end: RunEnd | None = None) -> None:
        """Training is over, well or not: send what is unsent, and take everything off.

        ``end`` says how, None: as the exception at hand says. Never raises.
        """
        if self.run is not None:
            self.run._loop.prefer(None)
            if self.run._jobs is not None:
                self.run._jobs.ended(self.run, end or self.run._goodbye.at_hand())
            self.run._loop.recorder.losses_prescaled(self.run.settings.losses_prescaled)
        if Training._watching is self:
            Training._watching = None
        watch, self.watch = self.watch, None
        if watch is not None and self.run is not None:
            watch.undo()
            try:
                self.run.close()
            except Exception:
                log.exception("the run could not be closed")


def watch_accelerate(watch: Watch, accelerator: Any) -> None:
    """Have ``watch`` see the losses and the checkpoints of Accelerate as well.

    ``accelerator`` is its module ``accelerate.accelerator``, which was just imported. Not
    beside its callback, so as to need nothing of Accelerate but that module.
    """

    def backward(original: Any, *args: Any, **kwargs: Any) -> Any:
        # It divides the loss by the number of micro-batches before tensors see it.
        watch.quietly(watch.run._loop.recorder.under_way.losses.prescaled)
        return original(*args, **kwargs)

    # The folder that is saved to is known to Accelerate's own hooks only.

    def save_state(original: Any, accelerator: Any, *args: Any, **kwargs: Any) -> Any:
        def save(models: Any, weights: Any, folder: Any) -> None:
            watch.quietly(save_beside, watch.run, folder, accelerator.process_index)

        handle = accelerator.register_save_state_pre_hook(save)
        return _until_returned(handle, original, accelerator, *args, **kwargs)

    def load_state(original: Any, accelerator: Any, *args: Any, **kwargs: Any) -> Any:
        def load(models: Any, folder: Any) -> None:
            watch.quietly(load_beside, watch.run, folder, accelerator.process_index)

        handle = accelerator.register_load_state_pre_hook(load)
        return _until_returned(handle, original, accelerator, *args, **kwargs)

    if hasattr(accelerator, "Accelerator"):
        watch.wrap(accelerator.Accelerator, "backward", backward)
        watch.wrap(accelerator.Accelerator, "save_state", save_state)
        watch.wrap(accelerator.Accelerator, "load_state", load_state)


def watch_deepspeed(watch: Watch, engine: Any) -> None:
    """Have ``watch`` learn the losses of DeepSpeed's engines, and their norms before clipping.

    ``engine`` is its module ``deepspeed.runtime.engine``, which was just imported. Without ZeRO
    and in full precision an engine clips by a function of its module; in all other cases its
    optimizer clips, and knows the norm (``get_global_grad_norm``) before the inner one steps.
    Tensors see a loss that was divided by the number of micro-batches, and with ZeRO multiplied
    by the loss scale behind that.
    """

    def backward(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
        loss = args[0] if args else kwargs.get("loss")
        if loss is not None and kwargs.get("scale_wrt_gas", True):
            watch.quietly(given, loss)
        return original(engine, *args, **kwargs)

    def given(loss: Any) -> None:
        loop = watch.run._loop
        loop.recorder.under_way.losses.report(loop.scalars.read_async(loss))

    def step(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = getattr(engine, "optimizer", None)
        watch.norms.engine = optimizer if hasattr(optimizer, "_global_grad_norm") else None
        try:
            return original(engine, *args, **kwargs)
        finally:
            watch.norms.engine = None

    if hasattr(engine, "clip_grad_norm_"):
        watch.wrap(engine, "clip_grad_norm_", watch.clipping.by_norm)
    if hasattr(engine, "DeepSpeedEngine"):
        watch.wrap(engine.DeepSpeedEngine, "backward", backward)
        watch.wrap(engine.DeepSpeedEngine, "step", step)


def _until_returned(handle: Any, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What ``call`` returns; the hook of ``handle`` is there until then."""
    try:
        return call(*args, **kwargs)
    finally:
        handle.remove()


def save_beside(run: Run, folder: Any, rank: int) -> None:
    """Put what decisions hold into ``folder``, a checkpoint; nothing in ``advise``.

    A file per rank. Raises ``OSError``.
    """
    if run.enforcing:
        _file_in(folder, rank).write_bytes(msgspec.msgpack.encode(run.state_dict()))


def load_beside(run: Run, folder: Any, rank: int) -> None:
    """Go on from what :func:`save_beside` left in ``folder``, if it did. Raises ``OSError``."""
    file = _file_in(folder, rank)
    if not (run.enforcing and file.exists()):
        return
    try:
        state = msgspec.msgpack.decode(file.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        tell_once(f"esper-otel: {file} is not used: {error}")
    else:
        _load_state(run, state)


def _load_state(run: Run, state: Mapping[str, Any]) -> None:
    """Go on from ``state`` of a checkpoint; what cannot be used is reported, once."""
    try:
        run.load_state_dict(state)
    except ValueError as error:
        tell_once(f"esper-otel: a checkpoint's state of the run is not used: {error}")


def _file_in(folder: Any, rank: int) -> Path:
    return Path(folder) / f"esper_otel_{rank}.msgpack"


def require(framework: str, oldest: str) -> None:
    """Raise :class:`SettingsError` when ``framework`` is older than ``oldest``."""
    fault = _fault_of(framework, oldest)
    if fault is not None:
        raise SettingsError(fault)


def suits(framework: str, oldest: str) -> bool:
    """Whether ``framework`` is not older than ``oldest``; one that is, is told of once."""
    fault = _fault_of(framework, oldest)
    if fault is not None:
        tell_once(f"{fault}; its trainings are recorded as any other loop")
    return fault is None


def _fault_of(framework: str, oldest: str) -> str | None:
    # What was imported, and not what is installed: a source checkout need not be.
    used = str(getattr(import_module(framework), "__version__", ""))
    try:
        if Version(used) >= Version(oldest):
            return None
    except InvalidVersion:
        return None  # "unknown", for example: most likely a checkout of today
    return f"{framework} {used} is too old for its callback: expected {oldest} or newer"
