"""Host: the model that a garden is planted in, its optimizer and its ``GradScaler``.

:class:`Host` keeps neither model nor optimizer alive. The optimizer is never rebuilt: its
state, its schedulers and whoever holds it go on as they were when the parameters of a seed
join it (:func:`join`), come back to it after a restart (:func:`prepare_rejoin`) or leave it
(:func:`leave`). :class:`SeedGradScaler` does for the gradients of seeds what a
``GradScaler`` does for the host's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from esper_otel.kasmina.fossils import home_of
from esper_otel.kasmina.lifecycle import GardenError
from esper_otel.kasmina.seed import norm_of

OptimizerFactory = Callable[[list[nn.Parameter], float], Optimizer]
"""Makes the optimizer of one seed from its parameters and the host's learning rate."""

DEFAULT_RATE = 1e-3
"""Learning rate of a seed whose host's is not known on the CPU."""


class Host:
    """``model`` and its ``optimizer``; None: it is set by :meth:`set_optimizer`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model = weakref.ref(model)
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._loading: RemovableHandle | None = None
        self._is_open = optimizer is None
        if optimizer is not None:
            self._attach_to(optimizer)

    def optimizer(self) -> Optimizer | None:
        """The host's optimizer; None when it is not known, or gone."""
        return self._optimizer()

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Take ``optimizer`` for the host's, unless one was named at the beginning."""
        if self._is_open and self._optimizer() is not optimizer:
            self._attach_to(optimizer)

    def release_optimizer(self) -> None:
        """Take our hook off the optimizer."""
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    def model(self) -> nn.Module:
        """The model; raises :class:`GardenError` when it is gone."""
        model = self._model()
        if model is None:
            raise GardenError("the garden's model is gone: expected one that is still in use")
        return model

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

    def prepare_rejoin(self, fossils: Iterable[JoinedParameters]) -> Callable[[], None]:
        """The call that lets the optimizer train fossils where it did before a restart.

        Raises :class:`GardenError` when it could not, and changes nothing before the call.
        """
        fossils = list(fossils)
        optimizer = self._optimizer()
        if not fossils:
            return lambda: None
        if optimizer is None:
            raise GardenError(
                "state: a seed has joined the host's optimizer, which is not known yet: "
                "expected plant(..., optimizer=optimizer)"
            )
        try:
            return prepare_rejoin(optimizer, fossils)
        except ValueError as error:
            raise GardenError(f"state: {error}") from None

    def _attach_to(self, optimizer: Optimizer) -> None:
        self.release_optimizer()
        self._optimizer = weakref.ref(optimizer)
        self._loading = optimizer.register_load_state_dict_pre_hook(_refuse_early_state)


