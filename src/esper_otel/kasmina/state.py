"""State: what a checkpoint of a garden consists of, field by field.

It is plain: dictionaries, lists, numbers, text and tensors, as
``torch.load(weights_only=True)`` takes them. It goes out by :func:`plain` and comes in,
checked, by :func:`parsed`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from esper_otel.kasmina.errors import GardenError

VERSION = 1
"""Of the state's fields and their meaning."""


class _State(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Part of the state."""


class ActivationState(_State):
    """What comes out of a slot's module."""

    shape: list[int]
    dtype: str
    device: str


class KernelState(_State):
    """The module of a seed, and how it joins the host.

    ``joined`` is where its parameters stand in the host's optimizer, if they do;
    ``optimizer`` the state of its own, if it has one.
    """

    blending: str
    alpha: float
    banned: str
    weights: Any
    blend_weights: Any
    optimizer: dict[str, Any] | None
    joined: list[int] | None
    group: int = -1
    at: int = -1


class SeedState(_State):
    """All of a :class:`~esper_otel.kasmina.seed.Seed`; without ``kernel`` and ``trouble``
    its kernel is on its way."""

    id: str
    blueprint: str
    origin: int
    alpha_steps: int
    course: tuple[str, int, float] | None
    violations: int
    violations_in_a_row: int
    faults_in_a_row: int
    sane: float
    trouble: str
    kernel_ms: float
    norm: float
    loss_before: float
    step_ms_before: float
    gates: dict[str, str]
    lessons: int
    harmful_steps: int
    shut_steps: int
    kernel: KernelState | None


class PlotState(_State):
    """A slot; ``embargo_s`` is what is left of the embargo by the clock."""

    stage: str
    dwelt: int
    sown: int
    embargo_s: float
    activation: ActivationState | None
    seed: SeedState | None
    told_unused: bool
    told_fallback: str
    told_faults: list[str]


class PlateauState(_State):
    """How long the loss has not fallen."""

    best: float
    waited: int


class PauseState(_State):
    """What a decision keeps as it is."""

    everything: bool
    seeds: list[str]


class RequestState(_State):
    """What the user asked for and waits for its time."""

    operation: str
    slot: str
    seed_id: str
    blueprint: str


class WeatherState(_State):
    """How the run was doing."""

    loss: float
    host_norm: float
    step_ms: float
    fetch_ms: float
    violations: int


class GardenState(_State):
    """A garden: ``recorder`` is what its recorder remembers of the run's dynamics."""

    version: int
    step: int
    root: int
    slots: dict[str, PlotState]
    ids: list[str]
    plateau: PlateauState
    pause: PauseState
    requests: list[RequestState]
    weather: WeatherState
    recorder: dict[str, Any] | None


def plain(state: GardenState) -> dict[str, Any]:
    """``state`` without structs."""
    return {name: _plain(getattr(state, name)) for name in state.__struct_fields__}


def parsed(state: object) -> GardenState:
    """The state that ``plain`` made; :class:`GardenError` for anything else."""
    if not isinstance(state, dict) or "version" not in state:
        raise GardenError(
            f"state: expected what garden.state_dict() returns, got a {type(state).__name__}"
            + (" without a version" if isinstance(state, dict) else "")
        )
    if state["version"] != VERSION:
        raise GardenError(f"state: version={state['version']!r}: expected {VERSION}")
    try:
        return msgspec.convert(state, GardenState)
    except msgspec.ValidationError as error:
        raise GardenError(f"state: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, _State):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    # Not a subclass: what a module's state_dict() returns has attributes of its own.
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if type(value) is list else value
