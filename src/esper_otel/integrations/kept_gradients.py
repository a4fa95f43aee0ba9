"""Kept gradients: those of an update that nobody cleared before the next were added to them.

``zero_grad`` was forgotten. Torch counts the changes in place of each tensor (``_version``):
a gradient that is the same object as at the last update, and that nothing but ``backward``
has changed since, still has the sum of before. No device is waited for: only where a gradient
looks kept, and is on the CPU, its values are read, as a change by way of ``.data``, of numpy,
or of the script within ``backward`` is not counted. On other devices that looks the same as
none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from esper_otel.integrations.primary import ParameterPlace, parameter_at, place_of
from esper_otel.tolaria.identities import TensorMark, has_mark, mark_of

CLEARED_AGAIN = 16
"""Updates in a row whose gradients the script has cleared, after which it needs no help. One
that clears them at every fourth update only (accumulation that steps too often) does."""


class KeptGradients:
    """Follows one gradient of the optimizer whose steps are the run's: of its smallest
    parameter that is trained. Nothing is kept alive by it."""

    def __init__(self) -> None:
        self._optimizer: Any = _nothing
        self._parameter: ParameterPlace | None = None
        self._gradient: TensorMark | None = None
        """As the last update left it; None once anything but ``backward`` has changed it."""
        self._version = 0
        self._added = False
        """Whether ``backward`` has added to it since."""
        self._first = False
        """Whether ``backward`` has not been called since the last update."""
        self._cleared = 0
        """Updates in a row since which the script has cleared gradients."""

    def before_backward(self) -> None:
        """Gradients are about to be added."""
        mark = self._gradient
        if mark is None:
            return
        parameter = parameter_at(self._parameter)
        gradient = None if parameter is None else parameter.grad
        # Most loops have cleared it, so the cheapest is asked first.
        if (
            gradient is None
            or gradient._version != self._version
            or not has_mark(gradient, mark)
            or (not self._added and _is_zero(gradient))
        ):
            self._gradient = None

    def after_backward(self) -> None:
        """They have been."""
        self._first = False
        if self._gradient is not None:
            gradient = self._same()
            if gradient is None:
                self._gradient = None
            elif gradient._version != self._version:
                self._added, self._version = True, gradient._version

    def after_update(self, optimizer: Any) -> bool:
        """``optimizer`` has made an update; whether with gradients of its last one as well."""
        parameter = parameter_at(self._parameter)
        gradient = None if parameter is None else parameter.grad
        is_idle = self._gradient is not None and not self._added
        if (
            gradient is None
            or self._optimizer() is not optimizer
            or (is_idle and not parameter.requires_grad)
        ):
            trained = filter(_is_trained, _with_gradients(optimizer))
            parameter = min(trained, key=_elements, default=None)
            self._optimizer, self._gradient = weakref.ref(optimizer), None
            self._parameter = None if parameter is None else place_of(parameter, optimizer)
            gradient = None if parameter is None else parameter.grad
        were_kept = self._added and self._same() is not None
        self._first, self._added, self._gradient = True, False, None
        if gradient is not None:
            self._gradient, self._version = mark_of(gradient), gradient._version
        return were_kept

    def clear(self) -> bool:
        """``backward`` begins: set gradients to zero that nobody has cleared, in place.

        False once the script has cleared them for long, so that this is not needed any more.
        """
        if not self._first:  # what was added since the last update is to stay
            return True
        if self._gradient is None:
            self._cleared += 1
            return self._cleared < CLEARED_AGAIN
        self._cleared = 0
        import torch

        with torch.no_grad():  # detached, a sparse one would not be the one that is cleared
            for parameter in _with_gradients(self._optimizer()):
                parameter.grad.zero_()
        self._gradient = None
        return True

    def _same(self) -> Any:
        """The gradient that is followed, as long as it is that of its parameter."""
        parameter, mark = parameter_at(self._parameter), self._gradient
        gradient = None if parameter is None else parameter.grad
        if gradient is None or mark is None:
            return None
        return gradient if has_mark(gradient, mark) else None


def _nothing() -> None:
    """As a weak reference whose object is gone."""


def _elements(parameter: Any) -> int:
    return int(parameter.numel())


def _is_trained(parameter: Any) -> bool:
    return bool(parameter.requires_grad) and _elements(parameter) > 0


def _is_zero(gradient: Any) -> bool:
    """Whether it is known to be zero without waiting for a device, or for other ranks."""
    if gradient.device.type != "cpu" or hasattr(gradient, "full_tensor"):
        return False
    return not bool(gradient.any())


def _with_gradients(optimizer: Any) -> Iterator[Any]:
    for group in optimizer.param_groups if optimizer is not None else ():
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter
