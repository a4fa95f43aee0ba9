"""Arrival: how the kernel of a seed comes into its slot, and its compiled code after it."""

from __future__ import annotations

from torch import nn

from esper_otel.kasmina import optimizers
from esper_otel.kasmina.blending import BLENDS
from esper_otel.kasmina.blueprints import lookup
from esper_otel.kasmina.ground import Ground
from esper_otel.kasmina.kernels import Activation, Compilation, Fetch
from esper_otel.kasmina.seed import Seed, finite
from esper_otel.kasmina.slot import Slot
from esper_otel.kasmina.telling import Voice
from esper_otel.leyline import events
from esper_otel.leyline.decisions import Severity

MOST_ATTEMPTS = 2
"""Fetches of one kernel. One that missed its budget may have been kept from the processors
by others, which cannot be told from a slow blueprint the first time."""


class Arrival:
    """What is on its way to ``slot``, which has been called before anything is.

    Nothing here waits: what has come is found at the end of a step.
    """

    __slots__ = ("_compilation", "_ground", "_slot", "_voice", "fetch")

    def __init__(self, slot: Slot, ground: Ground, voice: Voice) -> None:
        self.fetch: Fetch | None = None
        """That of the seed's kernel, while it is under way."""
        self._compilation: Compilation | None = None
        self._slot = slot
        self._ground = ground
        self._voice = voice

    def begin(self, seed: Seed) -> None:
        """Fetch the kernel of ``seed`` from now on."""
        self.fetch = self._ground.fetcher.request(
            lookup(seed.blueprint), self._activation, seed.origin
        )

    def compile(self, module: nn.Module) -> None:
        """Have ``module``, the kernel that is in the slot, compiled where somebody does."""
        self._compilation = self._ground.fetcher.compile(module, self._activation)

    def forget(self) -> None:
        """Whatever comes, nobody wants it any more."""
        self.fetch = self._compilation = None

    def look_for_kernel(self, seed: Seed) -> None:
        """Put the kernel into the slot if it has come; one that was late gets another try."""
        fetch = self.fetch
        if fetch is None or not fetch.ready():
            return
        self._ground.fetch_ms = seed.kernel_ms = fetch.latency_ms
        if fetch.late and seed.attempts < MOST_ATTEMPTS:
            seed.attempts += 1
            self.begin(seed)
            text = f"the kernel of {seed.id} is fetched once more: it {fetch.reason}"
            self._voice.tell(
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
            self._voice.fell_back(seed, fetch.reason)
            return
        self._attach(seed, fetch.module)

    def look_for_compiled(self, seed: Seed) -> None:
        """Call the kernel by its compiled code from now on, if that has come."""
        compilation = self._compilation
        if compilation is None or not compilation.ready():
            return
        self._compilation = None
        call, reason = compilation.call, compilation.reason
        if call is not None:
            self._slot.call_by(call)
        elif not reason:
            return
        text = f"{seed.id} goes on as it is, it was not compiled: {reason}"
        self._voice.tell(
            seed,
            events.COMPILED,
            Severity.WARNING if reason else Severity.NORMAL,
            text if reason else f"{seed.id} is compiled",
            passed=not reason,
            reason=reason,
        )

    def examine(self, seed: Seed) -> None:
        """Begin to find out whether the parameters in the slot are finite."""
        seed.sane = self._ground.read(finite(self._trained()).float())

    @property
    def _activation(self) -> Activation:
        activation = self._slot.activation
        assert activation is not None
        return activation

    def _trained(self) -> list[nn.Parameter]:
        return [each for each in self._slot.parameters() if each.requires_grad]

    def _attach(self, seed: Seed, module: nn.Module) -> None:
        ground = self._ground
        self._slot.attach(module, BLENDS[ground.settings.blending](self._activation.shape))
        self.examine(seed)
        rate = optimizers.rate_of(ground.host())
        seed.optimizer = ground.make_optimizer(self._trained(), rate)
        self.compile(module)
