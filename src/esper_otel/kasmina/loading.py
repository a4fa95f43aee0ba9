"""Loading: how the kernel of a seed comes into its slot, and its compiled code after it."""

from __future__ import annotations

from torch import nn

from esper_otel.kasmina.blending import BLENDS
from esper_otel.kasmina.blueprints import lookup
from esper_otel.kasmina.context import GardenContext, SlotEvents
from esper_otel.kasmina.hook import SlotHook
from esper_otel.kasmina.host import learning_rate_of
from esper_otel.kasmina.kernels import Activation, Compilation, Fetch
from esper_otel.kasmina.seed import Seed, all_finite
from esper_otel.leyline import events
from esper_otel.leyline.decisions import Severity

MOST_ATTEMPTS = 2
"""Fetches of one kernel. One that missed its budget may have been kept from the processors
by others, which cannot be told from a slow blueprint the first time."""


class KernelLoader:
    """Loads kernels into the slot of ``hook``, which has been called before any is requested.

    Nothing here waits: what has come is found by polling at the end of a step.
    """

    __slots__ = ("_compilation", "_context", "_events", "_hook", "fetch")

    def __init__(self, hook: SlotHook, context: GardenContext, slot_events: SlotEvents) -> None:
        self.fetch: Fetch | None = None
        """That of the seed's kernel, while it is under way."""
        self._compilation: Compilation | None = None
        self._hook = hook
        self._context = context
        self._events = slot_events

    def request(self, seed: Seed) -> None:
        """Fetch the kernel of ``seed`` from now on."""
        self.fetch = self._context.fetcher.request(
            lookup(seed.blueprint), self._activation, seed.rng_seed
        )

    def compile(self, module: nn.Module) -> None:
        """Have ``module``, the kernel that is in the slot, compiled where somebody does."""
        self._compilation = self._context.fetcher.compile(module, self._activation)

    def cancel(self) -> None:
        """Ignore whatever is still to come."""
        self.fetch = self._compilation = None

    def poll(self, seed: Seed) -> None:
        """Put the kernel into the slot if it has come; one that was late gets another try."""
        fetch = self.fetch
        if fetch is None or not fetch.done():
            return
        self._context.fetch_ms = seed.kernel_ms = fetch.latency_ms
        if fetch.late and seed.attempts < MOST_ATTEMPTS:
            seed.attempts += 1
            self.request(seed)
            text = f"the kernel of {seed.id} is fetched once more: it {fetch.reason}"
            self._events.add(
                seed,
                events.RETRIED,
                Severity.WARNING,
                text,
                reason=fetch.reason,
                attempts=seed.attempts,
            )
            return
        self.fetch = None
        if fetch.module is None:
            seed.trouble = fetch.reason
            self._events.fell_back(seed, fetch.reason)
            return
        self._attach(seed, fetch.module)

    def poll_compiled(self, seed: Seed) -> None:
        """Call the kernel by its compiled code from now on, if that has come."""
        compilation = self._compilation
        if compilation is None or not compilation.done():
            return
        self._compilation = None
        call, reason = compilation.call, compilation.reason
        if call is not None:
            self._hook.set_call(call)
        elif not reason:
            return
        text = f"{seed.id} stays uncompiled: {reason}"
        self._events.add(
            seed,
            events.COMPILED,
            Severity.WARNING if reason else Severity.NORMAL,
            text if reason else f"{seed.id} is compiled",
            passed=not reason,
            reason=reason,
        )

    def check_finite(self, seed: Seed) -> None:
        """Begin to find out whether the parameters in the slot are finite."""
        seed.params_finite = self._context.read(all_finite(self._trained()).float())

    @property
    def _activation(self) -> Activation:
        activation = self._hook.activation
        assert activation is not None
        return activation

    def _trained(self) -> list[nn.Parameter]:
        return [each for each in self._hook.parameters() if each.requires_grad]

    def _attach(self, seed: Seed, module: nn.Module) -> None:
        context = self._context
        make_blend = BLENDS[context.settings.blending]
        self._hook.attach(module, make_blend(self._activation.shape))
        self.check_finite(seed)
        rate = learning_rate_of(context.host_optimizer())
        seed.optimizer = context.make_optimizer(self._trained(), rate)
        self.compile(module)
