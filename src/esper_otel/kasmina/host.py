"""Host: the model that a garden is planted in, and the optimizer that trains it.

Neither is kept alive here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from esper_otel.kasmina.errors import GardenError
from esper_otel.kasmina.optimizers import Return, rejoin


class Host:
    """``model`` and its ``optimizer``; None: it is told by :meth:`follow`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model = weakref.ref(model)
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._loading: RemovableHandle | None = None
        self._follows = optimizer is None
        if optimizer is not None:
            self._belong_to(optimizer)

    def optimizer(self) -> Optimizer | None:
        """The host's optimizer; None when it is not known, or gone."""
        return self._optimizer()

    def follow(self, optimizer: Optimizer) -> None:
        """It is ``optimizer`` now, unless one was named at the beginning."""
        if self._follows and self._optimizer() is not optimizer:
            self._belong_to(optimizer)

    def let_go(self) -> None:
        """The optimizer is the host's alone again."""
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    def device_of(self, path: str) -> Callable[[str], torch.device]:
        """Where a seed at submodule ``path`` belongs, from where it was before a restart.

        That is where the submodule is; one without parameters is where it was, if the
        model is there too, or else with the model.
        """
        model = self._model()

        def device(saved: str) -> torch.device:
            before = torch.device(saved)
            if model is None:
                return before
            own = next(model.get_submodule(path).parameters(), None)
            if own is not None:
                return own.device
            devices = list(dict.fromkeys(each.device for each in model.parameters()))
            return before if not devices or before in devices else devices[0]

        return device

    def take_back(self, returns: Iterable[Return]) -> Callable[[], None]:
        """The call that lets the optimizer train fossils where it did before a restart.

        Raises :class:`GardenError` when it could not, and changes nothing before the call.
        """
        returns = list(returns)
        optimizer = self._optimizer()
        if not returns:
            return lambda: None
        if optimizer is None:
            raise GardenError(
                "state: a seed has joined the host's optimizer, which is not known yet: "
                "expected plant(..., optimizer=optimizer)"
            )
        try:
            return rejoin(optimizer, returns)
        except ValueError as error:
            raise GardenError(f"state: {error}") from None

    def _belong_to(self, optimizer: Optimizer) -> None:
        self.let_go()
        self._optimizer = weakref.ref(optimizer)
        self._loading = optimizer.register_load_state_dict_pre_hook(_refuse_early_state)


def submodules(model: nn.Module, slots: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """The submodules called ``slots``, by their paths; :class:`GardenError` for a wrong one."""
    paths = [slots] if isinstance(slots, str) else list(slots)
    if not paths:
        raise GardenError("slots=[]: expected at least one path of a submodule")
    found: list[tuple[str, nn.Module]] = []
    for path in paths:
        if any(path == other for other, _ in found):
            raise GardenError(f"slot {path!r} is named twice")
        try:
            found.append((path, model.get_submodule(path)))
        except AttributeError as error:
            known = ", ".join(name for name, _ in model.named_modules() if name)
            raise GardenError(
                f"slot {path!r} is no submodule ({error}): expected one of {known}"
            ) from None
    return found


def _refuse_early_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Say why a state with fossils does not fit an optimizer that has none yet.

    A ``ValueError``, as the one that torch would raise next.
    """
    try:
        given = sum(len(group["params"]) for group in state["param_groups"])
    except (KeyError, TypeError):
        return  # torch has something to say about that
    has = sum(len(group["params"]) for group in optimizer.param_groups)
    if given > has:
        raise GardenError(
            f"the optimizer's state has {given} parameters, the optimizer {has}; if seeds had "
            "joined it: expected garden.load_state_dict() before optimizer.load_state_dict()"
        )
