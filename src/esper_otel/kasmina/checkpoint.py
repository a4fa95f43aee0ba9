"""Checkpoint: the state of a slot and its seed, and how both are built from that again.

Nothing here changes what exists: what a state says is built beside it, so that a state
which turns out to be wrong leaves everything as it was. Tensors of a state are those in
use, as in torch's state dicts.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from esper_otel.kasmina.blending import BLENDS, SCHEDULES, AlphaSchedule, Blend
from esper_otel.kasmina.blueprints import UnknownBlueprintError, lookup
from esper_otel.kasmina.context import GardenContext
from esper_otel.kasmina.fossils import FOSSIL
from esper_otel.kasmina.hook import SlotHook
from esper_otel.kasmina.host import JoinedParameters, learning_rate_of, position_of
from esper_otel.kasmina.kernels import Activation
from esper_otel.kasmina.lifecycle import GROWING, ISOLATED, GardenError
from esper_otel.kasmina.seed import Seed
from esper_otel.kasmina.state import (
    ActivationState,
    KernelState,
    SeedState,
    SlotState,
)
from esper_otel.leyline.frames import known
from esper_otel.leyline.stages import Stage

log = logging.getLogger("esper_otel")

Device = Callable[[str], torch.device]
"""Where a slot's seed belongs now, from where it was."""


class RestoredSlot(NamedTuple):
    """A slot as its state says, built and ready to be put in its place."""

    state: SlotState
    stage: Stage
    activation: Activation | None = None
    seed: Seed | None = None
    module: nn.Module | None = None
    blend: Blend | None = None
    alpha: float = 0.0
    banned: str = ""
    joined: JoinedParameters | None = None
    """Where it stands in the host's optimizer."""


