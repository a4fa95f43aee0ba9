"""Updates: their rate and momentum scaled, their gradients clipped, or the update skipped.

All of it is done around the very ``step`` of an optimizer's class, within all hooks, and taken
back just after: a schedule, a checkpoint, a logger or a hook only ever sees the script's own
values, also when the step raises.

Where nobody waits for a gradient norm that lies on a device, the device itself leaves the
update out: a GradScaler tells a fused optimizer whether gradients overflowed by a tensor,
``found_inf``, that the optimizer's kernel reads there. The same way is taken here for a norm
that is not finite (:func:`withhold_unless_finite`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any, NamedTuple, Protocol

from esper_otel.tolaria.rates import host_number
from esper_otel.tolaria.step_hooks import AROUND_STEPS, Arguments

log = logging.getLogger("esper_otel")


class Optimizer(Protocol):
    """As much of ``torch.optim.Optimizer`` as an update touches."""

    param_groups: list[dict[str, Any]]


class UpdateOrder(NamedTuple):
    """What is to be done to one update.

    ``lr_scale`` multiplies the learning rates for this update alone, ``momentum_scale`` its
    momentum (Adam: beta1). Where ``max_norm`` is set, gradients whose norm is greater are
    scaled down to it. ``skip`` leaves it out: the optimizer's own ``step`` is not called.
    ``restore`` asks for a snapshot in its place.
    """

    lr_scale: float = 1.0
    max_norm: float | None = None
    skip: bool = False
    restore: bool = False
    momentum_scale: float = 1.0


AS_IT_IS = UpdateOrder()

Judge = Callable[[], UpdateOrder]
"""Called when a closure has computed loss and gradients: what is to be done to the update."""


class SkippedError(BaseException):
    """Leaves an optimizer's step by way of its closure, when its update is to be left out.

    It never reaches a script. No ``Exception``, which an optimizer might catch.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss


class _Change:
    """What is changed for one step of one optimizer, to be put back."""

    __slots__ = (
        "factor",
        "gradients",
        "judge",
        "leaves",
        "momenta",
        "numbers",
        "order",
        "tensors",
    )

    def __init__(self, factor: float, order: UpdateOrder, judge: Judge | None) -> None:
        self.factor = factor * order.lr_scale
        self.order = order
        self.judge = judge
        self.leaves = False
        """Whether a step whose update is left out may be left from within its closure."""
        self.numbers: list[tuple[dict[str, Any], Any, Any]] = []
        """Groups whose rate was exchanged: group, the script's object, ours."""
        self.momenta: list[tuple[dict[str, Any], str, Any, Any]] = []
        """As ``numbers``, for momentum; with the name that it has in the group."""
        self.tensors: list[tuple[Any, Any, Any]] = []
        """Rates changed in place: the tensor, and copies of the script's value and of ours."""
        self.gradients: list[tuple[Any, Any]] = []
        """Parameters and the gradients that were taken from them."""


