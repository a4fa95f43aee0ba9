"""Blueprints: named plans of seeds, each with the shapes of activation it is for.

A seed built from one of these is a whole replacement for the activation it gets, of the
same shape: the activation plus what the seed adds. What it adds begins small, so that a
new seed is close to identity, but not zero: every parameter has a gradient at once.

Shapes are (batch, channels), (batch, tokens, channels) or (batch, channels, height,
width). A blueprint of your own::

    @blueprint("gated", ranks=(2, 3), about="a gate of its own")
    def gated(shape: torch.Size) -> nn.Module:
        return MyModule(shape[-1])

Its factory may initialise as it likes, with torch's own layers and functions:
:meth:`Blueprint.build` lets all of torch's random numbers in it come from a generator of
the seed's own, so that the run's generators stay where they are, from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from esper_otel.kasmina.blending import channel_dim

Factory = Callable[[torch.Size], nn.Module]

_BEGINNING = 0.1
"""What a new seed adds, over what its layers' usual initialisation would make it."""


class UnknownBlueprintError(KeyError):
    """A blueprint was asked for that nobody registered."""

    def __init__(self, name: str) -> None:
        super().__init__(f"blueprint {name!r}: expected one of {', '.join(registered())}")

    def __str__(self) -> str:
        return str(self.args[0])


class RandomNumbersError(RuntimeError):
    """A seed draws random numbers that cannot come from a generator of its own."""


class Blueprint(NamedTuple):
    """A named plan of a seed.

    ``factory`` makes the module for the shape of an activation, batch included. ``ranks``
    are the numbers of dimensions it is for; ``channels`` is what the number of channels
    must be a multiple of. ``about`` is for people.
    """

    name: str
    factory: Factory
    ranks: frozenset[int]
    channels: int = 1
    about: str = ""

    def misfit(self, shape: torch.Size) -> str:
        """Why it is not for activations of ``shape``; empty when it is."""
        if len(shape) not in self.ranks:
            ranks = " or ".join(map(str, sorted(self.ranks)))
            return (
                f"blueprint {self.name!r} is for {ranks} dimensions, "
                f"the activation has shape {tuple(shape)}"
            )
        count = shape[channel_dim(len(shape))]
        if count % self.channels:
            return (
                f"blueprint {self.name!r} is for multiples of {self.channels} channels, "
                f"the activation of shape {tuple(shape)} has {count}"
            )
        return ""

    def build(self, shape: torch.Size | tuple[int, ...], seed: int) -> nn.Module:
        """A new module on the CPU; the same ``seed`` gives the same parameters.

        No generator of the run is touched. Raises ``ValueError`` for a shape it is not
        for, ``TypeError`` when the factory returns no module, and whatever it raises.
        """
        shape = torch.Size(shape)
        misfit = self.misfit(shape)
        if misfit:
            raise ValueError(misfit)
        generator = torch.Generator().manual_seed(seed)
        with torch.device("cpu"), PrivateRandomness(generator):
            module = self.factory(shape)
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"blueprint {self.name!r} returned a {type(module).__name__}: "
                "expected a torch.nn.Module"
            )
        return module


class PrivateRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, this thread's random numbers come from ``generator``, or are refused.

    Every operator of torch that draws is caught below all modules and functions, so
    ``nn.Linear`` and a factory's own ``normal_`` are the same to it. With ``generator``
    None every draw is refused, and so is one that cannot be given a generator, by
    :class:`RandomNumbersError`; a dropout of probability 0 draws nothing. Python's and
    numpy's generators are not its concern.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = generator

    # Only this thread's stack of modes is touched. The base class also writes flags of
    # the whole process, which it restores in the order of one thread; from a second one
    # they could be left set, and torch.compile would then skip the host's functions.

    def __enter__(self) -> PrivateRandomness:
        _push_mode(self)
        return self

    def __exit__(self, *raised: object) -> None:
        _pop_mode(None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _draws_nothing(
            func, args, kwargs
        ):
            return func(*args, **kwargs)
        overload = _with_generator(func)
        if self._generator is None or overload is None:
            raise RandomNumbersError(f"it draws random numbers ({func})")
        return overload(*args, **{**kwargs, "generator": self._generator})


def _with_generator(func: Any) -> Any:
    """The operator's overload that takes a generator, None when it has none."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    name = "generator" if func._overloadname == "default" else f"{func._overloadname}_generator"
    return getattr(func.overloadpacket, name, None)


def _draws_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is a dropout that is switched off, as in attention without one."""
    given = {
        argument.name: value
        for argument, value in zip(func._schema.arguments, args, strict=False)
    } | kwargs
    names = {argument.name for argument in func._schema.arguments}
    if "dropout_p" in names:
        return not given.get("dropout_p", 0.0)
    if "dropout" in func.overloadpacket.__name__:
        return not given.get("p", 0.0) or given.get("train") is False
    return False


_registry: dict[str, Blueprint] = {}


def blueprint(
    name: str, *, ranks: Iterable[int], channels: int = 1, about: str = ""
) -> Callable[[Factory], Factory]:
    """Register the decorated factory as blueprint ``name``; returns it unchanged.

    Raises ``ValueError`` for a name that is taken by another factory.
    """

    def register(factory: Factory) -> Factory:
        taken = _registry.get(name)
        # The same function again is a module that was reloaded, or a notebook's cell.
        if taken is not None and _origin(taken.factory) != _origin(factory):
            raise ValueError(f"blueprint {name!r} is already registered")
        _registry[name] = Blueprint(name, factory, frozenset(ranks), channels, about)
        return factory

    return register


def registered() -> tuple[str, ...]:
    """Names of all blueprints, in the order in which they were registered."""
    return tuple(_registry)


def lookup(name: str) -> Blueprint:
    """The blueprint of that name; :class:`UnknownBlueprintError` names those there are."""
    found = _registry.get(name)
    if found is None:
        raise UnknownBlueprintError(name)
    return found


def _origin(factory: Factory) -> tuple[str, str]:
    return factory.__module__, factory.__qualname__


class ResidualBlock(nn.Module):
    """The activation plus what ``change`` makes of it."""

    def __init__(self, change: nn.Module) -> None:
        super().__init__()
        self.change = change

    def forward(self, activation: Tensor) -> Tensor:
        """Shaped like ``activation``."""
        return activation + cast(Tensor, self.change(activation))


class SelfAttention(nn.Module):
    """Attention of all positions to all others, over (batch, tokens, channels).

    Vaswani et al., "Attention Is All You Need" (2017), arXiv 1706.03762; normalised
    before and without dropout. ``heads`` must divide ``channels``.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.inward = nn.Linear(channels, 3 * channels)
        self.outward = _beginning_small(nn.Linear(channels, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Shaped like ``tokens``."""
        # One dimension for query, key and value, one for the heads: (3, batch, head, ...).
        parts = self.inward(self.norm(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        changed: Tensor = self.outward(seen.transpose(1, 2).flatten(2))
        return changed


class OverPixels(nn.Module):
    """A module over (batch, tokens, channels) for images, every pixel being a token."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """Shaped like ``images``, (batch, channels, height, width)."""
        tokens = self.inner(images.flatten(2).transpose(1, 2))
        changed: Tensor = tokens.transpose(1, 2).unflatten(2, images.shape[2:])
        return changed


class SqueezeExcite(nn.Module):
    """Every channel scaled by a gate that has seen all channels' means, 1 in the middle.

    Hu et al., "Squeeze-and-Excitation Networks" (2018), arXiv 1709.01507; their gate is
    in (0, 1), here it is doubled, so that a new one changes little.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(channels // 4, 4)
        self.gate = nn.Sequential(
            nn.Linear(channels, squeezed),
            nn.GELU(),
            _beginning_small(nn.Linear(squeezed, channels)),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Shaped like ``images``, (batch, channels, height, width)."""
        gates: Tensor = self.gate(images.mean((2, 3)))
        return images * (2.0 * gates)[:, :, None, None]


@blueprint("residual_mlp", ranks=(2, 3), about="two layers, twice as wide between")
def _residual_mlp(shape: torch.Size) -> nn.Module:
    channels = shape[-1]
    return ResidualBlock(
        nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, 2 * channels),
            nn.GELU(),
            _beginning_small(nn.Linear(2 * channels, channels)),
        )
    )


@blueprint("bottleneck_conv", ranks=(4,), about="1×1, 3×3, 1×1, half as wide between")
def _bottleneck_conv(shape: torch.Size) -> nn.Module:
    """He et al., "Deep Residual Learning" (2016), arXiv 1512.03385; without batch norm."""
    channels = shape[1]
    narrow = max(channels // 2, 4)
    return ResidualBlock(
        nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, narrow, 1),
            nn.GELU(),
            nn.Conv2d(narrow, narrow, 3, padding=1),
            nn.GELU(),
            _beginning_small(nn.Conv2d(narrow, channels, 1)),
        )
    )


@blueprint("depthwise_conv", ranks=(4,), about="3×3 within each channel, then 1×1 across")
def _depthwise_conv(shape: torch.Size) -> nn.Module:
    """Chollet, "Xception" (2017), arXiv 1610.02357."""
    channels = shape[1]
    return ResidualBlock(
        nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.GELU(),
            _beginning_small(nn.Conv2d(channels, channels, 1)),
        )
    )


@blueprint("squeeze_excite", ranks=(4,), about="a gate per channel that has seen them all")
def _squeeze_excite(shape: torch.Size) -> nn.Module:
    return SqueezeExcite(shape[1])


@blueprint("low_rank", ranks=(2, 3, 4), about="a linear map of rank 4 at most")
def _low_rank(shape: torch.Size) -> nn.Module:
    """Hu et al., "LoRA" (2021), arXiv 2106.09685; of the activation, not of a weight."""
    channels = shape[channel_dim(len(shape))]
    rank = min(channels, 4)
    down: nn.Module
    if len(shape) == 4:
        down = nn.Conv2d(channels, rank, 1, bias=False)
        return ResidualBlock(
            nn.Sequential(down, _beginning_small(nn.Conv2d(rank, channels, 1)))
        )
    down = nn.Linear(channels, rank, bias=False)
    return ResidualBlock(nn.Sequential(down, _beginning_small(nn.Linear(rank, channels))))


@blueprint("self_attention", ranks=(3, 4), about="all tokens, or pixels, see one another")
def _self_attention(shape: torch.Size) -> nn.Module:
    channels = shape[channel_dim(len(shape))]
    heads = next(heads for heads in (4, 2, 1) if channels % heads == 0)
    attention = SelfAttention(channels, heads)
    return ResidualBlock(attention if len(shape) == 3 else OverPixels(attention))


def _beginning_small(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """The layer with its parameters made smaller: the last of a branch that is added."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(_BEGINNING)
    return layer
