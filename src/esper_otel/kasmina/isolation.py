"""Isolation: a seed learns from the real loss, without an effect on the host.

The seed sees a detached copy of the slot's activation *h*. Its output *s* joins by a
straight-through step whose value is *h*, to the bit, and which hands the gradient of *h*
to both, unchanged: h + (s - s.detach()) without its arithmetic, which would turn -0.0
into 0.0 and everything into NaN once s is infinite. (The estimator is that of Bengio et
al. 2013, arXiv 1308.3432, with the roles of value and gradient kept apart.)

What comes back is told apart by two gates at the slot's input, one on the host's path and
one on the seed's: functions that do nothing forward and take note backward. The seed's
gate lies *before* the detach. A gradient that passes it while the seed is isolated is a
leak, and that it came, not what it was, is the proof: so nothing is read from a device,
and a leak is known during the very backward in which it happens.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

log = logging.getLogger("esper_otel")


class Statistics(NamedTuple):
    """What came back to the slot's input in one step; 0-d tensors on its device.

    ``host_norm`` and ``seed_norm`` are L2 norms of the gradient with respect to the
    activation through the host's path and through the seed's, ``dot`` their inner
    product; over all calls of the step. Summed in float32 at least. Of a scaled loss
    (GradScaler) they have its scale.
    """

    dot: Tensor
    host_norm: Tensor
    seed_norm: Tensor


class GradientTally:
    """What all calls of one slot in one step had come back.

    ``sampled``: whether statistics are wanted of this step; a leak is noted either way.
    Never raises: it is called in the middle of the user's backward.
    """

    __slots__ = ("_dot", "_host", "_seed", "failed", "leaked", "sampled")

    def __init__(self, sampled: bool) -> None:
        self.sampled = sampled
        self.leaked = False
        """Whether a gradient came through the seed's path while it had to be isolated."""
        self.failed = False
        """Whether the statistics of this step could not be computed."""
        self._host: Tensor | None = None
        self._seed: Tensor | None = None
        self._dot: Tensor | None = None

    def add(self, host: Tensor | None, seed: Tensor | None, dot: Tensor | None) -> None:
        """Squares of norms and an inner product, of one call or of a part of it."""
        self._host = _plus(self._host, host)
        self._seed = _plus(self._seed, seed)
        self._dot = _plus(self._dot, dot)

    def statistics(self) -> Statistics | None:
        """The statistics, None when they were not asked for or nothing came back."""
        came = self._seed if self._host is None else self._host
        if came is None or self.failed:
            return None
        nothing = torch.zeros_like(came)
        return Statistics(
            dot=nothing if self._dot is None else self._dot,
            host_norm=nothing if self._host is None else self._host.sqrt(),
            seed_norm=nothing if self._seed is None else self._seed.sqrt(),
        )


class Paths:
    """The two paths from the slot's input of one call, and what came back on each."""

    __slots__ = ("_host", "_isolated", "_seed", "_tally", "finite")

    def __init__(self, tally: GradientTally, isolated: bool) -> None:
        self.finite: Tensor | None = None
        """On a device: whether the seed's output was finite, see :meth:`seed_came`."""
        self._tally = tally
        self._isolated = isolated
        self._host: Tensor | None = None
        self._seed: Tensor | None = None

    def host_came(self, gradient: Tensor) -> None:
        """The gradient of the host's path."""
        if self._tally.sampled:
            self._take(gradient, None)

    def seed_came(self, gradient: Tensor) -> Tensor:
        """The gradient of the seed's path; while it is isolated there must be none.

        Returns what goes on to the host: nothing from a seed whose output was left out
        because it was not finite, for 0 times NaN is NaN all the way back.
        """
        if self._isolated:
            self._tally.leaked = True
        if self.finite is not None:
            gradient = torch.where(self.finite, gradient, 0.0)
        if self._tally.sampled:
            self._take(None, gradient)
        return gradient

    def _take(self, host: Tensor | None, seed: Tensor | None) -> None:
        tally = self._tally
        try:
            with torch.no_grad():
                tally.add(
                    None if host is None else inner_product(host, host),
                    None if seed is None else inner_product(seed, seed),
                    self._dot(host, seed),
                )
        except Exception:
            if not tally.failed:
                log.exception("isolation statistics of this step are omitted")
            tally.failed = True

    def _dot(self, host: Tensor | None, seed: Tensor | None) -> Tensor | None:
        """Whichever comes first is kept until the other is there."""
        host = self._host if host is None else host
        seed = self._seed if seed is None else seed
        if host is not None and seed is not None:
            self._host = self._seed = None
            return inner_product(host, seed)
        self._host, self._seed = host, seed
        return None


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Of two tensors of one shape, as a 0-d tensor, in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.detach().to(dtype) * b.detach().to(dtype)).sum()


def cut(activation: Tensor) -> Tensor:
    """What an isolated seed sees: the activation without its past."""
    return activation.detach()


def isolated_input(host: Tensor, paths: Paths) -> Tensor:
    """The input of an isolated seed."""
    return cut(_SeedGate.apply(host, paths))


def straight_through(host: Tensor, seed: Tensor, paths: Paths) -> Tensor:
    """``host`` in value, and the gradient of it to ``host`` and to ``seed`` as it is.

    A copy: the host may go on in place, and what the seed remembers for its backward is
    the original. ``seed`` must have the shape and dtype of ``host``.
    """
    out: Tensor = _StraightThrough.apply(host, seed, paths)
    return out


def joint_inputs(host: Tensor, paths: Paths) -> tuple[Tensor, Tensor]:
    """The activation for the host's side of a blend, and the same for the seed."""
    return _HostGate.apply(host, paths), _SeedGate.apply(host, paths)


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, host: Tensor, seed: Tensor, paths: Paths) -> Tensor:
        ctx.paths = paths
        return host.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.paths.host_came(gradient)
        return gradient, gradient, None


class _HostGate(Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, paths: Paths) -> Tensor:
        ctx.paths = paths
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.paths.host_came(gradient)
        return gradient, None


class _SeedGate(Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, paths: Paths) -> Tensor:
        ctx.paths = paths
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.paths.seed_came(gradient), None


def _plus(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    if term is None or total is None:
        return total if term is None else term
    return total + term
