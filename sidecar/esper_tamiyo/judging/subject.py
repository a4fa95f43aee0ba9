"""Whom rules are judged for: a rank, one of its seeds, or a rank in hindsight."""

from __future__ import annotations

from esper_tamiyo.judging.history import History
from esper_tamiyo.judging.rules import Values
from esper_tamiyo.judging.standing import Standing


class Subject:
    """A rank or one of its seeds: its past, and where each rule stands with it.

    ``values`` are those of the frame that is judged.
    """

    __slots__ = ("history", "seed_id", "standings", "values")

    def __init__(self, seed_id: str | None, rules: int, history: History) -> None:
        self.seed_id = seed_id
        self.history = history
        self.standings = [Standing() for _ in range(rules)]
        self.values: Values = {}

    def rearrange(self, places: list[int | None], history: History) -> None:
        """Another table: ``places`` says for each rule where it was, None for a new one."""
        self.history = history
        self.standings = [
            Standing() if place is None else self.standings[place] for place in places
        ]
