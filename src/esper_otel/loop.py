"""The loop: events of its optimizers, forwarded to the recorder of the run.

The observer is called by hooks on one optimizer (``esper_otel.start(optimizer)``), or by those
on every one of the process (:mod:`esper_otel.integrations.watch`). What a script itself calls
within its loop is here as well: :class:`esper_otel.Run` is made of it.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from time import perf_counter_ns
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from esper_otel.run_config import arguments_of, flattened
from esper_otel.tolaria.custom_values import CustomValues
from esper_otel.tolaria.devices import DeviceSampler
from esper_otel.tolaria.fetches import Source, size_in
from esper_otel.tolaria.gradients import gradient_norm, is_sharded
from esper_otel.tolaria.identities import IdentitySet, ObjectIds
from esper_otel.tolaria.recorder import Recorder
from esper_otel.tolaria.scalars import ScalarReader
from esper_otel.tolaria.step import PHASES, REPORTABLE
from esper_otel.tolaria.updates import release, withhold_unless_finite

if TYPE_CHECKING:
    from esper_otel.integrations.jobs import Jobs
    from esper_otel.leyline.frames import Value
    from esper_otel.settings import EsperSettings
    from esper_otel.shared_decisions import SharedDecisions
    from esper_otel.stream import Stream

log = logging.getLogger("esper_otel")
Batch = TypeVar("Batch")

_loops: weakref.WeakSet[LoopObserver] = weakref.WeakSet()
_claimed = IdentitySet()
"""Optimizers whose steps are, or were, those of a run: no other run changes their updates."""
_told: set[str] = set()
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class LoopObserver:
    """Tells ``recorder`` what the optimizers of one training loop do.

    ``is_seed_optimizer`` says whether an optimizer trains a seed of the run: then its steps
    are not the run's. ``enabled`` False: nothing is hooked. ``tells_shards``: this rank tells
    of gradients whose norm cannot be taken.
    """

    def __init__(
        self,
        recorder: Recorder,
        devices: DeviceSampler,
        sharing: SharedDecisions,
        *,
        is_seed_optimizer: Callable[[Any], bool],
        enabled: bool,
        tells_shards: bool,
    ) -> None:
        self.recorder = recorder
        self.scalars = ScalarReader()
        self.custom = CustomValues(self.scalars.read_async)
        self.object_ids = ObjectIds()
        self.is_seed_optimizer = is_seed_optimizer
        self._devices = devices
        self._sharing = sharing
        self._tells_shards = tells_shards
        self._handles: list[Any] = []
        self._preferred: weakref.ref[Any] | None = None
        self._followed: weakref.ref[Any] | None = None
        self._withheld: Any = None
        """Tells on a device whether the update under way is left out there."""
        self._enabled = enabled
        self._thread = get_ident()
        if enabled:
            _loops.add(self)

    def close(self) -> None:
        """Take all hooks off."""
        _loops.discard(self)
        for handle in self._handles:
            try:
                handle.remove()
            except Exception:
                log.warning("a part of the run could not be ended", exc_info=True)

    # Which optimizers there are.

    def record_steps_of(self, optimizer: Any) -> None:
        """Take the steps of ``optimizer`` (a ``torch.optim.Optimizer``) for the run's steps."""
        self._followed = weakref.ref(optimizer)
        _claimed.add(optimizer)
        if not self._enabled:
            return
        # With torch, which not every process that imports this module has.
        from esper_otel.tolaria.step_hooks import StepHooks

        hooks = StepHooks(self.optimizer_begins, self.optimizer_ended)
        self._handles += hooks.register(optimizer)

    def watch_others(self) -> None:
        """Scale the rates of the loop's other optimizers as well, those of seeds excepted."""
        from esper_otel.tolaria.step_hooks import StepHooks

        hooks = StepHooks(self._other_begins, self._other_ended)
        self._handles += hooks.register_for_all()

    @property
    def followed(self) -> Any:
        """The optimizer of :meth:`record_steps_of`, None when there is none or it is gone."""
        return None if self._followed is None else self._followed()

    def prefer(self, optimizer: Any) -> None:
        """Of all optimizers that step in this process, ``optimizer`` sets the run's steps.

        None takes that back: then the run chooses.
        """
        self._preferred = None if optimizer is None else weakref.ref(optimizer)

    @property
    def preferred(self) -> Any:
        """The optimizer last named to :meth:`prefer`, None when it is gone."""
        return None if self._preferred is None else self._preferred()

    def gives_way_to(self, optimizer: Any) -> bool:
        """Whether ``start(optimizer)`` begins anew what this loop was about.

        So it is for the same optimizer, for any when this loop's is gone, and for none when
        this loop never had one.
        """
        if self._followed is None:
            return optimizer is None
        followed = self._followed()
        return followed is None or followed is optimizer

    # What they do.

    def optimizer_begins(
        self, optimizer: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = _NOTHING
    ) -> None:
        """``optimizer`` is about to step: measure its gradients unless they have been.

        ``args`` and ``kwargs`` are what its ``step`` was called with, as hooks get them. A
        closure makes the gradients within the step, so then they are measured there in
        ``enforce``, and after it otherwise.
        """
        recorder = self.recorder
        self._thread = get_ident()
        if has_closure(args, kwargs):
            recorder.closure_begins(optimizer, partial(self._norm_of, optimizer))
            return
        began = perf_counter_ns()
        norm = self._norm_of(optimizer) if recorder.wants_norm else None
        recorder.optimizer_begins(began, norm, optimizer)

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
        if (len(args) > 1 or kwargs) and has_closure(args, kwargs) and recorder.wants_norm:
            ended = recorder.measured(self._norm_of(optimizer))
        if self._sharing.may_meet:
            self._sharing.meet()
        recorder.optimizer = optimizer
        recorder.end_step(ended)
        recorder.optimizer = None  # its owner, not this, decides how long it lives

    def norm_on_device(self, optimizer: Any, norm: Any) -> None:
        """``norm``, of all gradients of ``optimizer``, lies on a device and is not known yet.

        If it is not finite, the update is left out there where the sidecar has allowed that:
        nobody can ask about it in time.
        """
        if self.recorder.control.skips_nonfinite:
            self._withheld = withhold_unless_finite(optimizer, norm)

    def _other_begins(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._is_of_this_loop(optimizer):
            self.recorder.before_update(optimizer, collects=self._thread == get_ident())

    def _other_ended(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._followed is None or self._followed() is not optimizer:
            self.recorder.control.updates.put_back(optimizer)

    def _is_of_this_loop(self, optimizer: Any) -> bool:
        """Whether ``optimizer`` belongs here besides the one that sets the steps.

        So it does where this is the only loop: of several, nobody can tell whose it is. One
        that was given to a run is that one's, also when it is closed.
        """
        alone = all(other is self for other in _loops)
        return alone and optimizer not in _claimed and not self.is_seed_optimizer(optimizer)

    def _report_withheld(self, optimizer: Any) -> None:
        found, self._withheld = self._withheld, None
        release(optimizer, found)
        self.recorder.update_skipped(self.scalars.read_async(found))

    def _skipped(self, found_inf: Any) -> bool:
        """Whether an optimizer that a GradScaler told ``found_inf`` left its step out; fused
        ones are called in any case, and decide that in their kernel."""
        skipped = self.scalars.read_async(found_inf)
        if not isinstance(skipped, float):
            self.recorder.may_be_skipped(skipped)  # nobody waits for a device
            return False
        if skipped:
            self.recorder.skipped()
        return bool(skipped)

    def norm_tensor(self, optimizer: Any) -> Any:
        """The norm of the gradients that ``optimizer`` has now, None where there is none."""
        tensor = gradient_norm(p for group in optimizer.param_groups for p in group["params"])
        if tensor is None:
            self._tell_of_shards(optimizer)
            return None
        # A fused optimizer under a GradScaler gets scaled gradients, and the scale.
        scale = getattr(optimizer, "grad_scale", None)
        tensor = tensor if scale is None else tensor / scale
        if tensor.device.type == "cuda":
            self._devices.watch(tensor.device.index)
        return tensor

    def _norm_of(self, optimizer: Any) -> Any:
        try:
            tensor = self.norm_tensor(optimizer)
            if tensor is None:
                return None
            if tensor.device.type == "cuda":
                self.norm_on_device(optimizer, tensor)
            return self.scalars.read_async(tensor)
        except Exception:
            tell_once("the gradient norm could not be taken")
            return None

    def _tell_of_shards(self, optimizer: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        if self._tells_shards and any(map(is_sharded, parameters)):
            tell_once(
                "the gradients are sharded over ranks, and their norm would need a "
                "collective: gradient_norm is omitted for steps that do not clip them"
            )


class LoopCalls:
    """The methods of a run that a script calls from within the loop."""

    _jobs: Jobs | None
    """The trainings of a process that is watched from outside."""
    _loop: LoopObserver
    _recorder: Recorder
    _sharing: SharedDecisions
    _stream: Stream
    settings: EsperSettings

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over ``loader``, timing the wait for each batch and counting its samples.

        Yields the batches of ``loader``, and passes on its exceptions::

            for images, labels in run.batches(loader):
                ...
        """
        batches = iter(loader)
        source = Source(self._loop.object_ids.of(batches), self._loop.object_ids.of(loader))
        while True:
            asked_for = perf_counter_ns()
            try:
                batch = next(batches)
            except StopIteration:
                return
            try:
                self._in_use.batch_came(asked_for, size_in(batch), source)
            except Exception:
                tell_once("a batch could not be counted")
            yield batch

    def report(self, loss: Any = None, **values: Any) -> None:
        """Report values of this step, before the optimizer steps.

        ``loss`` and ``values`` are numbers or tensors of one element; a tensor on a device is
        read when it arrives, without waiting for it. With one call per micro-batch, the
        step's loss is their mean; of all others the last counts. A loop that clips its
        gradients reports their ``gradient_norm`` before clipping; otherwise the norm is that of
        the optimizer's input. ``accuracy`` and ``grad_conflict_rate`` are shares from 0 to 1,
        ``samples_per_s`` is a rate. Any other name is recorded as a custom value, ``custom.``
        and its name in tables; ``val_loss`` and the like count as evaluations. An unusable
        value is omitted, with one warning::

            run.report(loss=loss, accuracy=correct / len(labels), kl=kl)
            run.report(val_loss=evaluate(model))
        """
        begin = self._loop.scalars.read_async
        known: dict[str, Value] = {}
        if values:
            known = {key: begin(values.pop(key)) for key in REPORTABLE if key in values}
            known.update(self._loop.custom.read(values))
        self._in_use.loop_reported(None if loss is None else begin(loss), known)

    def config(self, values: Any = None, /, **more: Any) -> None:
        """Record the run's hyper-parameters: a mapping, a namespace or a dataclass, and names.

        Nested ones are named with dots. They are recorded as text, numbers and truth values, up
        to a bound; values whose name or form indicates a secret (``api_key``, ``password``) are
        not. A repeated name takes its newest value. The
        arguments of the script are recorded without this. Raises ``TypeError`` for ``values``
        without names::

            run.config({"lr": 3e-4, "model": {"depth": 12}}, seed=0)
        """
        told = {**flattened(values), **flattened(more)}
        stream = self._stream if self._jobs is None else self._jobs.current.run._stream
        stream.configure(told, explicit=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step: ``forward``, ``backward`` or ``optimizer``.

        Raises ``ValueError`` for another name, before the block runs. For loops whose
        optimizer was not given to :func:`esper_otel.start`::

            with run.phase("forward"):
                loss = model(images)
        """
        if name not in PHASES:
            raise ValueError(f"phase {name!r}: expected one of {', '.join(PHASES)}")
        began = perf_counter_ns()
        try:
            yield
        finally:
            self._in_use.phase(name, began, perf_counter_ns())

    def phase_begins(self, name: str) -> None:
        """Announce that the past is no reference from the next step on, as in a curriculum.

        Use it for intended changes (longer sequences, another batch size or data mix, layers
        unfrozen) that move loss and gradients to another, healthy level. The metric ``phase``
        rises by one with the next step, and ``name`` is on the spans of the following steps
        (``esper.phase.name``). The trainer resets nothing; raises ``TypeError`` for a name
        that is not text::

            run.phase_begins("curriculum-2")
        """
        if not isinstance(name, str):
            raise TypeError(f"phase_begins({name!r}): expected a name")
        is_named = self._loop.preferred is not None
        (self._recorder if is_named else self._in_use).phase_begins(name)

    def step(self) -> None:
        """End the step; for loops whose optimizer was not given to :func:`esper_otel.start`.

        Waits for a late decision, for at most ``tamiyo_deadline_ms``.
        """
        if self._sharing.may_meet:
            self._sharing.meet()
        self._recorder.end_step()

    def _start_stream(self) -> None:
        """Begin to send, and to record with the script's arguments."""
        if self.settings.arguments:
            self._stream.configure(arguments_of(sys.argv))
        self._stream.start()

    @property
    def _in_use(self) -> Recorder:
        return self._recorder if self._jobs is None else self._jobs.current.recorder


def has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``step(*args, **kwargs)``, its optimizer first, was given a closure."""
    # Some optimizers take the loss in its place, or an epoch.
    return callable(args[1] if len(args) > 1 else kwargs.get("closure"))


def tell_once(message: str) -> None:
    """Warn of something that may happen at every step, once per process."""
    if message not in _told:
        _told.add(message)
        log.warning(message, exc_info=sys.exc_info()[1] is not None)