class Updates:
    """Scales, clips or withholds the updates of a loop's optimizers, and puts all back.

    A rate that is a number is exchanged for another number. One that is a tensor is changed
    in place, on its device and without being read, because a compiled step reads that very
    tensor. What is no rate at all (None, as relative Adafactor has) is left alone. A rate that
    the step itself sets (hypergradient methods do) is taken to be scaled, and unscaled.
    """

    def __init__(self) -> None:
        self.scaled = False
        """Whether a rate has been scaled since this was set to False."""
        self._prepared: dict[int, _Change] = {}
        """By the ``id`` of optimizers that are about to step."""
        self.within: dict[int, _Change] = {}
        """By the ``id`` of optimizers that are within a step, as far as anything is changed."""
        self._taken: set[int] = set()
        """Groups and tensors that are changed now: optimizers that wrap another one share its
        groups, and one tensor may be the rate of several groups."""
        self._told = False

    def prepare(
        self,
        optimizer: Optimizer,
        factor: float,
        order: UpdateOrder = AS_IT_IS,
        judge: Judge | None = None,
    ) -> None:
        """``optimizer`` is about to step: with its rates times ``factor``, and by ``order``.

        ``judge`` is asked for another order once its closure has computed loss and gradients.
        """
        key = id(optimizer)
        self._prepared.pop(key, None)
        if key in self.within:  # it was left by an exception that could not be seen
            self.put_back(optimizer)
        # Watched from the first step on: a compiled step would have to be compiled anew.
        can_go_around = AROUND_STEPS.watch(optimizer, self)
        if factor == 1.0 and order == AS_IT_IS and judge is None:
            return
        self._prepared[key] = _Change(factor, order, judge)
        if not can_go_around:  # a class that torch has put no hooks around
            self.enter(optimizer, (optimizer,), {})

    def run(
        self,
        step: Callable[..., Any],
        optimizer: Optimizer,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Make a step that was prepared; returns and raises what it does."""
        change = self._prepared[id(optimizer)]
        if change.order.skip:
            del self._prepared[id(optimizer)]
            return None
        # Optimizers of torch compute nothing before their closure has returned. Another may
        # have moved its parameters by then (SAM), and has to come to its end.
        change.leaves = (getattr(step, "__module__", None) or "").startswith("torch.optim")
        args, kwargs = self.enter(optimizer, args, kwargs)
        try:
            return step(*args, **kwargs)
        except SkippedError as skipped:
            return skipped.loss
        finally:
            self.put_back(optimizer)

    def is_prepared(self, optimizer: Optimizer) -> bool:
        """Whether anything is to be done to the coming step of ``optimizer``."""
        return id(optimizer) in self._prepared

    def enter(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Arguments:
        """A step that was prepared begins; returns the arguments for it. Never raises."""
        change = self._prepared.pop(id(optimizer))
        self.within[id(optimizer)] = change
        try:
            self._begin(optimizer, change)
            return self._with_own_rates(optimizer, change, args, kwargs)
        except Exception:
            self._tell("changed")
            self.put_back(optimizer)  # half of it would be worse than nothing
            return args, kwargs

    def put_back(self, optimizer: Optimizer) -> None:
        """``optimizer`` has stepped, or has failed to. Never raises."""
        change = self.within.pop(id(optimizer), None)
        if change is not None:
            self._put_back(change)

    def close(self) -> None:
        """No step follows; one that is under way goes on with the script's own values."""
        for change in self.within.values():
            self._put_back(change)
        self.within.clear()
        self._prepared.clear()
        AROUND_STEPS.leave(self)

    def _begin(self, optimizer: Optimizer, change: _Change) -> None:
        if change.order.skip:
            self._withhold(optimizer, change)
            return
        if change.order.max_norm is not None:
            _clip(optimizer, change.order.max_norm)
        self._scale(optimizer, change)
        if change.order.momentum_scale != 1.0:
            _scale_momentum(optimizer, change)

    def _put_back(self, change: _Change) -> None:
        try:
            self._put_rates_back(change)
            for parameter, gradient in change.gradients:
                parameter.grad = gradient
        except Exception:
            self._tell("taken back")

    def _with_own_rates(
        self,
        optimizer: Optimizer,
        change: _Change,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Arguments:
        """The arguments, with a closure in which rates are the script's own."""
        positional = len(args) > 1
        closure = args[1] if positional else kwargs.get("closure")
        if not callable(closure):  # some optimizers take a loss, or an epoch, in its place
            return args, kwargs

        @functools.wraps(closure)
        def with_own(*inner: Any, **options: Any) -> Any:
            self._put_rates_back(change)
            loss = closure(*inner, **options)
            if self.within.get(id(optimizer)) is change:  # and has not been closed meanwhile
                self._after_closure(optimizer, change)
                if change.order.skip and change.leaves:
                    raise SkippedError(loss)
            return loss

        if positional:
            return (args[0], with_own, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_own}

    def _after_closure(self, optimizer: Optimizer, change: _Change) -> None:
        try:
            judge, change.judge = change.judge, None
            if judge is not None:
                change.order = order = judge()
                change.factor *= order.lr_scale
            self._begin(optimizer, change)
        except Exception:
            self._tell("changed")

    def _scale(self, optimizer: Optimizer, change: _Change) -> None:
        factor = change.factor
        if factor == 1.0:
            return
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if rate is None or isinstance(rate, bool) or id(group) in self._taken:
                continue
            if isinstance(rate, Real):
                ours: Any = rate * factor
            elif not hasattr(rate, "mul_") or not rate.is_floating_point():
                continue
            elif rate.requires_grad:
                ours = rate * factor  # part of the script's own graph
            else:
                if _place_of(rate) not in self._taken:
                    own = rate.clone()
                    self._taken.add(_place_of(rate))
                    rate.mul_(factor)
                    change.tensors.append((rate, own, rate.clone()))
                self.scaled = True
                continue
            change.numbers.append((group, rate, ours))
            self._taken.add(id(group))
            group["lr"] = ours
            self.scaled = True

    def _put_rates_back(self, change: _Change) -> None:
        factor = change.factor
        for group, own, ours in change.numbers:
            self._taken.discard(id(group))
            now = group.get("lr")
            if now is ours:
                group["lr"] = own
            elif isinstance(now, Real) and not isinstance(now, bool):
                group["lr"] = now / factor
        for rate, own, ours in reversed(change.tensors):
            self._taken.discard(_place_of(rate))
            rate.copy_(own.where(rate.eq(ours), rate / factor))
        for group, name, own, ours in change.momenta:
            if group.get(name) is ours:  # else the step itself has set it
                group[name] = own
        change.numbers.clear()
        change.tensors.clear()
        change.momenta.clear()

    @staticmethod
    def _withhold(optimizer: Optimizer, change: _Change) -> None:
        """No parameter has a gradient for the rest of this step: optimizers leave those out."""
        for parameter in _with_gradients(optimizer):
            change.gradients.append((parameter, parameter.grad))
            parameter.grad = None

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            log.exception("esper-otel: an update could not be %s", what)


def _scale_momentum(optimizer: Optimizer, change: _Change) -> None:
    """What the host can read, as only that is guarded; betas are exchanged together."""
    factor = change.order.momentum_scale
    for group in optimizer.param_groups:
        name: str = "momentum"
        own: Any = group.get("momentum")
        if own is None:
            name, own = "betas", group.get("betas")
        if host_number(own) is not None:
            ours = own * factor
        elif type(own) in (tuple, list) and own and host_number(own[0]) is not None:
            ours = type(own)((own[0] * factor, *own[1:]))
        else:
            continue
        change.momenta.append((group, name, own, ours))
        group[name] = ours


def _place_of(rate: Any) -> int:
    """What is the same for two tensors that are one number: views of one place in memory."""
    return rate.data_ptr() or id(rate)


def _with_gradients(optimizer: Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter


def _clip(optimizer: Optimizer, max_norm: float) -> None:
    """In place, as ``torch.nn.utils.clip_grad_norm_`` does, and without reading the norm.

    It is that of what the optimizer is given: a script may have clipped before.
    """
    import torch

    gradients = []
    for parameter in _with_gradients(optimizer):
        gradient = parameter.grad.detach()
        gradients.append(gradient.coalesce().values() if gradient.is_sparse else gradient)
    if not gradients:
        return
    device = gradients[0].device
    norms = [torch.linalg.vector_norm(gradient).to(device) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    scale = getattr(optimizer, "grad_scale", None)  # of a fused optimizer under a GradScaler
    if scale is not None:
        norm = norm / scale
    share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in _with_gradients(optimizer):
        gradient = parameter.grad.detach()
        gradient.mul_(share.to(gradient.device, gradient.dtype))


def withhold_unless_finite(optimizer: Any, norm: Any) -> Any:
    """Have ``optimizer`` leave its next update out if ``norm``, a tensor, is not finite.

    Returns the tensor of one element that is 1.0 then, for :func:`release`; None where the
    optimizer cannot be told so, or a GradScaler tells it already. Nothing is read.
    """
    import torch

    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None  # the attribute by which GradScaler itself knows fused optimizers
    if getattr(optimizer, "found_inf", None) is not None:
        return None
    if norm.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # a graph would repeat the choice of this one step
    with torch.no_grad():
        found = torch.isfinite(norm.detach()).logical_not().to(torch.float32).reshape(())
    optimizer.found_inf = found
    return found


def release(optimizer: Any, found: Any) -> None:
    """``optimizer`` has stepped: it is told nothing any more."""
    if getattr(optimizer, "found_inf", None) is found:
        del optimizer.found_inf
