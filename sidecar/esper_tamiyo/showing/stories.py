"""Run stories: the journal's newest entries of each run, within a bound."""

from __future__ import annotations

from collections import deque

import msgspec

from esper_otel.report.rulings import Ledger
from esper_otel.report.telling import take_journal_line

STORY_BYTES = 8 << 20
"""Lines of the journal that are kept of all runs together; what is made of them takes some
times that. The run that has most forgets its older half."""

LONGEST_LINE = 1 << 20

MOST_STORIES = 128
"""Runs that are told of; the one that was told of longest ago goes."""

_MOST_RULES = 4096


class _Head(msgspec.Struct):
    """The fields of a line by which it is put where it belongs."""

    kind: str
    run: str = ""
    id: str = ""
    decision: str = ""


_heads = msgspec.json.Decoder(_Head)
_ABOUT_RUNS = frozenset({"decision", "field_report", "rule"})


class RunStory:
    """The decisions about one run, what came of them, and the states of its rules."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.size = 0
        """Bytes of its lines."""
        self.forgotten = 0
        """Lines that there was no room for any more."""
        self.changed: dict[str, int] = {}
        """Decision → version of the runs since which it is as it is now."""
        self.rules_changed = 0
        """Version since which the states of rules are as they are now."""
        self._lines: deque[tuple[bytes, _Head]] = deque()

    def take_line(self, line: bytes, head: _Head, version: int) -> None:
        """Take in a line of the journal."""
        self._lines.append((line, head))
        self.size += len(line)
        take_journal_line(line, self.ledger)
        if head.kind == "rule":
            self.rules_changed = version
        else:
            self.changed[head.id or head.decision] = version
        if self.ledger.more:
            self.forget_half()

    def forget_half(self) -> None:
        """Keep the newer half of the lines."""
        kept: list[tuple[bytes, _Head]] = []
        size = 0
        while self._lines and size < self.size // 2:
            kept.append(self._lines.pop())
            size += len(kept[-1][0])
        self.forgotten += len(self._lines)
        self._lines = deque(reversed(kept))
        self.size = size
        self.ledger = Ledger()
        for line, _ in self._lines:
            take_journal_line(line, self.ledger)
        known = {head.id or head.decision for _, head in self._lines}
        self.changed = {name: at for name, at in self.changed.items() if name in known}


class RunStories:
    """The stories of all runs, by name."""

    def __init__(self) -> None:
        self.unread = 0
        """Lines that are no entries."""
        self._tables = Ledger()
        self._stories: dict[str, RunStory] = {}

    @property
    def rules(self) -> dict[str, tuple[str, str]]:
        """Rule → its condition in words, and its text."""
        return self._tables.rules

    def story_of(self, run: str) -> RunStory | None:
        """What is known of a run; None for nothing."""
        return self._stories.get(run)

    def drop_story(self, run: str) -> None:
        """Nobody looks at that run any more."""
        self._stories.pop(run, None)

    def tell_line(self, line: bytes, version: int) -> str:
        """Take in a line of the journal; the run it is about, "" for none."""
        try:
            head = _heads.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.unread += 1
            return ""
        if head.kind == "table":
            if len(self._tables.rules) > _MOST_RULES:
                self._tables = Ledger()
            take_journal_line(line, self._tables)
        if head.kind not in _ABOUT_RUNS or len(line) > LONGEST_LINE:
            return ""
        story = self._stories.pop(head.run, None) or RunStory()
        self._stories[head.run] = story  # the newest last
        story.take_line(line, head, version)
        if len(self._stories) > MOST_STORIES:
            del self._stories[next(iter(self._stories))]
        while sum(story.size for story in self._stories.values()) > STORY_BYTES:
            max(self._stories.values(), key=lambda story: story.size).forget_half()
        return head.run
