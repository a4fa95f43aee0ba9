"""Snapshots: copies of weights, buffers and optimizer state in host memory, and the way back.

Whether a snapshot is good, and when to go back to it, is decided elsewhere
(:mod:`~esper_otel.tolaria.restoring`). Tensors stay the same objects: their values are copied
into the very tensors of the run, so compiled graphs, reducers and other references hold. That
goes by ``.data``, which autograd does not count as a change: the graph of another loss may
still refer to the weights.

What lies on a CUDA device is copied into pinned memory and nobody waits for it. Weights and
optimizer state are copied on a stream beside the training's, and the next update waits for
them there (:meth:`Snapshot.queue_wait`); what the next forward pass may change is copied on the
training's own stream. This has run with fakes only, not on a GPU yet.

torch is imported by whoever calls, never by this module.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Container, Iterable, Iterator
from typing import Any, NamedTuple

KINDS = ("cpu", "cuda")
"""Kinds of devices that can be copied from without waiting for them."""


class SnapshotError(RuntimeError):
    """What cannot be copied, or put back where it was; says why."""


class Parts(NamedTuple):
    """What a snapshot is made of, as it is now.

    ``weights`` are the parameters that ``optimizers`` update; ``others`` are what a forward
    pass, or the script, may change: buffers, and parameters that no optimizer has.
    """

    weights: list[Any]
    others: list[Any]
    optimizers: list[Any]
    found_modules: bool
    """Whether there is any module whose buffers could be looked for."""

    @property
    def tensors(self) -> list[Any]:
        """All but the state of the optimizers."""
        return [*self.weights, *self.others]


class Protected:
    """What the snapshots of one loop are of: its optimizers, and modules.

    Nothing here keeps any of them alive.
    """

    def __init__(self) -> None:
        self._whole: list[weakref.ref[Any]] = []
        self._announced: list[weakref.ref[Any]] = []
        self._found: list[weakref.ref[Any]] | None = None
        self._optimizers: dict[int, weakref.ref[Any]] = {}

    def add_module(self, module: Any, *, whole: bool) -> None:
        """Copy what a checkpoint has of the buffers of ``module``; if ``whole``, its parameters
        as well, also those that no optimizer has."""
        refs = self._whole if whole else self._announced
        if not any(ref() is module for ref in refs):
            refs.append(weakref.ref(module))

    def add_optimizer(self, optimizer: Any) -> bool:
        """Copy what ``optimizer`` updates, and its state; returns whether it is new here."""
        known = self._optimizers.get(id(optimizer))
        if known is not None and known() is optimizer:
            return False
        self._optimizers[id(optimizer)] = weakref.ref(optimizer)
        self._found = None
        return True

    def parts(self) -> Parts:
        """What there is to copy now."""
        optimizers = _alive(self._optimizers.values())
        weights: dict[int, Any] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                weights.update((id(each), each) for each in group["params"])
        others: dict[int, Any] = {}
        for module in _alive(self._whole):
            others.update((id(each), each) for each in module.parameters())
        modules = self._modules(weights)
        for module in modules:
            others.update((id(each), each) for each in _persistent_buffers(module))
        for key in weights:
            others.pop(key, None)
        tensors = list(weights.values()), list(others.values())
        return Parts(*tensors, optimizers, found_modules=bool(modules))

    def _modules(self, weights: Container[int]) -> list[Any]:
        """Those whose buffers count: as named to us, or else found by their parameters."""
        announced = [each for each in _alive(self._announced) if _holds_any(each, weights)]
        whole = _alive(self._whole)
        if announced or any(_holds_any(each, weights) for each in whole):
            return [*whole, *announced]
        if self._found is None:
            self._found = [weakref.ref(module) for module in root_modules_of(weights)]
        return [*whole, *_alive(self._found)]


def root_modules_of(weights: Container[int]) -> list[Any]:
    """The modules of this process that hold any of ``weights`` (by their ``id``) and are in no
    other module.

    Looked for among all objects that the garbage collector knows, as no hook of torch tells
    which module a parameter belongs to: some tens of milliseconds in a large process.
    """
    import gc

    from torch import nn

    # By the type: ``isinstance`` asks proxies for their class, and lazy ones then load it.
    modules = [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]
    children: set[int] = set()
    for module in modules:
        children.update(map(id, (module.__dict__.get("_modules") or {}).values()))
    return [
        module
        for module in modules
        if id(module) not in children and _holds_any(module, weights)
    ]


def _holds_any(module: Any, weights: Container[int]) -> bool:
    try:
        return any(id(each) in weights for each in module.parameters())
    except Exception:  # one that is half made
        return False


def _persistent_buffers(root: Any) -> Iterator[Any]:
    """Those that a checkpoint has: the others are caches, and may change their shape."""
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _alive(refs: Iterable[weakref.ref[Any]]) -> list[Any]:
    return [each for ref in refs if (each := ref()) is not None]


class _Held:
    """The copy of one tensor, and the device that the tensor lies on."""

    __slots__ = ("copy", "device")

    def __init__(self, copied: Any, device: Any) -> None:
        self.copy = copied
        self.device = device


class _Copier:
    """Copies tensors into memory of the host, and adds up how much it took, in bytes."""

    def __init__(self) -> None:
        self.size = 0
        self.streams: dict[Any, Any] = {}
        """By device, those beside the training's that something is copied on."""

    def tensor(self, tensor: Any, before: Any, *, beside: bool) -> _Held:
        """A copy of ``tensor``, in the memory of ``before`` where that fits.

        ``beside``: on another stream than the training's.
        """
        import torch

        data = plain(tensor)
        on_host = data.device.type == "cpu"
        if not on_host and torch.cuda.is_current_stream_capturing():
            raise SnapshotError("a graph is being captured, and would repeat it")
        if isinstance(before, _Held) and _alike(before.copy, data):
            target = before.copy
        else:
            target = torch.empty_like(data, device="cpu", pin_memory=not on_host)
        if on_host:
            target.copy_(data)
        elif not beside:
            target.copy_(data, non_blocking=True)
        else:
            stream = self._stream(data.device)
            with torch.cuda.stream(stream):
                target.copy_(data, non_blocking=True)
            data.record_stream(stream)  # its memory must not be used anew before that
        self.size += target.numel() * target.element_size()
        return _Held(target, data.device)

    def value(self, value: Any, before: Any = None) -> Any:
        """A copy of part of an optimizer's state, which may be anything."""
        import torch

        if isinstance(value, torch.Tensor):
            return self.tensor(value, before, beside=True)
        if type(value) is dict:
            known = before if type(before) is dict else {}
            return {key: self.value(each, known.get(key)) for key, each in value.items()}
        if type(value) in (list, tuple):
            old = list(before) if type(before) is type(value) else []
            old += [None] * (len(value) - len(old))
            pairs = zip(value, old, strict=False)
            return type(value)(self.value(each, copied) for each, copied in pairs)
        return copy.deepcopy(value)

    def _stream(self, device: Any) -> Any:
        import torch

        stream = self.streams.get(device)
        if stream is None:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.streams[device] = stream
            stream.wait_stream(torch.cuda.current_stream(device))
        return stream


