"""Home: the folder in which recorded runs lie, each in a folder of its own with a card.

The cards are the index: there is no file beside them that could say something else than what
is there, and two processes never write one. A card is JSON, ``run.json`` (of a second attempt
``run-attempt2.json``), written anew every few seconds while its run goes on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import msgspec

from esper_otel._version import __version__
from esper_otel.leyline.events import Attribute

log = logging.getLogger("esper_otel")

REFRESH_S = 5.0
"""How often a card is written anew."""

RUNNING, CUT_OFF = "running", "cut off"
"""How a run is that has not said its end: somebody writes it, or its process was killed."""

_CARD = re.compile(r"run(?:-attempt(\d+))?\.json")
_RECORDING = re.compile(r".+-rank\d+(?:-attempt\d+)?\.(metrics|traces|logs)\.otlp")
_METRICS = ".metrics.otlp"


class RunCard(msgspec.Struct, kw_only=True):
    """What is known of one recorded run without reading its recording.

    ``ended`` says how it ended, "" while nobody has said so. Times are Unix nanoseconds.
    ``decisions`` are those with a finding, and ``applied`` how many changed something.
    """

    run: str
    name: str = ""
    tags: dict[str, str] = {}
    config: dict[str, Attribute] = {}
    ranks: int = 1
    attempt: int = 1
    release: str = __version__
    began_unix_nano: int = 0
    updated_unix_nano: int = 0
    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    decisions: int = 0
    applied: int = 0
    ended: str = ""


class Sums(Protocol):
    """As much of :class:`esper_otel.stream.totals.RunTotals` as goes onto a card."""

    steps: int
    first_unix_nano: int
    last_unix_nano: int
    first_loss: float | None
    last_loss: float | None
    decisions: Counter[tuple[str, str]]
    applied: Counter[tuple[str, str]]


class CardKeeper:
    """Keeps the card of a run under way; called on the stream's thread, raises ``OSError``.

    ``totals`` are the run's sums so far, and ``ended`` how it has ended, both set by whoever
    knows; ``config`` may grow.
    """

    def __init__(self, card: RunCard, config: Mapping[str, Attribute]) -> None:
        self.totals: Sums | None = None
        self.ended = ""
        self._card = card
        self._config = config
        self._path: Path | None = None
        self._due = 0.0

    def begin(self, folder: Path, attempt: int) -> None:
        """The recording in ``folder`` begins."""
        name = "run.json" if attempt == 1 else f"run-attempt{attempt}.json"
        self._path = folder / name
        self._card.attempt = attempt
        self._card.began_unix_nano = time.time_ns()

    def look(self) -> None:
        """Write it, if that is due."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + REFRESH_S
            self._write()

    def close(self) -> None:
        """Nothing more is recorded. Never raises."""
        try:
            self._write()
        except OSError as error:
            log.warning("the card of the run could not be written: %s", error)

    def _write(self) -> None:
        if self._path is None:
            return
        card, totals = self._card, self.totals
        card.config, card.ended = dict(self._config), self.ended
        card.updated_unix_nano = time.time_ns()
        if totals is not None and totals.steps:
            card.began_unix_nano = totals.first_unix_nano
            card.steps = totals.steps
            card.first_loss, card.last_loss = totals.first_loss, totals.last_loss
            card.decisions = sum(totals.decisions.values())
            card.applied = sum(totals.applied.values())
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            beside.write_bytes(msgspec.json.format(msgspec.json.encode(card)))
            beside.replace(self._path)
        finally:
            beside.unlink(missing_ok=True)


