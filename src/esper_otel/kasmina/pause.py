"""Pause: which seeds a decision keeps as they are."""

from __future__ import annotations

from collections.abc import Iterable

from esper_otel.leyline.decisions import Action, Decision


class Pause:
    """What is frozen: nothing, some seeds, or everything.

    A frozen seed computes and learns on; its alpha and its stage stay as they are, and so
    does the clock of its stage. With everything frozen that holds for empty slots as well.
    """

    __slots__ = ("everything", "seeds")

    def __init__(self) -> None:
        self.everything = False
        self.seeds: frozenset[str] = frozenset()

    def holds(self, seed_id: str | None) -> bool:
        """Whether that seed is frozen; None: an empty slot."""
        return self.everything or seed_id in self.seeds

    def follow(self, decision: Decision) -> bool:
        """Freeze what a PAUSE names, resume after any other decision that was given.

        Every rule that found a seed to be paused counts, not only the one that won.
        Returns whether that changes anything.
        """
        names: set[str | None] = set()
        if decision.action is Action.PAUSE:
            names = {
                found.seed_id for found in decision.findings if found.action is Action.PAUSE
            }
            names.add(decision.target_seed)
        now = None in names, frozenset(name for name in names if name is not None)
        if now == (self.everything, self.seeds):
            return False
        self.everything, self.seeds = now
        return True

    def resume(self, everything: bool, seeds: Iterable[str]) -> None:
        """Hold these."""
        self.everything, self.seeds = everything, frozenset(seeds)

    def __str__(self) -> str:
        return "all seeds" if self.everything else ", ".join(sorted(self.seeds))

    def __bool__(self) -> bool:
        return self.everything or bool(self.seeds)
