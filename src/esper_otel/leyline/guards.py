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


NOT_HELD = Held(None, 1.0, False)
"""As the script makes it."""


class Guards:
    """The bounds of one rank as the newest answer that had any gave them."""

    __slots__ = (
        "_bounds",
        "_held",
        "_nonfinite",
        "looks_at_rate",
        "skips_nonfinite",
        "usual_rate",
    )

    def __init__(self, guards: Iterable[Guard]) -> None:
        known = {guard.metric: guard for guard in guards if guard.metric in GUARDED}
        nonfinite = known.pop("nonfinite", None)
        self._nonfinite = nonfinite is not None
        self.skips_nonfinite = nonfinite is not None and nonfinite.skips
        """Whether an update whose values are not finite may be left out unjudged: where they
        lie on a device and nobody can wait for them, and where a check is not answered."""
        self.looks_at_rate = "optimizer_lr" in known
        no_bound = Guard("", inf, -inf)
        loss, norm, rate = (known.get(metric, no_bound) for metric in GUARDED[:3])
        self._bounds = (loss.above, loss.below, norm.above, norm.below, rate.above, rate.below)
        self.usual_rate = rate.held_to
        """The rate that a leap is held to, infinite where it is not."""
        self._held = (norm.held_above, norm.held_to, rate.held_above, rate.held_to)

    def crossed(
        self, loss: float | None, gradient_norm: float | None, rate: float | None
    ) -> bool:
        """Whether an update with these values is to be judged first; None: not known."""
        loss_above, loss_below, norm_above, norm_below, rate_above, rate_below = self._bounds
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
        return rate is not None and (rate > rate_above or rate < rate_below)

    def held(self, loss: float | None, gradient_norm: float | None, rate: float | None) -> Held:
        """What an update with these values is held to without an answer; None: not known."""
        known = [value for value in (loss, gradient_norm) if value is not None]
        if self.skips_nonfinite and not all(map(isfinite, known)):
            return Held(None, 1.0, True)
        norm_above, norm_to, rate_above, rate_to = self._held
        norm_is_beyond = gradient_norm is not None and norm_above < gradient_norm < inf
        max_norm = norm_to if norm_is_beyond and 0.0 < norm_to < inf else None
        scale = rate_to / rate if rate is not None and rate_above < rate < inf else 1.0
        return Held(max_norm, scale if 0.0 < scale < 1.0 else 1.0, False)