def submodules(model: nn.Module, slots: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """The submodules called ``slots``, by their paths; :class:`GardenError` for a wrong one."""
    paths = [slots] if isinstance(slots, str) else list(slots)
    if not paths:
        raise GardenError("slots=[]: expected at least one path of a submodule")
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise GardenError(
            "the model holds an nn.DataParallel, in whose replicas no seed can take part: "
            "expected the bare model, or DistributedDataParallel with one process a device"
        )
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
        if home_of(found[-1][1]) is None:
            raise GardenError(
                f"slot {path!r} is a {type(found[-1][1]).__name__}, in which there is no place "
                "for another submodule: expected one written in Python"
            )
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


def adamw(parameters: list[nn.Parameter], rate: float) -> Optimizer:
    """AdamW with torch's defaults: does well on a small network whatever the host uses.

    Fused where torch has that: for a seed of six tensors on the CPU 80 µs and not 270 µs.
    """
    fused = all(each.device.type in ("cpu", "cuda") for each in parameters)
    return AdamW(parameters, lr=rate, fused=fused)


def learning_rate_of(host: Optimizer | None) -> float:
    """The learning rate of the host's first group, as far as that needs no device."""
    rate = host.param_groups[0].get("lr") if host is not None and host.param_groups else None
    if isinstance(rate, Tensor):
        return float(rate) if rate.device.type == "cpu" else DEFAULT_RATE
    return float(rate) if isinstance(rate, int | float) else DEFAULT_RATE


def join(host: Optimizer, seed: Optimizer) -> None:
    """Let the host's optimizer train what ``seed`` trained, as a parameter group of its own.

    The group has the settings that the host's first group has now. When a learning-rate
    scheduler follows the host's optimizer the parameters join that first group instead:
    schedulers pair groups with what they remember of each, strictly, and would raise at
    the next step of the user's loop. The moments begin anew, as those of any new parameter.
    """
    parameters = _parameters(seed)
    known = {id(p) for p in _parameters(host)}
    parameters = [p for p in parameters if id(p) not in known]
    first = host.param_groups[0]
    if _is_scheduled(host):
        first["params"].extend(parameters)
    else:
        _add_group(host, parameters)


def position_of(
    host: Optimizer, parameters: Iterable[nn.Parameter]
) -> tuple[int, int, list[int] | None]:
    """Where ``parameters`` stand in ``host``: group, place in it, and which of them, in order.

    (-1, -1, None) when none of them does. All that joined together stand together.
    """
    number = {id(parameter): index for index, parameter in enumerate(parameters)}
    for group, settings in enumerate(host.param_groups):
        places = [at for at, each in enumerate(settings["params"]) if id(each) in number]
        if places:
            return group, places[0], [number[id(settings["params"][at])] for at in places]
    return -1, -1, None


class JoinedParameters(NamedTuple):
    """Parameters of a fossil, and where in the host's optimizer they stand: group, place."""

    group: int
    at: int
    parameters: list[nn.Parameter]


def prepare_rejoin(host: Optimizer, fossils: Iterable[JoinedParameters]) -> Callable[[], None]:
    """Check that all ``fossils`` can come back to their places; the call that does it.

    A group that is not there is made again, with the settings of the first. Raises
    ``ValueError`` when the host's optimizer is not as it was before the first of them
    joined; then, and until the call, it is left as it is.
    """
    ordered = sorted(fossils, key=lambda each: each[:2])
    sizes = [len(group["params"]) for group in host.param_groups]
    for group, at, parameters in ordered:
        if group == len(sizes):
            sizes.append(0)
        if group > len(sizes) or sizes[group] != at:
            has = sizes[group] if group < len(sizes) else "no"
            raise ValueError(
                f"a seed joined the host's optimizer in group {group} after {at} parameters, "
                f"it has {has} there: expected the optimizer as the host alone has it"
            )
        sizes[group] += len(parameters)

    def rejoin() -> None:
        for group, _, parameters in ordered:
            if group < len(host.param_groups):
                host.param_groups[group]["params"].extend(parameters)
            else:
                _add_group(host, parameters)

    return rejoin


def leave(host: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Take ``parameters`` out of the host's optimizer again; a group left empty goes."""
    gone = {id(p) for p in parameters}
    for group in host.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    host.param_groups[:] = [group for group in host.param_groups if group["params"]]
    for parameter in parameters:
        host.state.pop(parameter, None)


def _add_group(host: Optimizer, parameters: list[nn.Parameter]) -> None:
    """A group with the settings that the first has now."""
    first = host.param_groups[0]
    settings = {name: value for name, value in first.items() if name != "params"}
    host.add_param_group({**settings, "params": parameters})


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _is_scheduled(optimizer: Any) -> bool:
    # What torch's schedulers leave on the step of the optimizer they follow.
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


class SeedGradScaler:
    """The gradients of seeds under one scaler, a ``torch.amp.GradScaler``.

    The scaler unscales the gradients that the host's optimizer holds, and leaves out the
    step when one of them is not finite. Seeds have optimizers of their own, which it must
    not know of: an isolated seed that overflows would lower the host's scale, and the host
    would feel it. So the scale is asked for by scaling a one, which needs no reading from a
    device, and a step that was left out is known by ``update`` coming without one.

    ``skipped`` is called after an ``update`` before which the host's optimizer has not
    stepped. Until :meth:`detach` the scaler has an ``update`` of its own for that.
    """

    def __init__(self, scaler: Any, skipped: Callable[[], None]) -> None:
        self._scaler = scaler
        self._skipped = skipped
        self._stepped = False
        self._original = scaler.update
        self._own = self._update
        scaler.update = self._own

    def unscale(self, host: object, seeds: Iterable[Sequence[nn.Parameter]]) -> None:
        """The optimizer ``host`` has stepped: make the gradients of each seed its own.

        Those of a seed that are not finite are dropped, and all of them where a fused
        optimizer has found that in the host's. On a device they are put to zero instead,
        since nobody waits for what it found.
        """
        self._stepped = True
        if not self._scaler.is_enabled():
            return
        found = getattr(host, "found_inf", None)
        for parameters in seeds:
            held = [each for each in parameters if each.grad is not None]
            if held:
                self._unscale(held, found)

    def detach(self) -> None:
        """Give the scaler back as it was."""
        if self._scaler.__dict__.get("update") is self._own:
            del self._scaler.update

    @torch.no_grad()
    def _unscale(self, held: list[nn.Parameter], found: Tensor | None) -> None:
        gradients = [each.grad for each in held if each.grad is not None]
        one = torch.ones((), device=gradients[0].device)
        torch._foreach_mul_(gradients, self._scaler.scale(one).reciprocal())
        sound = torch.isfinite(norm_of(gradients))
        if found is not None:
            sound = sound & (found.to(sound.device) == 0)
        if sound.device.type != "cpu":
            for each in gradients:
                each.copy_(torch.where(sound, each, 0.0))
        elif not bool(sound):
            for parameter in held:
                parameter.grad = None

    def _update(self, *arguments: Any, **options: Any) -> None:
        self._original(*arguments, **options)
        if not self._stepped:
            self._skipped()
        self._stepped = False
