"""Rules of other projects on the same recordings: judges of loss and gradients, no table.

==============  ============================================================================
``olmo``        ``SkipStepOptimizer`` of OLMo-core (``olmo_core/optim/skip_step_optimizer.py``)
``composer``    ``KillLossSpike``, a Composer callback of LLM Foundry
                (``llmfoundry/callbacks/kill_loss_spike_callback.py``)
==============  ============================================================================

Both do one thing, so that all they say is an action: the first leaves the update out, the
second ends the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from math import nan
from typing import Protocol

import numpy as np

from bench.scenarios.recordings import Recorded
from bench.scenarios.scoring import Outcome
from bench.scenarios.showing import shows

Values = Mapping[str, float]


class Rule(Protocol):
    """What judges one rank, step after step."""

    def acts(self, values: Values) -> bool:
        """Whether it acts at the step of ``values``."""


class SkipStep:
    """OLMo-core: a loss or gradient norm more than ``sigma`` standard deviations from the
    mean of the ``window`` steps before leaves the update out; so does one not finite.

    Asked from max(20, window / 2) steps on, as there.
    """

    def __init__(self, window: int = 128, sigma: float = 6.0) -> None:
        self._least = max(20, window // 2) - 1
        self._sigma = sigma
        self._past: dict[str, deque[float]] = {
            key: deque(maxlen=window) for key in ("loss", "gradient_norm")
        }

    def acts(self, values: Values) -> bool:
        """Whether the update of this step is left out."""
        usual = True
        for key, past in self._past.items():
            value = _told(values, key)
            if value is None:
                continue
            if len(past) >= self._least:
                usual &= self._is_usual(value, past)
            past.append(value)
        return not usual

    def _is_usual(self, value: float, past: deque[float]) -> bool:
        known = np.array(past)
        with np.errstate(all="ignore"):
            return bool(abs(value - known.mean()) / known.std(ddof=1) <= self._sigma)


class KillLossSpike:
    """LLM Foundry: more than ``patience`` losses in a row of at least ``times`` the mean of
    the window, or half of the window above the highest loss of the first one, at most ``cap``.

    The window has a twentieth of the run's ``steps``, and at least a hundred. Judged are
    steps behind a full window, and high losses behind two.
    """

    def __init__(
        self, steps: int, patience: int = 4, times: float = 2.0, cap: float = 10.0
    ) -> None:
        self._window = max(100, round(0.05 * steps))
        self._patience = patience
        self._times = times
        self._cap = cap
        self._past: deque[float] = deque(maxlen=self._window)
        self._steps = 0
        self._outliers = 0

    def acts(self, values: Values) -> bool:
        """Whether the run is ended here, if it was not before."""
        loss = _told(values, "loss")
        if loss is None:
            return False
        self._steps += 1
        ends = False
        if len(self._past) == self._window:
            if self._steps == self._window + 1:
                self._cap = min(max(self._past), self._cap)
            ends = self._spikes(loss) or self._stays_high()
        self._past.append(loss)
        return ends

    def _spikes(self, loss: float) -> bool:
        self._outliers = self._outliers + 1 if loss >= self._times * np.mean(self._past) else 0
        return self._outliers > self._patience

    def _stays_high(self) -> bool:
        if self._steps < 2 * self._window:
            return False
        return sum(loss > self._cap for loss in self._past) >= self._window / 2


PEERS: dict[str, Callable[[int], Rule]] = {
    "OLMo's SkipStepOptimizer": lambda steps: SkipStep(),
    "Composer's KillLossSpike": KillLossSpike,
}
"""By name: a judge for a run of so many steps."""


def peer_outcome(ranks: list[Recorded], rule: Callable[[int], Rule]) -> Outcome:
    """What a rule makes of one scenario: a judge of each rank, and every action an answer."""
    at = ranks[0].at
    acted: list[tuple[int, str]] = []
    answered = None
    frames = healthy = 0
    for recorded in ranks:
        judge = rule(len(recorded.times))
        for frame, _ in recorded.frames():
            wrong = at is not None and frame.step >= at
            frames += 1
            healthy += not wrong
            if not judge.acts(frame.values):
                continue
            if not wrong:
                acted.append((frame.step, "peer"))
            elif answered is None or frame.step < answered:
                answered = frame.step
    return Outcome(
        scenario=ranks[0].scenario,
        at=at,
        shown=shows(ranks) if at is not None else None,
        answered=answered,
        acted=tuple(acted),
        told=(),
        others=(),
        frames=frames,
        healthy=healthy,
        load=max(load for recorded in ranks for load in recorded.load),
        acted_on=answered,
    )


def _told(values: Values, key: str) -> float | None:
    """The value, NaN for one that was not finite, None for one that is not known."""
    value = values.get(key)
    if value is None and values.get("nonfinite", 0.0) > 0:
        return nan
    return value
