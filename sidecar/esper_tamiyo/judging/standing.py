"""Where one rule stands with one rank or seed: what it takes to fire, and to stop."""

from __future__ import annotations

from esper_tamiyo.judging.rules import CompiledRule, Verdict
from esper_tamiyo.judging.witness import RuleState

NEVER = -(1 << 62)

_INACTIVE, _PENDING, _FIRING, _RECOVERING, _UNKNOWN = RuleState

_NOTHING = object()
_IDLE: dict[RuleState, object] = {_INACTIVE: False, _UNKNOWN: None}


class Standing:
    """The memory of one rule.

    A rule fires when its condition holds and has held for ``for`` observations, in a row
    or of the last ``of``. It goes on until the condition with the easier numbers of
    ``release`` is false; without a release, until fewer than ``for`` of the last ``of``
    hold, which in a row is at once. An observation that is unknown changes none of this.
    """

    __slots__ = (
        "active",
        "fired_at",
        "hits",
        "idle",
        "recent",
        "silenced_by",
        "since",
        "state",
    )

    def __init__(self) -> None:
        self.state = _UNKNOWN
        self.since = -1
        """Step at which ``state`` began, -1 before the rule was first judged."""
        self.idle: object = None
        """The verdict that would change nothing: most rules are false, or unknown, for
        most of a run, and need no more than this comparison."""
        self.active = False
        """Fired and not yet released; may be true while the state is unknown."""
        self.hits = 0
        self.recent = 0
        self.fired_at = NEVER
        self.silenced_by = ""

    def take(self, entry: CompiledRule, verdict: Verdict, kept: Verdict) -> RuleState:
        """The state after one more observation.

        ``kept`` is the verdict with the easier numbers; it matters while the rule is
        active and ``verdict`` is not true.
        """
        if verdict is None and (not self.active or entry.keeps is None or kept is None):
            return _UNKNOWN
        if verdict is not None:
            self._count(entry, verdict)
        enough = self.hits >= entry.rule.persistence
        if verdict and (enough or self.active):
            self.active = True
            return _FIRING
        if self.active:
            stays = enough if entry.keeps is None else kept
            if stays is None:
                return _UNKNOWN
            if stays:
                return _RECOVERING
            self.active = False
            if entry.keeps is not None:  # what was seen before the release is settled
                self.hits = self.recent = 0
        return _PENDING if self.hits else _INACTIVE

    def peek(self, entry: CompiledRule, verdict: Verdict, kept: Verdict) -> RuleState:
        """The state that :meth:`take` would give; changes nothing."""
        trial = Standing()
        trial.active, trial.hits, trial.recent = self.active, self.hits, self.recent
        return trial.take(entry, verdict, kept)

    def enter(self, state: RuleState, step: int) -> None:
        """Be in ``state`` from ``step`` on."""
        self.state, self.since = state, step
        self.idle = _NOTHING if self.active else _IDLE.get(state, _NOTHING)

    def _count(self, entry: CompiledRule, verdict: bool) -> None:
        if entry.window:
            self.recent = (self.recent << 1 | verdict) & entry.window
            self.hits = self.recent.bit_count()
        else:
            self.hits = self.hits + 1 if verdict else 0

    def reset(self) -> None:
        """Forget all but the cool-down: nobody can say how it stands any more."""
        self.active = False
        self.hits = self.recent = 0
        self.silenced_by = ""
