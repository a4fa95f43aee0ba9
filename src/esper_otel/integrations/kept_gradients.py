"""Kept gradients: those of an update that nobody cleared before the next were added to them.

``zero_grad`` was forgotten. Torch counts the changes in place of each tensor (``_version``):
a gradient that is the same object as at the last update, and that nothing but ``backward``
has changed since, still has the sum of before. No value is read, so no device is waited for.
A change by way of ``.data`` is not counted, and looks the same as none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any


class KeptGradients:
    """Follows one gradient of the optimizer whose steps are the run's: of its smallest
    parameter, as that gradient is held on to until ``backward`` begins."""

    def __init__(self) -> None:
        self._optimizer: Any = _nothing
        self._parameter: Any = _nothing
        self._gradient: Any = None
        """As the last update left it; None once anything but ``backward`` has changed it."""
        self._version = 0
        self._added = False
        """Whether ``backward`` has added to it since."""
        self._first = False
        """Whether ``backward`` has not been called since the last update."""

    def before_backward(self) -> None:
        """Gradients are about to be added."""
        gradient = self._gradient
        if gradient is not None:
            parameter = self._parameter()
            is_same = parameter is not None and parameter.grad is gradient
            if not is_same or gradient._version != self._version:
                self._gradient = None

    def after_backward(self) -> None:
        """They have been."""
        self._first = False
        gradient = self._gradient
        if gradient is None:
            return
        parameter = self._parameter()
        if parameter is None or parameter.grad is not gradient:
            self._gradient = None
        elif gradient._version != self._version:
            self._added, self._version = True, gradient._version

    def after_update(self, optimizer: Any) -> bool:
        """``optimizer`` has made an update; whether with gradients of its last one as well."""
        parameter = self._parameter()
        known = parameter is not None and self._optimizer() is optimizer
        if not known or parameter.grad is None:
            parameter = min(_with_gradients(optimizer), key=_elements, default=None)
            self._optimizer, self._gradient = weakref.ref(optimizer), None
            self._parameter = _nothing if parameter is None else weakref.ref(parameter)
        were_kept = self._added and self._gradient is not None
        self._first, self._added, self._gradient = True, False, None
        if parameter is not None:
            self._gradient = gradient = parameter.grad
            self._version = gradient._version
        return were_kept

    def clear(self) -> bool:
        """``backward`` begins: set gradients to zero that nobody has cleared, in place.

        False where the script has cleared them, so that this is not needed any more.
        """
        if not self._first:  # what was added since the last update is to stay
            return True
        if self._gradient is None:
            return False
        for parameter in _with_gradients(self._optimizer()):
            parameter.grad.detach().zero_()
        self._gradient = None
        return True


def _nothing() -> None:
    """As a weak reference whose object is gone."""


def _elements(parameter: Any) -> int:
    return int(parameter.numel())


def _with_gradients(optimizer: Any) -> Iterator[Any]:
    for group in optimizer.param_groups if optimizer is not None else ():
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter
