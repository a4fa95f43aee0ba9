"""Checkpoint: the state of a slot and its seed, and how both are built from that again.

Nothing here changes what exists: what a state says is built beside it, so that a state
which turns out to be wrong leaves everything as it was. Tensors of a state are those in
use, as in torch's state dicts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from esper_otel.kasmina import optimizers
from esper_otel.kasmina.blending import BLENDS, Blend
from esper_otel.kasmina.blueprints import UnknownBlueprintError, lookup
from esper_otel.kasmina.errors import GardenError
from esper_otel.kasmina.ground import Ground
from esper_otel.kasmina.kernels import Activation
from esper_otel.kasmina.lifecycle import GROWING
from esper_otel.kasmina.schedules import SCHEDULES, Course
from esper_otel.kasmina.seed import Seed, known
from esper_otel.kasmina.slot import Slot
from esper_otel.kasmina.state import (
    ActivationState,
    KernelState,
    PlotState,
    RequestState,
    SeedState,
)
from esper_otel.leyline.decisions import SeedOperation
from esper_otel.leyline.stages import Stage

Device = Callable[[str], torch.device]
"""Where a slot's seed belongs now, from where it was."""


class Regrown(NamedTuple):
    """A slot as its state says, built and ready to be put in its place."""

    state: PlotState
    stage: Stage
    activation: Activation | None = None
    seed: Seed | None = None
    module: nn.Module | None = None
    blend: Blend | None = None
    alpha: float = 0.0
    banned: str = ""
    back: optimizers.Return | None = None
    """Where it stands in the host's optimizer."""


_PLAIN = tuple(
    name
    for name in SeedState.__struct_fields__
    if name not in ("course", "sane", "norm", "kernel")
)
"""Fields of a seed that are as they are in its state."""


def activation_state(activation: Activation | None) -> ActivationState | None:
    """What was seen of an activation."""
    if activation is None:
        return None
    dtype = str(activation.dtype).removeprefix("torch.")
    return ActivationState(
        shape=list(activation.shape), dtype=dtype, device=str(activation.device)
    )


def seed_state(seed: Seed, slot: Slot, host: Optimizer | None) -> SeedState:
    """A seed and what ``slot`` has of it; ``host`` is the optimizer it has joined, if any."""
    course = seed.course
    return SeedState(
        **{name: getattr(seed, name) for name in _PLAIN},
        course=None if course is None else (course.schedule, course.steps, course.temperature),
        sane=known(seed.sane),
        norm=seed.norm,
        kernel=_kernel_state(seed, slot, host),
    )


def regrow(path: str, state: PlotState, ground: Ground, device: Device) -> Regrown:
    """Build what ``state`` says of the slot ``path``; nothing that exists is changed.

    Modules are built in the calling thread. Raises :class:`GardenError`.
    """
    try:
        return _regrow(state, ground, device)
    except UnknownBlueprintError as error:
        raise GardenError(f"state of slot {path!r}: {error}") from None
    # A factory, an optimizer and load_state_dict raise what they like.
    except Exception as error:
        whose = "" if state.seed is None else f", seed {state.seed.id!r}"
        text = " ".join(str(error).split())  # torch makes a list of several lines
        raise GardenError(f"state of slot {path!r}{whose}: {text}") from error


def blueprint_of(request: RequestState) -> str:
    """The blueprint a request is about, empty for a cull; :class:`GardenError` for neither."""
    if request.operation == SeedOperation.CULL:
        return ""
    if request.operation != SeedOperation.GERMINATE:
        raise GardenError(f"state: request {request.operation!r}: expected germinate or cull")
    try:
        return lookup(request.blueprint).name
    except UnknownBlueprintError as error:
        raise GardenError(f"state: request for slot {request.slot!r}: {error}") from None


