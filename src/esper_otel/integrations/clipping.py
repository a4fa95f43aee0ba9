"""Wrappers of the functions that clip gradients: they report the norm before clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper_otel.integrations.watch import Watch


class Clipping:
    """Wrappers for ``watch``, by the name of what they go around in ``torch.nn.utils``.

    ``tensor`` is the class of tensors.
    """

    def __init__(self, watch: Watch, tensor: type) -> None:
        self._watch = watch
        self._tensor = tensor
        self._norm_type: Any = 2.0
        """What ``get_total_norm`` was called for last."""
        self.wrappers: Mapping[str, Callable[..., Any]] = {
            "clip_grad_norm_": self.by_norm,
            "clip_grad_value_": self._by_value,
            "clip_grads_with_norm_": self._with_norm,  # these two are there since torch 2.6
            "get_total_norm": self._total_norm,
        }

    def by_norm(
        self, original: Any, parameters: Any, max_norm: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Around ``clip_grad_norm_``, or one that takes and returns the same."""
        norm_type = args[0] if args else kwargs.get("norm_type", 2.0)
        given = clipped = parameters
        if type(parameters) is not list:
            given, clipped = self._listed(parameters)
        if norm_type != 2.0:
            self._measure(clipped)
        norm = original(given, max_norm, *args, **kwargs)
        watch = self._watch
        if norm_type == 2.0 and not watch.is_elsewhere:
            watch.quietly(watch.norms.clipped, clipped, norm)
        return norm

    def _by_value(self, original: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
        given, clipped = self._listed(parameters)
        self._measure(clipped)
        return original(given, *args, **kwargs)

    def _with_norm(
        self,
        original: Any,
        parameters: Any,
        max_norm: Any,
        total_norm: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given, clipped = self._listed(parameters)
        if self._norm_type == 2.0:
            if not self._watch.is_elsewhere:
                self._watch.quietly(self._watch.norms.clipped, clipped, total_norm)
        else:
            self._measure(clipped)
        return original(given, max_norm, total_norm, *args, **kwargs)

    def _total_norm(self, original: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        norm = original(tensors, *args, **kwargs)
        self._norm_type = args[0] if args else kwargs.get("norm_type", 2.0)
        return norm

    def _measure(self, parameters: list[Any]) -> None:
        watch = self._watch
        if not watch.is_elsewhere:
            watch.quietly(watch.norms.before_clipping, parameters)

    def _listed(self, parameters: Any) -> tuple[Any, list[Any]]:
        """What to hand on in place of ``parameters``, and these as a list.

        They may be one tensor, or a generator, and are looked at twice.
        """
        if isinstance(parameters, self._tensor):
            return parameters, [parameters]
        if type(parameters) not in (list, tuple):
            parameters = list(parameters)
        return parameters, list(parameters)
