"""Zero-code: watches a plain PyTorch loop that knows nothing of it.

Step boundaries come from torch's public global optimizer hooks. What has no hook is
wrapped where it is looked up: ``Tensor.backward`` (the loss is what it is called on),
``clip_grad_norm_`` (its norm is reused), ``GradScaler.scale`` (to know the loss it hid)
the fetch of a DataLoader's iterator, and, with CUDA, ``Tensor.to`` and ``Tensor.cuda``.
``uninstrument()`` puts the very objects back.

A wrapper does its own work within :func:`_quietly`: what the user called behaves, returns
and raises as ever.
"""

from __future__ import annotations

import functools
import importlib
import logging
import weakref
from collections.abc import Callable, Collection, Iterable
from time import perf_counter_ns
from typing import Any

import wrapt
from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]
    BaseInstrumentor,
)

from esper_otel import run as runs
from esper_otel.settings import EsperSettings, SettingsError
from esper_otel.tolaria.batches import samples_in
from esper_otel.tolaria.scalars import CopyTimer

log = logging.getLogger("esper_otel")


class TorchInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Instruments torch, now or when it is imported.

    ``instrument(**settings)`` takes fields of :class:`esper_otel.settings.EsperSettings`;
    without arguments it does what zero-code instrumentation does. A wrong argument
    raises :class:`SettingsError`; a wrong environment variable is warned about, and the
    script runs without instrumentation.
    """

    _watch: _Watch | None = None
    _wanted = False
    _hooked = False

    def instrumentation_dependencies(self) -> Collection[str]:
        """The versions of torch this is written for."""
        return ("torch >= 2.4",)

    def _instrument(self, **kwargs: Any) -> None:
        settings = {k: v for k, v in kwargs.items() if k != "skip_dep_check"}
        try:
            EsperSettings.from_environment(**settings)
        except SettingsError as error:
            if settings:
                raise
            log.warning("not instrumented: %s", error)
            return
        cls = type(self)
        cls._wanted = True

        def when_imported(torch: Any) -> None:
            if not cls._wanted or cls._watch is not None:
                return
            try:
                cls._watch = _Watch(torch, runs.start_automatic(**settings))
            except Exception:
                log.exception("torch could not be instrumented; the script runs without")

        # Not before torch is: a script that never imports it should not pay for it.
        wrapt.register_post_import_hook(when_imported, "torch")

    def _uninstrument(self, **kwargs: Any) -> None:
        cls = type(self)
        cls._wanted = False
        if cls._watch is not None:
            cls._watch.undo()
            cls._watch = None
        runs.end_automatic()


class _Watch:
    """The hooks and wrappers on one torch, and how to take them off."""

    def __init__(self, torch: Any, run: runs.Run) -> None:
        self._run = run
        self._recorder = run.recorder
        self._begin = run.scalars.begin
        self._primary: weakref.ref[Any] | None = None
        self._rival: weakref.ref[Any] | None = None
        self._backward_depth = 0
        self._scaled: tuple[Any, Any] | None = None
        self._copies = CopyTimer()
        self._copied = False
        self._undo: list[Callable[[], None]] = []
        if not run.enabled:
            return
        try:
            self._put_on(torch)
        except BaseException:
            self.undo()  # half of it would be worse than nothing
            raise

    def _put_on(self, torch: Any) -> None:
        self._hook_optimizers()
        self._wrap(torch.Tensor, "backward", self._backward)
        clip = self._wrap(torch.nn.utils, "clip_grad_norm_", self._clip)
        self._put(torch.nn.utils.clip_grad, "clip_grad_norm_", clip)
        self._wrap(torch.amp.GradScaler, "scale", self._scale)
        if torch.cuda.is_available():
            self._wrap(torch.Tensor, "to", self._to_device)
            self._wrap(torch.Tensor, "cuda", self._to_device)
        loaders = importlib.import_module("torch.utils.data.dataloader")
        iterators = getattr(loaders, "_BaseDataLoaderIter", None)
        if hasattr(iterators, "__next__"):
            # The class and not DataLoader.__iter__: what iter(loader) returns, and when
            # its workers start, stay as they are.
            self._wrap(iterators, "__next__", self._fetch)
        else:
            log.warning("this torch has no _BaseDataLoaderIter: input_wait_ms is left out")

    def undo(self) -> None:
        """Take everything off, in the opposite order."""
        while self._undo:
            self._undo.pop()()

    def _hook_optimizers(self) -> None:
        # torch.optim deletes its attribute of this name; the module is public all the same.
        hooks = importlib.import_module("torch.optim.optimizer")
        before = hooks.register_optimizer_step_pre_hook(self._optimizer_begins)
        after = hooks.register_optimizer_step_post_hook(self._optimizer_ended)
        self._undo += [before.remove, after.remove]

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> Callable[..., Any]:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        self._put(owner, name, wrapper)
        return wrapper

    def _put(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        inherited = name not in owner.__dict__
        original = getattr(owner, name) if inherited else owner.__dict__[name]
        setattr(owner, name, wrapper)

        def restore() -> None:
            if owner.__dict__.get(name) is not wrapper:
                log.warning("%s was wrapped again by somebody else and is left as it is", name)
            elif inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

        self._undo.append(restore)

    # Around what the user calls.

    def _backward(self, original: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if self._backward_depth:
            return original(tensor, *args, **kwargs)
        self._backward_depth += 1
        try:
            self._quietly(self._recorder.backward_begins)
            result = original(tensor, *args, **kwargs)
        finally:
            self._backward_depth -= 1
        self._quietly(self._take_loss, tensor)
        return result

    def _take_loss(self, tensor: Any) -> None:
        loss = None
        if tensor.numel() == 1:
            scaled, self._scaled = self._scaled, None
            if scaled is not None and scaled[0] is tensor:
                tensor = scaled[1]
            loss = self._begin(tensor)
        self._recorder.backward_ends(loss)

    def _scale(self, original: Any, scaler: Any, outputs: Any) -> Any:
        result = original(scaler, outputs)
        if result is not outputs and hasattr(result, "numel"):
            self._scaled = (result, outputs)
        return result

    def _clip(
        self, original: Any, parameters: Any, max_norm: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(parameters, Iterable) and not hasattr(parameters, "grad"):
            parameters = list(parameters)  # it may be a generator, and is looked at twice
        norm = original(parameters, max_norm, *args, **kwargs)
        norm_type = args[0] if args else kwargs.get("norm_type", 2.0)
        if norm_type == 2.0:
            self._quietly(self._take_norm, parameters, norm)
        return norm

    def _take_norm(self, parameters: Any, norm: Any) -> None:
        clipped = [parameters] if hasattr(parameters, "grad") else parameters
        optimizer = self._primary() if self._primary is not None else None
        if optimizer is not None:
            # The norm of a part of the gradients is not the norm the registry means.
            stepped = sum(
                p.grad is not None for group in optimizer.param_groups for p in group["params"]
            )
            if stepped != sum(p.grad is not None for p in clipped):
                return
        self._recorder.clipped(self._begin(norm))

    def _to_device(self, original: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if self._copied or tensor.device.type != "cpu":
            return original(tensor, *args, **kwargs)
        with self._copies.copying():
            result = original(tensor, *args, **kwargs)
        # Known only now: .to() takes a device in many ways, and may not be about one.
        if result.device.type == "cuda":
            self._copied = True
        else:
            self._copies.take()
        return result

    def _tell_copy(self) -> None:
        self._copied = False
        reading = self._copies.take()
        if reading is not None:
            self._recorder.copied_to_device(reading)

    def _fetch(self, original: Any, iterator: Any) -> Any:
        asked_for = perf_counter_ns()
        batch = original(iterator)
        self._quietly(lambda: self._recorder.batch_came(asked_for, samples_in(batch)))
        return batch

    # Optimizer hooks; torch calls them with (optimizer, args, kwargs).

    def _optimizer_begins(self, optimizer: Any, *_: Any) -> None:
        self._quietly(self._begin_if_primary, optimizer)

    def _begin_if_primary(self, optimizer: Any) -> None:
        primary = self._primary() if self._primary is not None else None
        if primary is not optimizer:
            if self._run.owns(optimizer):
                return  # a seed's, which steps within the primary's own step
            # The first optimizer that steps sets the run's steps, until it is gone or
            # another steps twice while it rests: a script that trains one model after
            # the other.
            rival = self._rival() if self._rival is not None else None
            if primary is not None and rival is not optimizer:
                self._rival = weakref.ref(optimizer)
                return
            self._primary = weakref.ref(optimizer)
        self._rival = None
        self._run.optimizer_begins(optimizer)

    def _optimizer_ended(self, optimizer: Any, *_: Any) -> None:
        if self._primary is not None and self._primary() is optimizer:
            self._quietly(self._tell_copy)
            self._quietly(self._run.optimizer_ended, optimizer)

    def _quietly(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception:
            runs.tell_once("a part of a step could not be recorded")
