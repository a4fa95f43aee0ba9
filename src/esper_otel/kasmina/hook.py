"""Hook: a slot's attachment to the host, through which a seed joins a submodule's output.

While a seed grows, its module lives outside the host's tree, so the host's ``state_dict``,
parameters and modules are what they were. The hook is there while such a seed is, and for
the first call, to see what comes out; a dormant slot has none, because one hook that does
nothing takes about 10 µs of a step, eight of them 1 % of a step of 7 ms. A seed that is a
fossil is part of the tree (:mod:`~esper_otel.kasmina.fossils`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter_ns
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle

from esper_otel.kasmina.blending import Blend
from esper_otel.kasmina.fossils import (
    Fossil,
    Joint,
    first_tensor,
    flatten,
    install,
    install_in_copies,
    kind_of,
    mark,
    remove,
    unmark,
    with_first,
)
from esper_otel.kasmina.isolation import (
    GradientTally,
    Paths,
    Statistics,
    isolated_input,
    joint_inputs,
    straight_through,
)
from esper_otel.kasmina.kernels import NOT_FINITE, Activation, misfit
from esper_otel.kasmina.living import (
    ForwardHook,
    Seeded,
    is_transformed,
    refuse_trace,
    tracer_at_work,
)

ALTERED = "changed its input"
"""Reason when a seed worked in place on what it was given; it is not called again."""

_ENOUGH: tuple[type[Exception], ...] = tuple(
    filter(None, [getattr(checkpoint, "_StopRecomputationError", None)])
)
"""How gradient checkpointing ends a forward that it computes again, out of any operation,
once backward has what it needs: no failure of the seed that was called last."""


class SlotHook:
    """The hook on one submodule of a host, and the seed's module that it calls.

    ``module`` is the submodule called ``name``. The methods that change what a forward
    does are called between steps. Nothing the hook does raises in training: a seed that
    fails, or whose output cannot stand in the activation's place, is left out of that
    forward, and ``fallback`` says why. What would write the host down without a seed that
    takes part in it is a :class:`GardenError`.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.activation: Activation | None = None
        """What comes out of the module, from its first call on."""
        self.trouble = ""
        """Why no seed can live here; empty when one can, or before the first call."""
        self.calls = 0
        """Calls of the seed in this step."""
        self.latency_ms = 0.0
        """The newest call of the seed on the host's side, in milliseconds."""
        self.fallback = ""
        """Why a call in this step went on without the seed; empty when none did."""
        self.occupant = ""
        """The seed in it and its stage, in words."""
        self.returns = ""
        """The kind of what comes out of the module, empty before the first call."""
        self._module = module
        self._refused = ""
        self._joint: Joint | None = None
        self._seed: nn.Module | None = None
        self._call: Callable[[Tensor], Any] | None = None
        self._blend: Blend | None = None
        self._isolated = True
        self._alpha = 0.0
        self.banned = ""
        """Why the seed is not called any more; empty while it is."""
        self._finite: Tensor | None = None
        self._tally = GradientTally(sampled=False)
        self._hook = ForwardHook(self)
        self._handle: RemovableHandle | None = None
        self._listen()

    # What is in it.

    @property
    def called(self) -> bool:
        """Whether its module was ever called."""
        return self.activation is not None or self.trouble != ""

    @property
    def occupied(self) -> bool:
        """Whether a seed is in it."""
        return self._seed is not None

    @property
    def alpha(self) -> float:
        """How much of the seed there is in the output, 0.0 while it is isolated."""
        return self._alpha

    @property
    def seed(self) -> nn.Module | None:
        """The seed's module."""
        return self._seed

    @property
    def blend(self) -> Blend | None:
        """How it joins the host."""
        return self._blend

    @property
    def takes_part(self) -> bool:
        """Whether a seed that is no fossil changes what the host computes."""
        living = self._seed is not None and self._joint is None
        return living and not self._isolated and self._alpha > 0.0 and not self.banned

    def parameters(self) -> Iterator[nn.Parameter]:
        """What there is to train: of the seed and of its blend."""
        for module in (self._seed, self._blend):
            if module is not None:
                yield from module.parameters()

    def attach(self, seed: nn.Module, blend: Blend) -> None:
        """Put a seed in, isolated. Raises ``ValueError`` when there is one already."""
        if self._seed is not None:
            raise ValueError(f"slot {self.name!r}: expected it empty, it has a seed")
        self._seed = self._call = seed
        self._blend = blend
        if self.activation is not None:
            blend.to(self.activation.device, self.activation.dtype)
        self.latency_ms = 0.0
        self.isolate()
        self.start_step(sample=False)
        self._listen()

    def isolate(self) -> None:
        """Keep the seed from the host: it learns, and the host does not feel it."""
        self._isolated = True
        self._alpha = 0.0

    def set_alpha(self, alpha: float) -> None:
        """Make the seed ``alpha`` of the output. Raises ``ValueError`` outside [0, 1]."""
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"slot {self.name!r}: alpha={alpha!r}: expected 0 to 1")
        self._isolated = False
        self._alpha = float(alpha)

    def set_call(self, call: Callable[[Tensor], Any]) -> None:
        """Call the seed by ``call`` from now on, for example compiled; its parameters stay."""
        if self._seed is not None:
            self._call = call

    def fossilize(self, followers: Iterable[weakref.ref[nn.Module]] = ()) -> None:
        """Make the seed a submodule of the host, as it is now; one that is banned stays out.

        ``followers`` are copies of the host: each gets a copy of the fossil.
        """
        seed, blend = self._seed, self._blend
        if seed is None or blend is None or self._joint is not None or self.banned:
            return
        self._unlisten()
        fossil = flatten(Fossil(seed, blend, self._alpha))
        self._joint = install(self._module, fossil, self.returns)
        install_in_copies(followers, self.name, fossil, self.returns)

    def release(self) -> None:
        """Take the seed out; nothing of it is kept."""
        if self._joint is not None:
            remove(self._module, self._joint)
            self._joint = None
        self._seed = self._call = self._blend = self._finite = None
        self.banned = ""
        if self.called:
            self._unlisten()
        self.isolate()
        self.start_step(sample=False)

    def uproot(self) -> None:
        """Take the seed out and the hook off: the host is what it was."""
        self.release()
        self._unlisten()
        self._hook.owner = None

    # Between two steps.

    def start_step(self, sample: bool) -> None:
        """A step begins; ``sample``: take isolation statistics in it."""
        self._tally = GradientTally(sample)
        self._finite = None
        self.calls = 0
        self.fallback = "" if self._seed is None else self._refused

    @property
    def leaked(self) -> bool:
        """Whether the isolated seed's gradient reached the host in this step."""
        return self._tally.leaked

    def statistics(self) -> Statistics | None:
        """What came back in this step; None when it was not sampled or had no backward."""
        return self._tally.statistics()

    @property
    def finite(self) -> Tensor | None:
        """Whether all of this step's outputs of the seed were finite, still on the device.

        None on the CPU, where a value that is not finite is a ``fallback`` at once, and
        when there was no call.
        """
        return self._finite

    # The hook, and what it does.

    def _listen(self) -> None:
        if self._handle is not None:
            return
        self._handle = self._module.register_forward_hook(self._hook)
        mark(self._module, Seeded)

    def _unlisten(self) -> None:
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        unmark(self._module, Seeded)

    def alter_output(self, module: nn.Module, output: Any) -> Any:
        """What takes the place of ``output``; None when it stays."""
        tool = tracer_at_work(output)
        if tool:
            refuse_trace(self, tool)
            return None
        host = first_tensor(output)
        if host is not None and is_transformed(host):
            return self._plainly(output, host) if self.takes_part else None
        if self.activation is None and not self._refused:
            self._observe(host, output)
        if self._seed is None:
            self._unlisten()
            return None
        if host is None or self.banned:
            self.fallback = self.banned or "the slot returned no tensor"
            return None
        if self._isolated:
            # Nobody learns in evaluation, so an isolated seed has no part in it.
            if not (module.training and torch.is_grad_enabled()):
                return None
        elif self._alpha == 0.0:
            return None
        try:
            joined = self._join(module, host)
        except _ENOUGH:
            raise
        except Exception as error:
            self.fallback = f"raised {type(error).__name__}: {error}"
            return None
        return None if joined is None else with_first(output, joined)

    def refuse(self, reason: str, remedy: str) -> None:
        """The host is called in a way that has no place for a seed, from now on."""
        self._refused = reason
        self.activation = None
        self.banned = self.fallback = reason
        self.trouble = f"slot {self.name!r} {reason}: {remedy}"

    def _plainly(self, output: Any, host: Tensor) -> Any:
        """As a fossil would: within ``torch.func`` nothing can be read, nor noted backward."""
        assert self._seed is not None
        assert self._blend is not None
        return with_first(output, Fossil(self._seed, self._blend, self._alpha)(host))

    def _observe(self, host: Tensor | None, output: Any) -> None:
        if host is None:
            self.trouble = (
                f"slot {self.name!r} returns a {type(output).__name__}: "
                "expected a tensor, or a tuple or list that begins with one"
            )
        elif not host.is_floating_point():
            self.trouble = f"slot {self.name!r} returns {host.dtype}: expected floating point"
        elif host.dim() < 2:
            self.trouble = (
                f"slot {self.name!r} returns shape {tuple(host.shape)}: "
                "expected a batch and at least one dimension more"
            )
        else:
            self.trouble = ""
            self.returns = kind_of(output)
            self.activation = Activation(host.shape, _parameter_dtype(host), host.device)
            return

    def _join(self, module: nn.Module, host: Tensor) -> Any:
        """The activation with the seed's part in it; None when it could take no part."""
        seed, blend = self._seed, self._blend
        assert seed is not None
        assert blend is not None
        self._move_to(seed, blend, module, host)
        paths = Paths(self._tally, self._isolated)
        given, kept = host, host
        if self._isolated:
            given = isolated_input(host, paths)
        elif torch.is_grad_enabled():
            kept, given = joint_inputs(host, paths)
        made = self._call_seed(given, host)
        return None if made is None else self._mix(blend, host, kept, made, paths)

    def _call_seed(self, given: Tensor, host: Tensor) -> Tensor | None:
        """What the seed makes of ``given``; None when that cannot stand for ``host``."""
        call = self._call
        assert call is not None
        version = None if host.is_inference() else host._version

        began = perf_counter_ns()
        made = call(given)
        self.latency_ms = (perf_counter_ns() - began) / 1e6
        self.calls += 1

        if version is not None and host._version != version:
            self.banned = self.fallback = ALTERED
            return None
        if isinstance(made, Tensor) and made.is_floating_point() and _autocasts(host):
            made = made.to(host.dtype)
        reason = misfit(made, host)
        if reason:
            self.fallback = reason
            return None
        return cast(Tensor, made)

    def _mix(self, blend: Blend, host: Tensor, kept: Tensor, made: Tensor, paths: Paths) -> Any:
        """``made`` with the host's side ``kept``; ``host`` where ``made`` is not finite."""
        # A sum shows every NaN and infinity, and is one pass that writes nothing.
        finite = torch.isfinite(made.detach().sum(dtype=torch.float32))
        at_once = _is_known_at_once(finite)
        if not at_once:
            self._finite = finite if self._finite is None else self._finite & finite
        elif not bool(finite):
            self.fallback = NOT_FINITE
            return None
        if self._isolated:
            return straight_through(host, made, paths)
        if at_once:
            return blend(kept, made, self._alpha)
        # The device knows, and chooses; nobody waits for what it found.
        paths.finite = finite
        made = torch.where(finite, made, host.detach())
        return torch.where(finite, blend(kept, made, self._alpha), host)

    def _move_to(self, seed: nn.Module, blend: Blend, module: nn.Module, host: Tensor) -> None:
        """Let the seed be where the host is: its mode, its device, its dtype."""
        if seed.training != module.training:
            seed.train(module.training)
        first = next(self.parameters(), None)
        if first is None:
            return
        if first.device != host.device or first.dtype != _parameter_dtype(host):
            seed.to(host.device, _parameter_dtype(host))
            blend.to(host.device, _parameter_dtype(host))


def _is_known_at_once(value: Tensor) -> bool:
    """Whether reading ``value`` waits for no device."""
    return value.device.type == "cpu"


def _autocasts(host: Tensor) -> bool:
    return torch.is_autocast_enabled(host.device.type)


def _parameter_dtype(host: Tensor) -> torch.dtype:
    """In which dtype a seed for this activation keeps its parameters."""
    return torch.float32 if _autocasts(host) else host.dtype
