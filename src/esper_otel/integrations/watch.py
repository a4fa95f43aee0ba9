"""What watches a plain PyTorch loop that knows nothing of it.

Step boundaries come from torch's public global optimizer hooks. What has no hook is
wrapped where it is looked up: ``backward`` (the loss is what it is called on),
``clip_grad_norm_`` (its norm is reused), ``GradScaler`` (for the loss it hides and the
steps it skips), the fetch of a DataLoader's iterator, ``os._exit`` (which would take what
is unsent with it) and, with CUDA, ``Tensor.to`` and ``Tensor.cuda``. :meth:`Watch.undo`
puts the very objects back.

A wrapper does its own work within :meth:`Watch.quietly`: what the user called behaves,
returns and raises as ever. What happens on other threads than the one that trains, a
prefetcher's fetches for example, is not the loop's time and is not counted.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from threading import get_ident
from time import perf_counter_ns
from typing import Any

from esper_otel.integrations.jobs import Job, Jobs
from esper_otel.loop import has_closure, tell_once
from esper_otel.run import Run
from esper_otel.tolaria.fetches import Source, samples_in
from esper_otel.tolaria.gradients import whole_norm, with_gradients
from esper_otel.tolaria.scalars import CopyTimer
from esper_otel.tolaria.step_hooks import StepHooks

log = logging.getLogger("esper_otel")

MAX_CLIPS = 8
"""Clippings that are remembered until the optimizer steps whose gradients they may be."""


class Watch:
    """The hooks and wrappers on one torch, and how to take them off.

    What is seen before an optimizer steps goes to the training that stepped last, and from
    there to that of the optimizer.
    """

    def __init__(self, torch: Any, run: Run) -> None:
        self.jobs = run._jobs = Jobs(run)
        self.jobs.follow = self._use
        self._use(self.jobs.current)
        self._is_graded: Callable[[], bool] = torch.is_grad_enabled
        self._thread = 0
        self._steps = 0
        self._backward_depth = 0
        self._fresh = False
        """Whether ``backward`` was called since an optimizer stepped last."""
        self._stepped: Any = None
        self._scaled: tuple[Any, Any] | None = None
        self._clips: deque[tuple[list[int], Any]] = deque(maxlen=MAX_CLIPS)
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

    def _use(self, job: Job) -> None:
        self._job = job
        self.run = job.run
        self._loop = job.run._loop
        self._recorder = job.recorder
        self._begin = self._loop.scalars.read_async
        self._primary = job.primary

    def _put_on(self, torch: Any) -> None:
        self._hook_optimizers()
        self.wrap(torch.Tensor, "backward", self._backward)
        self.wrap(torch.autograd, "backward", self._backward)
        clip = self.wrap(torch.nn.utils, "clip_grad_norm_", self._clip)
        self._put(torch.nn.utils.clip_grad, "clip_grad_norm_", clip)
        self.wrap(torch.amp.GradScaler, "scale", self._scale)
        self.wrap(torch.amp.GradScaler, "step", self._scaler_step)
        self.wrap(os, "_exit", functools.partial(self._exit, os.getpid()))
        if torch.cuda.is_available():
            self.wrap(torch.Tensor, "to", self._to_device)
            self.wrap(torch.Tensor, "cuda", self._to_device)
        loaders = importlib.import_module("torch.utils.data.dataloader")
        iterators = getattr(loaders, "_BaseDataLoaderIter", None)
        if hasattr(iterators, "__next__"):
            # The class and not DataLoader.__iter__: what iter(loader) returns, and when
            # its workers start, stay as they are.
            self.wrap(iterators, "__next__", self._fetch)
        else:
            log.warning("this torch has no _BaseDataLoaderIter: input_wait_ms is left out")

    def undo(self) -> None:
        """Take everything off, in the opposite order. Never raises."""
        while self._undo:
            take_off = self._undo.pop()
            try:
                take_off()
            except Exception as error:
                log.warning("a part of the instrumentation could not be taken off: %r", error)

    def _hook_optimizers(self) -> None:
        hooks = StepHooks(self._optimizer_begins, self._optimizer_ended)
        self._undo += [handle.remove for handle in hooks.register_for_all()]

    def at_undo(self, call: Callable[[], None]) -> None:
        """Have ``call`` take something off as well."""
        self._undo.append(call)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> Callable[..., Any]:
        """Call ``owner.name`` by way of ``around`` from now on, which gets the original first.

        Code that Dynamo compiles calls the original: ``around`` would break its graph. Returns
        what stands there now.
        """
        original = getattr(owner, name)
        is_compiling = importlib.import_module("torch").compiler.is_dynamo_compiling

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if is_compiling():
                return original(*args, **kwargs)
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

    def _backward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self._backward_depth or self._elsewhere:
            return original(*args, **kwargs)
        self._backward_depth += 1
        self._fresh = True
        try:
            self.quietly(self._recorder.backward_begins)
            self.quietly(self.jobs.note_gradients)
            if self._job.steps_in_backward:
                # Its updates are about to be made, on threads that must not wait for answers.
                self.quietly(self._recorder.collect)
            result = original(*args, **kwargs)
        finally:
            self._backward_depth -= 1
            stepped, self._stepped = self._stepped, None
        self.quietly(self._take_loss, args[0] if args else kwargs.get("tensors"))
        if stepped is not None:
            self._job.steps_in_backward = True
            self._thread = get_ident()
            self.quietly(self._loop.measure, stepped)
            self.quietly(self._end_step, stepped)
        return result

    def _take_loss(self, tensor: Any) -> None:
        loss = None
        if getattr(tensor, "numel", int)() == 1:  # autograd.backward also takes several
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

    def _scaler_step(
        self, original: Any, scaler: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        steps = self._steps
        result = original(scaler, optimizer, *args, **kwargs)
        if not self._primary.may_be(optimizer):
            self.quietly(self._another_ended, optimizer)
        elif steps == self._steps:
            self._clips.clear()
            self.quietly(self._recorder.skipped)
        return result

    def _exit(self, pid: int, original: Any, *args: Any, **kwargs: Any) -> None:
        if os.getpid() == pid:  # and not a child that was forked
            self.quietly(self.jobs.first._end)
        original(*args, **kwargs)

    def _clip(
        self, original: Any, parameters: Any, max_norm: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(parameters, Iterable) and not hasattr(parameters, "grad"):
            parameters = list(parameters)  # it may be a generator, and is looked at twice
        norm = original(parameters, max_norm, *args, **kwargs)
        norm_type = args[0] if args else kwargs.get("norm_type", 2.0)
        if norm_type == 2.0 and not self._elsewhere:
            self.quietly(self._take_norm, parameters, norm)
        return norm

    def _take_norm(self, parameters: Any, norm: Any) -> None:
        clipped = [parameters] if hasattr(parameters, "grad") else parameters
        norm = whole_norm(norm, clipped)
        if norm is not None:
            self._clips.append((with_gradients(clipped), norm))

    def _tell_clips(self, optimizer: Any) -> None:
        """Tell the norm of what was clipped, if that is all that ``optimizer`` steps by.

        Not before it steps: which optimizer that will be is not known for certain. The norm
        of a part of its gradients, or of others, is not the norm the registry means.
        """
        stepped = with_gradients(p for group in optimizer.param_groups for p in group["params"])
        for clipped, norm in reversed(self._clips):
            if clipped == stepped or sorted(clipped) == sorted(stepped):
                self._recorder.clipped(self._begin(norm))
                if getattr(norm, "is_cuda", False):
                    self._loop.norm_on_device(optimizer, norm)
                break
        self._clips.clear()

    def _to_device(self, original: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if self._copied or tensor.device.type != "cpu":
            return original(tensor, *args, **kwargs)
        with self._copies.copying():
            result = original(tensor, *args, **kwargs)
        # Known only now: .to() takes a device in many ways, and may not be about one.
        if result.device.type == "cuda":
            self._copied = True
        else:
            self._copies.first_copy()
        return result

    def _tell_copy(self) -> None:
        self._copied = False
        reading = self._copies.first_copy()
        if reading is not None:
            self._recorder.copied_to_device(reading)

    def _fetch(self, original: Any, iterator: Any) -> Any:
        asked_for = perf_counter_ns()
        try:
            batch = original(iterator)
        except StopIteration:
            if not self._elsewhere:
                self.quietly(self._batches_ended, iterator)
            raise
        if self._elsewhere:
            return batch
        self.quietly(self._batch_came, iterator, asked_for, batch)
        return batch

    def _batch_came(self, iterator: Any, asked_for: int, batch: Any) -> None:
        number = self._loop.object_ids.of
        source = Source(
            number(iterator),
            number(getattr(iterator, "_dataset", iterator)),
            self._is_graded(),
        )
        self._recorder.batch_came(asked_for, samples_in(batch), source)

    def _batches_ended(self, iterator: Any) -> None:
        self._recorder.batches_ended(self._loop.object_ids.of(iterator))

    # Optimizer hooks.

    def _optimizer_begins(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.quietly(self._begin_update, optimizer, args, kwargs)

    def _begin_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # A seed's optimizer steps within the primary's own step.
        if self.jobs.is_seed_optimizer(optimizer):
            return
        fresh, self._fresh = self._fresh, False
        closure = has_closure(args, kwargs)
        job = self.jobs.of(optimizer, fresh=fresh, has_closure=closure)
        if job is not self._job:
            self._use(job)
        is_primary = job.sets_step(optimizer, fresh=fresh or closure)
        if is_primary:
            job.steps_by(optimizer)
        if self._backward_depth:
            # Optimizers that step within backward, one per parameter: the step of the run
            # ends when backward does, and its loss is known. The thread may be autograd's.
            if is_primary:
                self._stepped = optimizer
            self._recorder.before_update(optimizer, collects=False)
            return
        if not is_primary:
            self._recorder.before_update(optimizer, collects=not self._elsewhere)
            return
        self._thread = get_ident()
        if self._clips:
            self.quietly(self._tell_clips, optimizer)
        self._loop.optimizer_begins(optimizer, args, kwargs)

    def _optimizer_ended(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.quietly(self._recorder.control.updates.put_back, optimizer)
        if self._backward_depth:
            return
        self._fresh = False  # also of what a closure has called
        if self._primary.current is optimizer:
            self.quietly(self._end_step, optimizer, args, kwargs)
        else:
            self.quietly(self._another_ended, optimizer)

    def _another_ended(self, optimizer: Any) -> None:
        if not (self._elsewhere or self.jobs.is_seed_optimizer(optimizer)):
            self._recorder.another_stepped()

    def _end_step(self, optimizer: Any, args: Any = (), kwargs: Any = None) -> None:
        self._steps += 1
        if self._clips:  # by a closure, within the step
            self.quietly(self._tell_clips, optimizer)
        self.quietly(self._tell_copy)
        self._loop.optimizer_ended(optimizer, args, kwargs or {})

    @property
    def _elsewhere(self) -> bool:
        """Whether this is another thread than the one that trains, as far as is known."""
        return self._thread not in (0, get_ident())

    def quietly(self, work: Callable[..., Any], *args: Any) -> Any:
        """What ``work`` returns; None when it raises, which is told once."""
        try:
            return work(*args)
        except Exception:
            tell_once("a part of a step could not be recorded")
            return None
