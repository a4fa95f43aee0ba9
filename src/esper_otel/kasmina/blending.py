"""Blending: how a seed's output joins the host's, and how its weight alpha rises.

A blend is a module called with (host, seed, alpha): two tensors of one shape and dtype,
and a number from 0 to 1. Alpha is a plain number and no tensor: it is the host side that
decides on it, once per step, so there is nothing to read from a device; and a graph that
remembers it, of a step whose backward comes late, is not spoilt when it advances.

At alpha 0 every blend returns the host tensor itself, untouched. What the others return
is never an alias of an input, so that the host may work on it in place.

A schedule is a function of (step, steps, temperature). It gives exactly 0.0 at step 0
and before, exactly 1.0 at step ``steps`` and after, and never falls in between. It raises
``ValueError`` for ``steps`` below 1 and for a temperature that is not positive.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, isfinite, pi, tanh
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

Schedule = Callable[[int, int, float], float]

_REACH = 6.0
"""The sigmoid runs over [-6, 6] at temperature 1: from 0.25 % to 99.75 % before scaling."""


class Blend(nn.Module):
    """What all blends are; subclasses say how much of the seed there is, per element."""

    name: ClassVar[str]
    """What settings call it; see :data:`BLENDS`."""

    def forward(self, host: Tensor, seed: Tensor, alpha: float) -> Tensor:
        """The blend, shaped like ``host``; ``host`` itself at alpha 0."""
        return host if alpha == 0.0 else self.mix(host, seed, alpha)

    def mix(self, host: Tensor, seed: Tensor, alpha: float) -> Tensor:
        """The same for an alpha above 0."""
        raise NotImplementedError


class Convex(Blend):
    """(1 - alpha) host + alpha seed: the seed takes the host's place.

    At alpha 1 it is a copy of the seed's output. For seeds whose output is a whole
    activation, which is what every blueprint here makes.
    """

    name = "convex"

    def mix(self, host: Tensor, seed: Tensor, alpha: float) -> Tensor:
        """(1 - alpha) host + alpha seed."""
        # The host's infinity times 0 would be NaN.
        return seed.clone() if alpha == 1.0 else (1.0 - alpha) * host + alpha * seed


class Residual(Blend):
    """host + alpha seed: the seed is added and the host stays whole.

    For seeds that compute a correction, not an activation.
    """

    name = "residual"

    def mix(self, host: Tensor, seed: Tensor, alpha: float) -> Tensor:
        """host + alpha seed."""
        return host + alpha * seed


class ChannelWise(Blend):
    """host + alpha gate (seed - host) with one gate in [0, 1] per channel.

    ``gates`` None learns them, as a sigmoid that starts in the middle; else they are
    fixed. ``shape`` is the activation's; its channels lie in ``dim``: by default the
    second for images (four dimensions and more), the last for all else.
    Raises ``ValueError`` for gates of another number or outside [0, 1].
    """

    name = "channelwise"
    gates: Tensor

    def __init__(
        self,
        shape: torch.Size | tuple[int, ...],
        gates: Tensor | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        dim = channel_dim(len(shape)) if dim is None else dim % len(shape)
        channels = shape[dim]
        self._view = [channels if d == dim else 1 for d in range(len(shape))]
        self._learns = gates is None
        if gates is None:
            self.logits = nn.Parameter(torch.zeros(channels))
            return
        if gates.shape != (channels,):
            raise ValueError(
                f"gates of shape {tuple(gates.shape)}: expected ({channels},), one per channel"
            )
        if not bool(((gates >= 0) & (gates <= 1)).all()):
            raise ValueError("gates: expected numbers from 0 to 1")
        self.register_buffer("gates", gates.detach().clone())

    def mix(self, host: Tensor, seed: Tensor, alpha: float) -> Tensor:
        """Host + alpha gate (seed - host)."""
        gates = torch.sigmoid(self.logits) if self._learns else self.gates
        return torch.lerp(host, seed, (alpha * gates).to(host.dtype).view(self._view))


class ConfidenceGated(Blend):
    """host + alpha gate (seed - host), the gate being how far the two agree.

    gate = (1 + cosine(host, seed)) / 2 over the channels, for every sample and position:
    1 where the seed points the host's way, 0 where it points the other way. The form is a
    highway network's, y = T s + (1 - T) h (Srivastava et al., "Highway Networks", 2015,
    arXiv 1505.00387); that T is the cosine and not learned is our choice. The gate is
    part of the graph: a seed can learn to be trusted.
    """

    name = "confidence"

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self._dim = dim

    def mix(self, host: Tensor, seed: Tensor, alpha: float) -> Tensor:
        """Host + alpha gate (seed - host)."""
        dim = channel_dim(host.dim()) if self._dim is None else self._dim
        cosine = nn.functional.cosine_similarity(host, seed, dim=dim).unsqueeze(dim)
        gate = alpha * (1.0 + cosine) / 2.0
        return torch.lerp(host, seed, gate.to(host.dtype))


BLENDS: dict[str, Callable[[torch.Size | tuple[int, ...]], Blend]] = {
    "convex": lambda shape: Convex(),
    "residual": lambda shape: Residual(),
    "channelwise": ChannelWise,
    "confidence": lambda shape: ConfidenceGated(channel_dim(len(shape))),
}
"""Blends for an activation of a shape, by the name that settings give them."""


def channel_dim(rank: int) -> int:
    """Where the channels of an activation with ``rank`` dimensions lie."""
    return 1 if rank >= 4 else rank - 1


def linear(step: int, steps: int, temperature: float = 1.0) -> float:
    """The same amount every step; ``temperature`` has no meaning here."""
    return _share(step, steps, temperature)


def cosine(step: int, steps: int, temperature: float = 1.0) -> float:
    """Half a period of a cosine; ``temperature`` has no meaning here.

    The annealing of Loshchilov and Hutter, "SGDR" (2017), arXiv 1608.03983, upside down.
    """
    share = _share(step, steps, temperature)
    return (1.0 - cos(pi * share)) / 2.0 if 0.0 < share < 1.0 else share


def sigmoid(step: int, steps: int, temperature: float = 1.0) -> float:
    """A logistic curve, scaled so that its ends are 0 and 1.

    A low ``temperature`` makes it a jump in the middle, a high one a straight line. In
    tanh, which does not overflow: logistic(x) = (1 + tanh(x / 2)) / 2.
    """
    share = _share(step, steps, temperature)
    if not 0.0 < share < 1.0:
        return share
    end = _REACH / temperature / 2.0
    # So hot that tanh rounds to nothing: the limit is the straight line.
    if tanh(end) == 0.0:
        return share
    return min(max((1.0 + tanh(end * (2.0 * share - 1.0)) / tanh(end)) / 2.0, 0.0), 1.0)


SCHEDULES: dict[str, Schedule] = {"linear": linear, "cosine": cosine, "sigmoid": sigmoid}
"""Schedules by the name that settings give them."""


class AlphaSchedule(NamedTuple):
    """How one alpha goes from 0 to 1: by which curve, its length and temperature.

    ``curve`` is one of :data:`SCHEDULES`. A seed keeps the schedule it began to blend by,
    whatever the settings are by then.
    """

    curve: str
    steps: int
    temperature: float

    def alpha(self, step: int) -> float:
        """Alpha after ``step`` steps; raises as schedules do, ``KeyError`` for the name."""
        return SCHEDULES[self.curve](step, self.steps, self.temperature)


def _share(step: int, steps: int, temperature: float) -> float:
    if steps < 1:
        raise ValueError(f"steps={steps!r}: expected at least 1")
    if not (temperature > 0.0 and isfinite(temperature)):
        raise ValueError(f"temperature={temperature!r}: expected a number above 0")
    return min(max(step / steps, 0.0), 1.0)
