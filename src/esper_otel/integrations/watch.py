"""The hooks that instrument an unchanged PyTorch loop.

Step boundaries come from torch's public global optimizer hooks. What has no hook is
wrapped where it is looked up: ``backward`` and ``autograd.grad`` (the loss is what they are
called on), the functions that clip (their norm is reused), ``GradScaler`` (for the loss it
hides and the steps it skips), ``Optimizer.__init__`` (an optimizer is known before it steps),
the fetch of a DataLoader's iterator, ``os._exit`` (which would take what is unsent with it)
and, with CUDA, ``Tensor.to`` and ``Tensor.cuda``. :meth:`Watch.undo` puts the very objects
back.

A wrapper does its own work within :meth:`Watch.quietly`: what the user called behaves,
returns and raises as ever. What happens on other threads than the one that trains, a
prefetcher's fetches for example, is not the loop's time and is not counted.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from threading import get_ident
from time import perf_counter_ns
from types import GeneratorType
from typing import Any

from esper_otel.integrations.clipping import Clipping
from esper_otel.integrations.evaluations import Evaluations
from esper_otel.integrations.jobs import Job, Jobs
from esper_otel.integrations.norms import GradientNorms
from esper_otel.loop import has_closure, tell_once
from esper_otel.run import Run
from esper_otel.tolaria.fetches import Source, size_in
from esper_otel.tolaria.rates import host_rates
from esper_otel.tolaria.scalars import CopyTimer
from esper_otel.tolaria.step_hooks import StepHooks

log = logging.getLogger("esper_otel")


class Watch:
    """The hooks and wrappers on one torch, and how to take them off.

    What is seen before an optimizer steps goes to the training that stepped last, and from
    there to that of the optimizer.
    """

    def __init__(self, torch: Any, run: Run) -> None:
        self.jobs = run._jobs = Jobs(run)
        self.jobs.follow = self._use
        self.norms = GradientNorms(self.jobs)
        self.clipping = Clipping(self, torch.Tensor)
        self._evaluations = Evaluations()
        self._use(self.jobs.current)
        self._is_graded: Callable[[], bool] = torch.is_grad_enabled
        self._thread = 0
        self._steps = 0
        self._backward_depth = 0
        self._fresh = False
        """Whether ``backward`` was called since an optimizer stepped last."""
        self._stepped: Any = None  # within backward, and its rates then
        self._scaled: tuple[Any, Any] | None = None
        self._by_grad = False
        """Whether ``autograd.grad`` was called for weights since an optimizer stepped last."""
        self._tensor: type = torch.Tensor
        self._parameter: type = torch.nn.Parameter
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
        self.norms.use(job)
        self._evaluations.training_changed()

    def _put_on(self, torch: Any) -> None:
        self._hook_optimizers()
        self.wrap(torch.Tensor, "backward", self._backward)
        self.wrap(torch.autograd, "backward", self._backward)
        self.wrap(torch.autograd, "grad", self._grad)
        self.wrap(torch.optim.Optimizer, "__init__", self._made)
        for name, clip in self.clipping.wrappers.items():
            if hasattr(torch.nn.utils, name):
                wrapper = self.wrap(torch.nn.utils, name, clip)
                if hasattr(torch.nn.utils.clip_grad, name):
                    self._put(torch.nn.utils.clip_grad, name, wrapper)
        self.wrap(torch.amp.GradScaler, "scale", self._scale)
        self.wrap(torch.amp.GradScaler, "unscale_", self._unscale)
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
            log.warning("this torch has no _BaseDataLoaderIter: input_wait_ms is omitted")

    def undo(self) -> None:
        """Take everything off, in the opposite order. Never raises."""
        while self._undo:
            take_off = self._undo.pop()
            try:
                take_off()
            except Exception as error:
                log.warning("a part of the instrumentation could not be removed: %r", error)

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
                log.warning("%s was wrapped again by other code and stays as it is", name)
            elif inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

        self._undo.append(restore)

    # Around what the user calls.

    def _backward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self._backward_depth or self.is_elsewhere:
            return original(*args, **kwargs)
        self._backward_depth += 1
        tensor = args[0] if args else kwargs.get("tensors")
        keeps = args[2] if len(args) > 2 else kwargs.get("retain_graph")
        try:
            self.quietly(self._backward_begins, tensor, bool(keeps))
            if self._job.steps_in_backward:
                # Its updates are about to be made, on threads that must not wait for answers.
                self.quietly(self._recorder.collect)
            result = original(*args, **kwargs)
        finally:
            self._backward_depth -= 1
            stepped, self._stepped = self._stepped, None
        self.quietly(self._backward_ended, tensor)
        if stepped is not None:
            self._job.steps_in_backward = True
            self._thread = get_ident()
            optimizer, self._recorder.rates_within = stepped
            self.quietly(self._loop.measure, optimizer)
            self.quietly(self._end_step, optimizer)
            self._recorder.rates_within = None
        return result

    def _backward_begins(self, tensor: Any, keeps_graph: bool) -> None:
        if self._by_grad:  # of an inner loop
            self._by_grad = False
            self._recorder.under_way.losses.throw_away()
        self.norms.backward_begins()
        self._evaluation_begins(tensor, keeps_graph)

    def _evaluation_begins(self, tensor: Any, keeps_graph: bool) -> None:
        """What the loss is a part of is found here, and what led to it was forward."""
        self._fresh = True
        calls = self._evaluations
        if calls.looks or calls.calls >= calls.expected:
            self.quietly(self._look_at, tensor, keeps_graph)
        else:
            calls.calls += 1
        self._recorder.backward_begins()
        self.jobs.note_gradients()

    def _look_at(self, tensor: Any, keeps_graph: bool) -> None:
        if type(tensor) is self._tensor:
            scaled = self._scaled
            loss = scaled[1] if scaled is not None and scaled[0] is tensor else tensor
            self._evaluations.begins(loss, keeps_graph=keeps_graph, optimizers=self._optimizers)

    def _optimizers(self) -> list[Any]:
        return [*self.norms.unstepped, *(o for job in self.jobs._turns for o in job.optimizers)]

    def _backward_ended(self, tensor: Any) -> None:
        is_scaled = self._evaluation_ended(tensor)
        self.norms.backward_ended(scaled=is_scaled, optimizing=self._recorder.optimizing)

    def _evaluation_ended(self, tensor: Any) -> bool:
        """Takes the loss; returns whether a ``GradScaler`` has scaled it."""
        loss, is_scaled = None, False
        if getattr(tensor, "numel", int)() == 1:  # autograd.backward also takes several
            scaled, self._scaled = self._scaled, None
            if scaled is not None and scaled[0] is tensor:
                tensor, is_scaled = scaled[1], True
            loss = self._begin(tensor)
        calls = self._evaluations
        self._recorder.backward_ends(loss, calls.evaluated() if calls.looked else None)
        return is_scaled

    def _grad(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 or self._backward_depth or self.is_elsewhere:
            return original(*args, **kwargs)
        loss, weights, *others = args
        if type(weights) is GeneratorType:  # model.parameters(), looked at twice
            weights = tuple(weights)
        held = weights.values() if type(weights) is dict else weights
        first = next(iter(held), None) if type(weights) in (tuple, list, dict) else weights
        if type(loss) is not self._tensor or type(first) is not self._parameter:
            return original(loss, weights, *others, **kwargs)
        self.quietly(self._evaluation_begins, loss, bool(kwargs.get("retain_graph")))
        result = original(loss, weights, *others, **kwargs)
        self._by_grad = True
        self.quietly(self._evaluation_ended, loss)
        return result

    def _made(self, original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        self.quietly(self.norms.made, optimizer)

    def _scale(self, original: Any, scaler: Any, outputs: Any) -> Any:
        result = original(scaler, outputs)
        if result is not outputs and hasattr(result, "numel"):
            self._scaled = (result, outputs)
        return result

    def _unscale(
        self, original: Any, scaler: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(scaler, optimizer, *args, **kwargs)
        if not self.is_elsewhere:
            self.quietly(self.norms.unscaled, optimizer)
        return result

    def _scaler_step(
        self, original: Any, scaler: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        steps = self._steps
        result = original(scaler, optimizer, *args, **kwargs)
        if not self._primary.may_be(optimizer):
            self.quietly(self._another_ended, optimizer)
        elif steps == self._steps:
            self.norms.skipped(optimizer)
            self.quietly(self._recorder.skipped)
        return result

    def _exit(self, pid: int, original: Any, *args: Any, **kwargs: Any) -> None:
        if os.getpid() == pid:  # and not a child that was forked
            self.quietly(self.jobs.first._end)
        original(*args, **kwargs)

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
            if not self.is_elsewhere:
                self.quietly(self._batches_ended, iterator)
            raise
        if self.is_elsewhere:
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
        self._recorder.batch_came(asked_for, size_in(batch), source)
        self._evaluations.batch = source.iterator

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
        if self.norms.any_unstepped:
            self.norms.begins_to_step(optimizer)
        is_primary = job.sets_step(optimizer, fresh=fresh or closure)
        if is_primary:
            job.steps_by(optimizer)
        if self._backward_depth:
            # Optimizers that step within backward, one per parameter: the step of the run
            # ends when backward does, and its loss is known. The thread may be autograd's.
            if is_primary:
                self._stepped = optimizer, host_rates(optimizer.param_groups)
            self._recorder.before_update(optimizer, collects=False)
            return
        if not is_primary:
            self._recorder.before_update(optimizer, collects=not self.is_elsewhere)
            return
        self._thread = get_ident()
        self.quietly(self.norms.update_begins, optimizer, has_closure=closure)
        self._loop.optimizer_begins(optimizer, args, kwargs)

    def _optimizer_ended(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.quietly(self._recorder.control.updates.put_back, optimizer)
        if self._backward_depth:
            return
        self._fresh = self._by_grad = False  # also of what a closure has called
        if self._primary.current is optimizer:
            self.quietly(self._end_step, optimizer, args, kwargs)
        else:
            self.quietly(self._another_ended, optimizer)

    def _another_ended(self, optimizer: Any) -> None:
        if not (self.is_elsewhere or self.jobs.is_seed_optimizer(optimizer)):
            self._recorder.under_way.losses.another_stepped()
            self._evaluations.optimizer_stepped()

    def _end_step(self, optimizer: Any, args: Any = (), kwargs: Any = None) -> None:
        self._steps += 1
        self.quietly(self.norms.step_ended, optimizer)
        if not self._evaluations.ends_as_ever():
            self._evaluations.step_ended(self._recorder.under_way.losses)
        self.quietly(self._tell_copy)
        self._loop.optimizer_ended(optimizer, args, kwargs or {})

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is another thread than the one that trains, as far as is known."""
        return self._thread not in (0, get_ident())

    def quietly(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``work`` returns; None when it raises, which is told once."""
        try:
            return work(*args, **kwargs)
        except Exception:
            tell_once("a part of a step could not be recorded")
            return None