_PLAIN = tuple(
    name
    for name in SeedState.__struct_fields__
    if name not in ("alpha_schedule", "params_finite", "norm", "kernel")
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


def seed_state(seed: Seed, hook: SlotHook, host: Optimizer | None) -> SeedState:
    """A seed and what ``hook`` has of it; ``host`` is the optimizer it has joined, if any."""
    schedule = seed.alpha_schedule
    return SeedState(
        **{name: getattr(seed, name) for name in _PLAIN},
        alpha_schedule=None
        if schedule is None
        else (schedule.curve, schedule.steps, schedule.temperature),
        params_finite=known(seed.params_finite),
        norm=seed.norm,
        kernel=_kernel_state(seed, hook, host),
    )


def restore_slots(
    paths: Collection[str],
    states: Mapping[str, SlotState],
    context: GardenContext,
    device_of: Callable[[str], Device],
) -> dict[str, RestoredSlot]:
    """Build what ``states`` say of the slots ``paths``; raises :class:`GardenError`."""
    if set(states) != set(paths):
        raise GardenError(f"state: slots {', '.join(states)}: expected {', '.join(paths)}")
    return {path: _restore_slot(path, states[path], context, device_of(path)) for path in paths}


class AwaitedFossils:
    """Fossils in a state of ``model`` that come with the garden's state, loaded after it.

    ``model.load_state_dict`` would call their keys unexpected. If the garden's state does not
    come, the model's next forward says so, once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._paths: dict[str, None] = {}
        self._warning: RemovableHandle | None = None
        self._loading = model._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _OnModel(self.take_from, partial(chain))
        )

    def forget(self) -> None:
        """They have come."""
        self._paths.clear()
        if self._warning is not None:
            self._warning.remove()
            self._warning = None

    def detach(self) -> None:
        """Take our hook off the model."""
        self.forget()
        self._loading.remove()

    def take_from(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        """Leave out of ``state`` what belongs to fossils that ``model`` has not yet."""
        model = self._model()
        if model is None:
            return
        for key in [each for each in state if each.startswith(prefix) and FOSSIL in each]:
            before, _, rest = key[len(prefix) :].partition(FOSSIL)
            name = FOSSIL + rest.partition(".")[0]
            try:
                home = model.get_submodule(before.removesuffix("."))
            except AttributeError:
                continue
            if name not in home._modules:
                del state[key]
                self._paths[before + name] = None
        if self._paths and self._warning is None:
            self._warning = model.register_forward_pre_hook(_OnModel(self._warn, {}.pop))

    def _warn(self, module: nn.Module, arguments: Any) -> None:
        if torch.compiler.is_dynamo_compiling() or not self._paths:
            return
        log.warning(
            "the model's state has fossils (%s) that the model lacks: it now computes as the "
            "host alone; call garden.load_state_dict() after model.load_state_dict()",
            ", ".join(self._paths),
        )
        self.forget()


class _OnModel:
    """A hook on the model. In a copied or saved one ``harmless`` takes its place.

    That is of Python alone, so that what is saved can be loaded without this package, and is
    as if there were no hook.
    """

    def __init__(self, call: Callable[..., None], harmless: Callable[..., Any]) -> None:
        self._call = call
        self._harmless = harmless

    def __call__(self, *arguments: Any) -> None:
        """What the hook does."""
        self._call(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return self._harmless

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self._harmless,)


def put_in(hook: SlotHook, restored: RestoredSlot) -> None:
    """Put the seed of ``restored`` into ``hook``, as it stood there."""
    seed, module, blend = restored.seed, restored.module, restored.blend
    assert seed is not None
    assert module is not None
    assert blend is not None
    hook.attach(module, blend)
    hook.banned = restored.banned
    if seed.kernel_ms == seed.kernel_ms:
        hook.latency_ms = seed.kernel_ms
    if restored.stage not in ISOLATED:
        hook.set_alpha(restored.alpha)
    if restored.stage is Stage.FOSSILIZED:
        hook.fossilize()


def expect_unused(slots: Iterable[tuple[str, Stage]], requested: Iterable[str]) -> None:
    """Raise :class:`GardenError` when something grows in a slot, or is to."""
    busy = [path for path, stage in slots if stage is not Stage.DORMANT]
    for path in (*busy, *requested):
        raise GardenError(
            f"slot {path!r} is in use: expected a garden in which nothing grows yet; "
            "uproot() it and plant another"
        )


def _restore_slot(
    path: str, state: SlotState, context: GardenContext, device: Device
) -> RestoredSlot:
    """Build what ``state`` says of the slot ``path``; nothing that exists is changed.

    Modules are built in the calling thread. Raises :class:`GardenError`.
    """
    try:
        return _restore(state, context, device)
    except UnknownBlueprintError as error:
        raise GardenError(f"state of slot {path!r}: {error}") from None
    # A factory, an optimizer and load_state_dict raise what they like.
    except Exception as error:
        whose = "" if state.seed is None else f", seed {state.seed.id!r}"
        text = " ".join(str(error).split())  # torch makes a list of several lines
        raise GardenError(f"state of slot {path!r}{whose}: {text}") from error


def _kernel_state(seed: Seed, hook: SlotHook, host: Optimizer | None) -> KernelState | None:
    module, blend, optimizer = hook.seed, hook.blend, seed.optimizer
    if module is None or blend is None:
        return None
    state = KernelState(
        blending=blend.name,
        alpha=hook.alpha,
        banned=hook.banned,
        weights=module.state_dict(),
        blend_weights=blend.state_dict(),
        optimizer=None if optimizer is None else optimizer.state_dict(),
        joined=None,
    )
    if host is not None:
        state.group, state.at, state.joined = position_of(host, hook.parameters())
    return state


def _restore(state: SlotState, context: GardenContext, device: Device) -> RestoredSlot:
    stage = Stage.__members__.get(state.stage)
    if stage is None or stage in (Stage.UNKNOWN, Stage.CULLED, Stage.TERMINATED):
        raise ValueError(f"stage={state.stage!r}: expected one that a slot can stay in")
    activation = _activation(state.activation, device)
    lives = stage in GROWING or stage is Stage.FOSSILIZED
    if lives is (state.seed is None):
        raise ValueError(f"stage={state.stage}: expected {'a' if lives else 'no'} seed")
    if state.seed is None:
        return RestoredSlot(state, stage, activation)
    if activation is None:
        raise ValueError("activation=None: expected that of its seed")
    seed = _seed(state.seed)
    blueprint = lookup(seed.blueprint)
    kernel = state.seed.kernel
    if kernel is None:
        if stage is not Stage.GERMINATED:
            raise ValueError(f"kernel=None: expected one in stage {stage.name}")
        return RestoredSlot(state, stage, activation, seed)
    if not 0.0 <= kernel.alpha <= 1.0:
        raise ValueError(f"alpha={kernel.alpha!r}: expected 0 to 1")
    module = blueprint.build(activation.shape, seed.rng_seed)
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
        rate = learning_rate_of(context.host_optimizer())
        seed.optimizer = context.make_optimizer(trained, rate)
        # An optimizer keeps the very tensors it is given.
        seed.optimizer.load_state_dict(copy.deepcopy(kernel.optimizer))
    return RestoredSlot(
        state,
        stage,
        activation,
        seed,
        module,
        blend,
        kernel.alpha,
        kernel.banned,
        _joined(kernel, parameters),
    )


def _joined(kernel: KernelState, parameters: list[nn.Parameter]) -> JoinedParameters | None:
    if kernel.joined is None:
        return None
    if not all(0 <= index < len(parameters) for index in kernel.joined):
        raise ValueError(f"joined={kernel.joined}: expected numbers below {len(parameters)}")
    joined = [parameters[index] for index in kernel.joined]
    return JoinedParameters(kernel.group, kernel.at, joined)


def _seed(state: SeedState) -> Seed:
    seed = Seed(state.id, state.blueprint, state.rng_seed)
    for name in _PLAIN:
        setattr(seed, name, getattr(state, name))
    seed.gates = dict(state.gates)
    seed.params_finite, seed.norm = state.params_finite, state.norm
    if state.alpha_schedule is not None:
        schedule = seed.alpha_schedule = AlphaSchedule(*state.alpha_schedule)
        if schedule.curve not in SCHEDULES:
            raise ValueError(
                f"schedule={schedule.curve!r}: expected one of {', '.join(SCHEDULES)}"
            )
        schedule.alpha(0)
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
