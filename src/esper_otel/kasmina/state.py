"""State: the contents of a garden's checkpoint, field by field.

It is plain: dictionaries, lists, numbers, text and tensors, as
``torch.load(weights_only=True)`` takes them. It goes out by :func:`plain` and comes in,
checked, by :func:`parsed`. Where a field is called otherwise in there than here, ``rename``
says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from esper_otel.kasmina.lifecycle import GardenError

VERSION = 1
"""Of the state's fields and their meaning."""


class Stateful(Protocol):
    """A recorder, as far as what it remembers of the run has a part in a garden's decisions."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data for :meth:`load_state_dict`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over ``state``; ``ValueError`` for what is none, and then nothing changes."""


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


class SeedState(
    _State,
    rename={
        "rng_seed": "origin",
        "alpha_schedule": "course",
        "params_finite": "sane",
        "train_steps": "lessons",
    },
):
    """All of a :class:`~esper_otel.kasmina.seed.Seed`; without ``kernel`` and ``trouble``
    its kernel is on its way."""

    id: str
    blueprint: str
    rng_seed: int
    alpha_steps: int
    alpha_schedule: tuple[str, int, float] | None
    violations: int
    violations_in_a_row: int
    faults_in_a_row: int
    params_finite: float
    trouble: str
    kernel_ms: float
    norm: float
    loss_before: float
    step_ms_before: float
    gates: dict[str, str]
    train_steps: int
    harmful_steps: int
    shut_steps: int
    kernel: KernelState | None


class SlotState(
    _State,
    rename={
        "germinated": "sown",
        "reported_unused": "told_unused",
        "reported_fallback": "told_fallback",
        "reported_faults": "told_faults",
    },
):
    """A slot; ``embargo_s`` is what is left of the embargo by the clock.

    ``returns`` is the kind of what its module returns; states of earlier versions have none.
    """

    stage: str
    dwelt: int
    germinated: int
    embargo_s: float
    activation: ActivationState | None
    seed: SeedState | None
    reported_unused: bool
    reported_fallback: str
    reported_faults: list[str]
    returns: str = ""


class PlateauState(_State):
    """How long the loss has not fallen."""

    best: float
    waited: int


class FreezeState(_State):
    """What a decision has frozen."""

    everything: bool
    seeds: list[str]


class RequestState(_State):
    """What the user asked for and waits for its time."""

    operation: str
    slot: str
    seed_id: str
    blueprint: str


class RunSignals(_State):
    """How the run was doing."""

    loss: float
    host_norm: float
    step_ms: float
    fetch_ms: float
    violations: int


class GardenState(_State, rename={"rng_root": "root", "freeze": "pause", "signals": "weather"}):
    """A garden: ``recorder`` is what its recorder remembers of the run's dynamics."""

    version: int
    step: int
    rng_root: int
    slots: dict[str, SlotState]
    ids: list[str]
    plateau: PlateauState
    freeze: FreezeState
    requests: list[RequestState]
    signals: RunSignals
    recorder: dict[str, Any] | None


def plain(state: GardenState) -> dict[str, Any]:
    """``state`` without structs."""
    return _fields(state)


def parsed(state: object) -> GardenState:
    """The state that ``plain`` made; :class:`GardenError` for anything else."""
    if not isinstance(state, dict) or "version" not in state:
        raise GardenError(
            f"state: expected the result of garden.state_dict(), got a {type(state).__name__}"
            + (" without a version" if isinstance(state, dict) else "")
        )
    if state["version"] != VERSION:
        raise GardenError(f"state: version={state['version']!r}: expected {VERSION}")
    try:
        return msgspec.convert(state, GardenState)
    except msgspec.ValidationError as error:
        raise GardenError(f"state: {error}") from None


def _fields(state: _State) -> dict[str, Any]:
    names = zip(state.__struct_fields__, state.__struct_encode_fields__, strict=True)
    return {outside: _plain(getattr(state, name)) for name, outside in names}


def _plain(value: Any) -> Any:
    if isinstance(value, _State):
        return _fields(value)
    # Not a subclass: what a module's state_dict() returns has attributes of its own.
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if type(value) is list else value
