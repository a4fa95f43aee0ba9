"""Scaling: what a ``GradScaler`` does for the host's gradients, done for those of seeds.

The scaler unscales the gradients that the host's optimizer holds, and leaves out the step
when one of them is not finite. Seeds have optimizers of their own, which it must not know
of: an isolated seed that overflows would lower the host's scale, and the host would feel
it. So the scale is asked for by scaling a one, which needs no reading from a device, and a
step that was left out is known by ``update`` coming without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper_otel.kasmina.seed import norm_of


class Scaling:
    """The gradients of seeds under one scaler, a ``torch.amp.GradScaler``.

    ``skipped`` is called after an ``update`` before which the host's optimizer has not
    stepped. Until :meth:`let_go` the scaler has an ``update`` of its own for that.
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

    def let_go(self) -> None:
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
