"""Kernels: building a seed's module off the training thread, within a budget.

A fetch builds the blueprint's module, tries it forward and backward on a small input of
the slot's shape, and says what is wrong with it, if anything. The training thread only
asks whether it is done, which costs a comparison of times. What takes longer than the
budget is abandoned: its result, when it comes at last, is thrown away.

A fetch that hangs keeps its thread, and the next one gets another. In a forked child
there are no threads, and what is asked for runs out of its budget. What no thread can
help: a factory that computes in Python without end holds the interpreter, 5 ms at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter_ns
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from esper_otel.finalization import FinalizingError, no_shutdown_inside
from esper_otel.kasmina.blueprints import Blueprint, PrivateRandomness, lookup

log = logging.getLogger("esper_otel")

Compiler = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
"""Makes something faster to call of a module; the tensor is an input to warm it up with.

It must have compiled forward and backward when it returns, or the first step that calls
the result compiles. Dynamo puts the process's random generators back to where they were
when it began, whoever drew from them meanwhile: a compiler made with ``torch.compile``
repeats random numbers of a host that draws some while it works, and
:func:`esper_otel.kasmina.compiling.compile_apart` does not.
"""

NOT_FINITE = "returned a value that is not finite"

STOPPED = "the fetcher was stopped"

MOST_WORKERS = 4
"""Threads that may be at work, those included whose fetch was abandoned and still hangs."""

WARM_UP_S = 2.0
"""Longest that making a fetcher waits for its first module."""


class Activation(NamedTuple):
    """What a seed is to be built for: ``shape`` batch included, and where it computes.

    ``dtype`` is that of the seed's parameters: float32 under autocast, whatever comes out
    of the slot.
    """

    shape: torch.Size
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


class CompileError(RuntimeError):
    """A module that could not be compiled, and why."""


class MisfitError(ValueError):
    """A module that cannot be a seed, and why."""


class Fetch:
    """One module on its way; see :class:`KernelFetcher`.

    ``done()`` turns true once, and from then on nothing changes: either ``module`` is
    there, or ``reason`` says why it is not.
    """

    def __init__(self, blueprint: str, budget_ms: float, clock: Callable[[], int]) -> None:
        self.blueprint = blueprint
        self.module: nn.Module | None = None
        self.reason = ""
        self.late = False
        """Whether it is given up because it took longer than the budget."""
        self.latency_ms = 0.0
        """Work on the module, in milliseconds; the budget or more when it was abandoned."""
        self._budget_ms = budget_ms
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()
        self._done = False

    def done(self) -> bool:
        """Whether it came or is given up; never waits for the work."""
        if self._done:
            return True
        waited_ms = (self._clock() - self._began) / 1e6
        if waited_ms > self._budget_ms:
            self.set_result(None, "", waited_ms)
        return self._done

    def abandon(self, reason: str) -> None:
        """Give it up; nothing happens when it is done."""
        self.set_result(None, reason, (self._clock() - self._began) / 1e6)

    def set_result(self, module: nn.Module | None, reason: str, latency_ms: float) -> None:
        """Note what came of it; only the first call counts."""
        # Held for these assignments only.
        with self._lock:
            if self._done:
                return
            if latency_ms > self._budget_ms and not reason:
                module, reason = None, f"took longer than {self._budget_ms:g} ms"
                self.late = True
            self.module, self.reason, self.latency_ms = module, reason, latency_ms
            self._done = True


class Compilation:
    """A seed's compiled call on its way; ``call`` stays None when that fails.

    ``reason`` says why then, and is empty where nobody compiles.
    """

    def __init__(self) -> None:
        self.call: Callable[[Tensor], Tensor] | None = None
        self.reason = ""
        self._done = False

    def done(self) -> bool:
        """Whether it came or failed; never waits."""
        return self._done

    def set_result(self, call: Callable[[Tensor], Tensor] | None, reason: str) -> None:
        """Note what came of it."""
        self.call, self.reason = call, reason
        self._done = True


class KernelFetcher:
    """Fetches modules on threads of its own.

    ``budget_ms`` is for building and trying one, from the request on. ``compiler`` makes
    :meth:`compile` work; None: seeds are called as they are. ``clock`` gives monotonic
    nanoseconds. Making one takes some ten milliseconds, in which a first module is built,
    so that the first fetch is not charged with what a process does once.
    """

    def __init__(
        self,
        budget_ms: float = 10.0,
        *,
        compiler: Compiler | None = None,
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        if not budget_ms > 0:
            raise ValueError(f"budget_ms={budget_ms!r}: expected a number above 0")
        self._budget_ms = budget_ms
        self._compiler = compiler
        self._clock = clock
        self._workers = [_Worker()]
        self._fetches: WeakSet[Fetch] = WeakSet()
        """Weakly: each has its module, and a slot that is reset waits until that is gone."""
        self._stopped = False
        warm = threading.Event()
        self._workers[0].do(lambda: _warm_up(warm))
        warm.wait(WARM_UP_S)

    def request(self, blueprint: Blueprint, activation: Activation, seed: int) -> Fetch:
        """Start to build ``blueprint`` for ``activation``; parameters come from ``seed``.

        Returns at once, and never raises: a fetch that cannot start is done already.
        """
        fetch = Fetch(blueprint.name, self._budget_ms, self._clock)
        worker = None if self._stopped else self._idle_worker()
        if worker is None:
            fetch.abandon(STOPPED if self._stopped else f"{MOST_WORKERS} others still run")
            return fetch
        self._fetches.add(fetch)
        worker.do(lambda: self._build(fetch, blueprint, activation, seed))
        return fetch

    def compile(self, module: nn.Module, activation: Activation) -> Compilation:
        """Start to compile ``module``; however long it takes, no step waits for it."""
        compilation = Compilation()
        compiler = self._compiler
        worker = None if self._stopped or compiler is None else self._idle_worker()
        if worker is None or compiler is None:
            why = STOPPED if self._stopped else f"{MOST_WORKERS} others still run"
            compilation.set_result(None, "" if compiler is None else why)
            return compilation
        worker.do(lambda: _compile(compilation, compiler, module, activation))
        return compilation

    def stop(self, timeout_s: float = 0.2) -> None:
        """Give up what is under way, waiting ``timeout_s`` at most for the threads."""
        self._stopped = True
        for fetch in self._fetches:
            fetch.abandon(STOPPED)
        for worker in self._workers:
            worker.quit()
        end = perf_counter_ns() + int(timeout_s * 1e9)
        for worker in self._workers:
            worker.thread.join(max((end - perf_counter_ns()) / 1e9, 0.0))
        self._workers = []

    def _idle_worker(self) -> _Worker | None:
        """One that waits for work, else a new one; None when too many are at it."""
        for worker in self._workers:
            if not worker.busy:
                return worker
        if len(self._workers) >= MOST_WORKERS:
            return None
        self._workers.append(_Worker())
        return self._workers[-1]

    def _build(
        self, fetch: Fetch, blueprint: Blueprint, activation: Activation, seed: int
    ) -> None:
        began = self._clock()
        module: nn.Module | None = None
        reason = ""
        try:
            built = blueprint.build(activation.shape, seed)
            built.to(activation.device, activation.dtype)
            try_out(built, activation)
            module = built
        except MisfitError as error:
            reason = str(error)
        except Exception as error:
            reason = f"raised {type(error).__name__}: {error}"
        fetch.set_result(module, reason, (self._clock() - began) / 1e6)


class _Worker:
    """A daemon thread that does one thing at a time."""

    def __init__(self) -> None:
        self.busy = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="esper-kernel", daemon=True)
        self.thread.start()

    def do(self, work: Callable[[], None]) -> None:
        """Hand it something to do, which must not raise."""
        self.busy = True
        self._work.put(work)

    def quit(self) -> None:
        """End the thread when it has done what it is at."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                with no_shutdown_inside():
                    work()
                    # Or what it was about lives until the next one comes.
                    del work
            except FinalizingError:
                return
            self.busy = False


def _compile(
    compilation: Compilation, compiler: Compiler, module: nn.Module, activation: Activation
) -> None:
    try:
        call = compiler(module, _example(activation, activation.shape[0]))
    except CompileError as error:
        compilation.set_result(None, str(error))
    except Exception as error:
        compilation.set_result(None, f"raised {type(error).__name__}: {error}")
    else:
        compilation.set_result(call, "")


def _warm_up(done: threading.Event) -> None:
    """Do once what the first fetch would otherwise be charged with: 17 ms, then 1 to 5."""
    try:
        shape = torch.Size((2, 4, 4, 4))
        for name in ("bottleneck_conv", "self_attention"):
            try_out(lookup(name).build(shape, 0), Activation(shape))
    except Exception:
        log.debug("the first seed could not be built ahead", exc_info=True)
    finally:
        done.set()


def try_out(module: nn.Module, activation: Activation) -> None:
    """Call ``module`` forward and backward as a slot would; :class:`MisfitError` if it fails.

    On two samples at most; parameters and buffers are afterwards as before. A module that
    draws random numbers is refused: isolated, it would take them from the host. Raises
    whatever the module raises.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise MisfitError("it has no parameter to train")
    given = _example(activation, min(activation.shape[0], 2))
    before = given._version
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    # Grad mode is the thread's own: what the training thread has is not seen here.
    with torch.enable_grad(), PrivateRandomness(None):
        made = module(given)
        reason = misfit(made, given)
        if reason:
            raise MisfitError(reason)
        # Waiting for the value is for this thread to do, not for the training thread.
        if not bool(torch.isfinite(made).all()):
            raise MisfitError(NOT_FINITE)
        if given._version != before:
            raise MisfitError("it changes its input")
        if not made.requires_grad:
            raise MisfitError("its output has no gradient")
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        torch.autograd.grad(made.sum(), trained, allow_unused=True)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


def misfit(made: object, given: Tensor) -> str:
    """Why ``made`` cannot stand in the place of ``given``; empty when it can."""
    if not isinstance(made, Tensor):
        return f"returned a {type(made).__name__}: expected a tensor"
    if made.shape != given.shape:
        return f"returned shape {tuple(made.shape)}: expected {tuple(given.shape)}"
    if made.device != given.device:
        return f"returned a tensor on {made.device}: expected {given.device}"
    if made.dtype != given.dtype:
        return f"returned {made.dtype}: expected {given.dtype}"
    return ""


def _example(activation: Activation, samples: int) -> Tensor:
    """An input such as the slot has, of noise from a generator of its own."""
    shape = (samples, *activation.shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(activation.device, activation.dtype)