class Snapshot:
    """A copy of all parts of a training after one step; made again into the same memory."""

    def __init__(self) -> None:
        self.step = 0
        self.size = 0
        """Memory of the host that it takes, in bytes."""
        self._weights: list[tuple[int, int]] = []
        """By ``id`` and version: no weak reference to a tensor, as
        :mod:`~esper_otel.tolaria.identities` says. Their optimizers keep them alive."""
        self._optimizers: list[weakref.ref[Any]] = []
        self._tensors: list[_Held] = []
        self._states: list[dict[Any, tuple[bool, Any]]] = []
        self._under_way: list[tuple[Any, Any]] = []

    def copy_from(self, parts: Parts, step: int) -> None:
        """Copy ``parts``, as they are after ``step``.

        Raises :class:`SnapshotError` for what cannot be copied, and what torch raises where
        there is not enough memory; it is worth nothing then.
        """
        import torch

        copier = _Copier()
        with torch.no_grad():
            before = [*self._tensors, *[None] * len(parts.tensors)]
            tensors = [
                copier.tensor(each, before[place], beside=place < len(parts.weights))
                for place, each in enumerate(parts.tensors)
            ]
            known = [*self._states, *[{}] * len(parts.optimizers)]
            states = [
                _state_of(copier, each, old)
                for each, old in zip(parts.optimizers, known, strict=False)
            ]
        self.step, self.size = step, copier.size
        self._weights = [(id(each), each._version) for each in parts.weights]
        self._optimizers = [weakref.ref(each) for each in parts.optimizers]
        self._tensors, self._states = tensors, states
        self._under_way = [
            (device, stream.record_event()) for device, stream in copier.streams.items()
        ]

    def queue_wait(self) -> None:
        """An update follows: have the devices make it after they have copied. Nobody waits."""
        if not self._under_way:
            return
        import torch

        if torch.cuda.is_current_stream_capturing():
            return  # a graph would wait for this one copy again and again
        under_way, self._under_way = self._under_way, []
        for device, copied in under_way:
            torch.cuda.current_stream(device).wait_event(copied)

    def misfit(self, parts: Parts) -> str:
        """Why it cannot be put back into ``parts``; empty when it can."""
        if _differ(self._optimizers, parts.optimizers):
            return "the optimizers are not those of the snapshot"
        if len(self._weights) != len(parts.weights) or not all(
            id(each) == known and each._version >= version  # one made since is younger
            for (known, version), each in zip(self._weights, parts.weights, strict=True)
        ):
            return "the parameters are not those of the snapshot"
        if len(self._tensors) != len(parts.tensors) or not all(
            _alike(held.copy, plain(each)) and held.device == each.device
            for held, each in zip(self._tensors, parts.tensors, strict=True)
        ):
            return "a tensor has another shape, type or device than in the snapshot"
        return ""

    def copy_back(self, parts: Parts) -> None:
        """Put everything back into ``parts``, that of which it is a copy.

        Raises :class:`SnapshotError` before anything is changed where it does not fit.
        """
        import torch

        why = self.misfit(parts)
        if why:
            raise SnapshotError(why)
        self.queue_wait()
        with torch.no_grad():
            for held, tensor in zip(self._tensors, parts.tensors, strict=True):
                plain(tensor).copy_(held.copy, non_blocking=True)
            for optimizer, state in zip(parts.optimizers, self._states, strict=True):
                _put_state(optimizer, state)