class RecordedRun(msgspec.Struct):
    """A run that lies at home: its folder, the card of its newest attempt, and its files."""

    folder: Path
    card: RunCard
    attempts: int
    files: list[Path]
    bytes: int

    @property
    def state(self) -> str:
        """How it ended; :data:`RUNNING` while it is written, else :data:`CUT_OFF`."""
        if is_written(self):
            return RUNNING
        return self.card.ended or CUT_OFF

    @property
    def recordings(self) -> list[Path]:
        """The files of its metrics; those of other signals lie beside them."""
        return [path for path in self.files if path.name.endswith(_METRICS)]

    def plain(self, state: str) -> dict[str, object]:
        """Everything about it, for a machine."""
        card = msgspec.to_builtins(self.card)
        del card["attempt"]
        more = {"attempts": self.attempts, "state": state, "bytes": self.bytes}
        return {**card, **more, "folder": str(self.folder)}


def runs_in(home: Path) -> Iterator[RecordedRun]:
    """The runs below ``home``, the newest first; none where there is no such folder.

    A folder without a card that can be read is none of ours, and passed over.
    """
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for folder in home.iterdir():
            run = run_at(folder)
            if run is not None:
                found.append(run)
    yield from sorted(found, key=lambda run: run.card.began_unix_nano, reverse=True)


def run_at(folder: Path) -> RecordedRun | None:
    """The run that lies in ``folder``, None where none does."""
    cards: dict[int, RunCard] = {}
    files: list[Path] = []
    size = 0
    try:
        for path in sorted(folder.iterdir()):
            match = _CARD.fullmatch(path.name)
            if match is None and not _RECORDING.fullmatch(path.name):
                continue
            files.append(path)
            size += path.stat().st_size
            if match is not None:
                card = msgspec.json.decode(path.read_bytes(), type=RunCard)
                cards[int(match[1] or 1)] = card
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        pass  # somebody tidies up, or wrote something else
    if not cards:
        return None
    newest = max(cards)
    return RecordedRun(folder, cards[newest], len(cards), files, size)


def is_written(run: RecordedRun) -> bool:
    """Whether a process of this host still writes a recording of it.

    Where the file system has no locks, one is taken for written whose card is fresh.
    """
    for path in run.recordings:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            age_s = (time.time_ns() - run.card.updated_unix_nano) / 1e9
            return not run.card.ended and age_s < 12 * REFRESH_S
        finally:
            os.close(file)
    return False


def matching(
    runs: Iterable[RecordedRun], name: str, tags: Mapping[str, str]
) -> Iterator[RecordedRun]:
    """Those whose name or id is as the pattern ``name`` ("": any), and that have all ``tags``.

    The value of a tag may be a pattern as well: ``*``, ``?`` and ``[…]`` as in a shell.
    """
    for run in runs:
        card = run.card
        if name and not any(fnmatchcase(each, name) for each in (card.name, card.run)):
            continue
        if all(
            key in card.tags and fnmatchcase(card.tags[key], value)
            for key, value in tags.items()
        ):
            yield run


def found_by(word: str, home: Path) -> tuple[RecordedRun | None, int]:
    """The run that ``word`` means, and how many it could mean.

    An id means one run, a name the newest of that name, and the beginning of ids the one run
    whose id begins so.
    """
    runs = list(runs_in(home))
    for run in runs:
        if run.card.run == word:
            return run, 1
    named = [run for run in runs if run.card.name == word]
    begun = [run for run in runs if run.card.run.startswith(word)] if word else []
    if named:
        return named[0], len(named)
    return (begun[0], 1) if len(begun) == 1 else (None, len(begun))


def remove(run: RecordedRun) -> bool:
    """Remove a run's own files, and its folder if nothing else is in it; raises ``OSError``.

    False, and nothing is removed, where it is being written.
    """
    if is_written(run):
        return False
    # The cards last: what is left when this is interrupted is still listed.
    for path in sorted(run.files, key=lambda path: bool(_CARD.fullmatch(path.name))):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        run.folder.rmdir()
    return True


def as_json(run: RecordedRun, state: str) -> str:
    """One line of JSON about a run."""
    return json.dumps(run.plain(state), ensure_ascii=False)
