"""Guards: bounds from the sidecar that no update may cross unchecked."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, isfinite
from typing import NamedTuple

from esper_otel.leyline.wire import GUARDED, Guard


class Held(NamedTuple):
    """How an update is made whose check was not answered."""

    max_norm: float | None
    """Largest gradient norm, None without one."""
    lr_scale: float
    """Factor on its learning rate, 1.0 at most."""
    skip: bool
    """Whether it is left out, as its values are not finite."""
    momentum_scale: float = 1.0
    """Factor on its momentum, 1.0 at most."""


NOT_HELD = Held(None, 1.0, False)
"""As the script makes it."""


class Guards:
    """The bounds of one rank as the newest answer that had any gave them."""

    __slots__ = (
        "_bounds",
        "_nonfinite",
        "_norm",
        "looks_at_momentum",
        "looks_at_rate",
        "momentum",
        "rate",
        "skips_nonfinite",
    )

    def __init__(self, guards: Iterable[Guard]) -> None:
        known = {guard.metric: guard for guard in guards if guard.metric in GUARDED}
        nonfinite = known.pop("nonfinite", None)
        self._nonfinite = nonfinite is not None
        self.skips_nonfinite = nonfinite is not None and nonfinite.skips
        """Whether an update whose values are not finite may be left out unjudged: where they
        lie on a device and nobody can wait for them, and where a check is not answered."""
        self.looks_at_rate = "optimizer_lr" in known
        self.looks_at_momentum = "optimizer_momentum" in known
        loss, norm, rate, momentum = (known.get(each, Guard(each)) for each in GUARDED[:4])
        self._bounds = (loss.above, loss.below, norm.above, norm.below)
        self._norm, self.rate, self.momentum = norm, rate, momentum

    def crossed(
        self,
        loss: float | None,
        gradient_norm: float | None,
        rate: float | None,
        momentum: float | None = None,
    ) -> bool:
        """Whether an update with these values is to be judged first; None: not known."""
        loss_above, loss_below, norm_above, norm_below = self._bounds
        if loss is not None:
            if loss - loss != 0.0:  # NaN or infinite; a third of a call to math.isfinite
                if self._nonfinite:
                    return True
            elif loss > loss_above or loss < loss_below:
                return True
        if gradient_norm is not None:
            if gradient_norm - gradient_norm != 0.0:
                if self._nonfinite:
                    return True
            elif gradient_norm > norm_above or gradient_norm < norm_below:
                return True
        return _is_beyond(self.rate, rate) or _is_beyond(self.momentum, momentum)

    def held(
        self,
        loss: float | None,
        gradient_norm: float | None,
        rate: float | None,
        momentum: float | None = None,
    ) -> Held:
        """What an update with these values is held to without an answer; None: not known."""
        known = [value for value in (loss, gradient_norm) if value is not None]
        if self.skips_nonfinite and not all(map(isfinite, known)):
            return Held(None, 1.0, True)
        above, usual = self._norm.held_above, self._norm.held_to
        norm_is_beyond = gradient_norm is not None and above < gradient_norm < inf
        max_norm = usual if norm_is_beyond and 0.0 < usual < inf else None
        scales = _held_scale(self.rate, rate), _held_scale(self.momentum, momentum)
        return Held(max_norm, scales[0], False, scales[1])


def _is_beyond(guard: Guard, value: float | None) -> bool:
    return value is not None and (value > guard.above or value < guard.below)


def _held_scale(guard: Guard, value: float | None) -> float:
    """The factor that takes ``value`` to what ``guard`` holds it to; 1.0 where it does not."""
    if value is None or not guard.held_above < value < inf:
        return 1.0
    scale = guard.held_to / value
    return scale if 0.0 < scale < 1.0 else 1.0


NO_GUARDS = Guards(())
"""Nothing is beyond them."""