def plain(tensor: Any) -> Any:
    """The memory of ``tensor``, as a tensor that autograd does not follow.

    Of one that is sharded over ranks it is this rank's part. Raises :class:`SnapshotError` for
    kinds of tensors, and devices, that cannot simply be copied.
    """
    import torch

    data = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).data
    if type(data) is not torch.Tensor or data.layout is not torch.strided:
        raise SnapshotError(f"a {type(tensor).__name__} of layout {data.layout} is not copied")
    if data.device.type not in KINDS:
        raise SnapshotError(f"a tensor on {data.device.type} is not copied")
    return data


def _alike(one: Any, other: Any) -> bool:
    return bool(one.shape == other.shape and one.dtype == other.dtype)


def _differ(refs: list[weakref.ref[Any]], objects: list[Any]) -> bool:
    return len(refs) != len(objects) or any(
        ref() is not each for ref, each in zip(refs, objects, strict=True)
    )


def _place(key: Any) -> Any:
    """What a state's key is compared by: parameters are the same or not, never equal."""
    return id(key) if hasattr(key, "data_ptr") else key


def _state_of(
    copier: _Copier, optimizer: Any, before: dict[Any, tuple[bool, Any]]
) -> dict[Any, tuple[bool, Any]]:
    """A copy of the state of ``optimizer``: by place, whether that is a parameter's, and the
    value."""
    copied = {}
    for key, value in optimizer.state.items():
        place = _place(key)
        _, old = before.get(place, (False, None))
        copied[place] = (place is not key, copier.value(value, old))
    return copied


def _put_state(optimizer: Any, copied: dict[Any, tuple[bool, Any]]) -> None:
    """Make the state of ``optimizer`` what it was; its tensors stay the same objects where
    they are alike."""
    state = optimizer.state
    live = {_place(key): key for key in state}
    held = {id(each): each for group in optimizer.param_groups for each in group["params"]}
    for place, key in live.items():
        if place not in copied:
            del state[key]
    for place, (is_parameter, value) in copied.items():
        key = live.get(place, held.get(place)) if is_parameter else place
        if key is not None:
            state[key] = _put(value, state.get(key))


def _put(value: Any, live: Any) -> Any:
    """The copied ``value`` again, in place of ``live`` and where possible within it."""
    import torch

    if isinstance(value, _Held):
        if (
            isinstance(live, torch.Tensor)
            and _alike(value.copy, live)
            and value.device == live.device
        ):
            plain(live).copy_(value.copy, non_blocking=True)
            return live
        return value.copy.to(value.device, copy=True)
    if type(value) is dict:
        old = live if type(live) is dict else {}
        fresh = {key: _put(each, old.get(key)) for key, each in value.items()}
        old.clear()
        old.update(fresh)
        return old
    if type(value) in (list, tuple):  # whose tensors may be each other's, or have moved on
        return type(value)(_put(each, None) for each in value)
    return copy.deepcopy(value)