def _kernel_state(seed: Seed, slot: Slot, host: Optimizer | None) -> KernelState | None:
    module, blend, optimizer = slot.seed, slot.blend, seed.optimizer
    if module is None or blend is None:
        return None
    state = KernelState(
        blending=blend.name,
        alpha=slot.alpha,
        banned=slot.banned,
        weights=module.state_dict(),
        blend_weights=blend.state_dict(),
        optimizer=None if optimizer is None else optimizer.state_dict(),
        joined=None,
    )
    if host is not None:
        state.group, state.at, state.joined = optimizers.standing(host, slot.parameters())
    return state


def _regrow(state: PlotState, ground: Ground, device: Device) -> Regrown:
    stage = Stage.__members__.get(state.stage)
    if stage is None or stage in (Stage.UNKNOWN, Stage.CULLED, Stage.TERMINATED):
        raise ValueError(f"stage={state.stage!r}: expected one that a slot can stay in")
    activation = _activation(state.activation, device)
    lives = stage in GROWING or stage is Stage.FOSSILIZED
    if lives is (state.seed is None):
        raise ValueError(f"stage={state.stage}: expected {'a' if lives else 'no'} seed")
    if state.seed is None:
        return Regrown(state, stage, activation)
    if activation is None:
        raise ValueError("activation=None: expected that of its seed")
    seed = _seed(state.seed)
    blueprint = lookup(seed.blueprint)
    kernel = state.seed.kernel
    if kernel is None:
        if stage is not Stage.GERMINATED:
            raise ValueError(f"kernel=None: expected one in stage {stage.name}")
        return Regrown(state, stage, activation, seed)
    if not 0.0 <= kernel.alpha <= 1.0:
        raise ValueError(f"alpha={kernel.alpha!r}: expected 0 to 1")
    module = blueprint.build(activation.shape, seed.origin)
    module.to(activation.device, _dtype_of(kernel.weights, activation.dtype))
    module.load_state_dict(kernel.weights)
    make_blend = BLENDS.get(kernel.blending)
    if make_blend is None:
        raise ValueError(f"blending={kernel.blending!r}: expected one of {', '.join(BLENDS)}")
    blend = make_blend(activation.shape)
    blend.to(activation.device, activation.dtype)
    blend.load_state_dict(kernel.blend_weights)
    parameters = [*module.parameters(), *blend.parameters()]
    if kernel.optimizer is not None:
        trained = [each for each in parameters if each.requires_grad]
        rate = optimizers.rate_of(ground.host())
        seed.optimizer = ground.make_optimizer(trained, rate)
        # An optimizer keeps the very tensors it is given.
        seed.optimizer.load_state_dict(copy.deepcopy(kernel.optimizer))
    return Regrown(
        state,
        stage,
        activation,
        seed,
        module,
        blend,
        kernel.alpha,
        kernel.banned,
        _back(kernel, parameters),
    )


def _back(kernel: KernelState, parameters: list[nn.Parameter]) -> optimizers.Return | None:
    if kernel.joined is None:
        return None
    if not all(0 <= index < len(parameters) for index in kernel.joined):
        raise ValueError(f"joined={kernel.joined}: expected numbers below {len(parameters)}")
    back = [parameters[index] for index in kernel.joined]
    return optimizers.Return(kernel.group, kernel.at, back)


def _seed(state: SeedState) -> Seed:
    seed = Seed(state.id, state.blueprint, state.origin)
    for name in _PLAIN:
        setattr(seed, name, getattr(state, name))
    seed.gates = dict(state.gates)
    seed.sane, seed.norm = state.sane, state.norm
    if state.course is not None:
        seed.course = Course(*state.course)
        if seed.course.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule={seed.course.schedule!r}: expected one of {', '.join(SCHEDULES)}"
            )
        seed.course.alpha(0)
    return seed


def _activation(state: ActivationState | None, device: Device) -> Activation | None:
    if state is None:
        return None
    dtype = getattr(torch, state.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={state.dtype!r}: expected a torch.dtype")
    return Activation(torch.Size(state.shape), dtype, device(state.device))


def _dtype_of(weights: dict[str, Any], other: torch.dtype) -> torch.dtype:
    """What the seed computed in: where the host has changed its mind, not the activation's."""
    for value in weights.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.dtype
    return other
