"""The journal: ``tamiyo journal`` shows and follows entries, ``explain`` has one in words."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.leyline.command_line import Subcommands, age_in_s
from esper_otel.leyline.decisions import RANK_OF, Severity
from esper_otel.leyline.terminal import printable, say, say_json
from esper_tamiyo.commands import CommandError, add_socket, print_json

if TYPE_CHECKING:
    from esper_tamiyo.journaling.entries import AnyEntry


def add_journal(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "journal",
        help="show decisions and other journal entries",
        examples=[
            ("tamiyo journal --follow", "new entries as they come"),
            ("tamiyo journal --since 1h --severity HIGH", "serious entries of the last hour"),
            ("tamiyo journal --run mine --rule loss_spike", "one rule, in one run"),
        ],
    )
    parser.add_argument("--run", default="", help="only entries about this run")
    parser.add_argument(
        "--since",
        type=_time,
        metavar="TIME",
        help="only from then on: an age such as 30m, 2h or 7d, or a time as in the journal",
    )
    parser.add_argument(
        "--severity",
        type=str.upper,
        choices=[each.value for each in Severity],
        help="only decisions and rules of this severity or above",
    )
    parser.add_argument("--rule", metavar="RULE", help="only entries about this rule")
    parser.add_argument(
        "--all", action="store_true", help="also changes between inactive and unknown"
    )
    parser.add_argument("--follow", action="store_true", help="follow new entries")
    parser.add_argument("--json", action="store_true", help="raw JSON lines")
    add_folder(parser)
    parser.set_defaults(command=_journal)


def _time(text: str) -> int:
    """Unix nanoseconds; of an age, that long ago."""
    age_s = age_in_s(text)
    if age_s is not None:
        return time.time_ns() - int(age_s * 1e9)
    try:
        at = datetime.fromisoformat(text.strip())
        return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1e9)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected an age like 30m, 2h or 7d, or a time like 2026-01-31T12:00Z"
        ) from None


class _Wanted:
    """Which entries are shown."""

    def __init__(self, options: argparse.Namespace) -> None:
        # Compared as runs are shown, so that what was printed is found.
        self._run = printable(options.run)
        self._since: int = options.since or 0
        self._rule: str | None = options.rule
        self._least = RANK_OF[Severity(options.severity)] if options.severity else -1
        self._all = options.all or options.json

    def has(self, entry: AnyEntry) -> bool:
        """Whether this one is."""
        if self._run and printable(getattr(entry, "run", "")) != self._run:
            return False
        if entry.time_unix_nano < self._since:
            return False
        if self._rule is not None and self._rule not in _rules_of(entry):
            return False
        if _rank_of(entry) < self._least:
            return False
        return self._all or not _means_nothing(entry)


def _rules_of(entry: AnyEntry) -> set[str]:
    """The rules that an entry is about: of a decision all that fired."""
    named = {getattr(entry, "rule", ""), getattr(entry, "reason", "")} - {""}
    return named | {found.rule for found in getattr(entry, "findings", ())}


def _rank_of(entry: AnyEntry) -> int:
    """How serious an entry is: of a notice its most severe finding, -1 for other kinds."""
    found = [
        each.severity
        for each in (entry, *getattr(entry, "findings", ()))
        if hasattr(each, "severity")
    ]
    return max((RANK_OF[severity] for severity in found), default=-1)


def _means_nothing(entry: AnyEntry) -> bool:
    """Whether an entry only says that a rule's values came or went, nothing being wrong."""
    from esper_tamiyo.journaling.entries import Changed
    from esper_tamiyo.judging.observer import RuleState

    quiet = (RuleState.INACTIVE, RuleState.UNKNOWN)
    return isinstance(entry, Changed) and entry.before in quiet and entry.after in quiet


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that say which journal."""
    add_socket(parser)
    parser.add_argument(
        "--journal", type=Path, metavar="DIR", help="default: that of the sidecar at --socket"
    )


def entries_of(options: argparse.Namespace, *, follow: bool = False) -> Iterator[AnyEntry]:
    """The entries of the journal; damaged lines are told of and left out."""
    from esper_tamiyo.journaling import journal

    folder: Path = options.journal or journal.default_folder(options.socket)
    read = journal.follow if follow else journal.read
    try:
        for entry in read(folder):
            if isinstance(entry, journal.Damage):
                say(f"tamiyo: {entry}", file=sys.stderr)
            else:
                yield entry
    except FileNotFoundError:
        raise CommandError(f"{folder}: there is no journal; --journal names another") from None
    except OSError as error:
        raise CommandError(f"{folder}: {(error.strerror or str(error)).lower()}") from None


def _journal(options: argparse.Namespace) -> int:
    from esper_tamiyo.journaling.journal import encode_entry
    from esper_tamiyo.journaling.lines import format_entry

    wanted = _Wanted(options)
    try:
        for entry in entries_of(options, follow=options.follow):
            if not wanted.has(entry):
                continue
            if options.json:
                say_json(encode_entry(entry).decode().rstrip(), flush=options.follow)
            else:
                say(format_entry(entry), flush=options.follow)
    except KeyboardInterrupt:  # how one ends --follow
        return 130
    return 0


def add_explain(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "explain",
        help="explain a decision or a notice",
        examples=[
            ("tamiyo explain latest", "the newest"),
            ("tamiyo explain mine 441", "of a run and a step"),
            ("tamiyo explain mine/0/441 --json", "by its id, as JSON"),
        ],
    )
    parser.add_argument(
        "decision", metavar="DECISION", help="its id, RUN/RANK/STEP, or latest; or a RUN, with"
    )
    parser.add_argument("step", nargs="?", type=int, metavar="STEP", help="a step of RUN")
    parser.add_argument("--rank", type=int, default=0, help="rank of STEP")
    parser.add_argument("--run", default="", help="run of the latest decision")
    add_folder(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=_explain)


def _explain(options: argparse.Namespace) -> int:
    from esper_tamiyo.journaling.explain import format_story, plain
    from esper_tamiyo.journaling.stories import UnknownDecisionError, find_decision

    wanted = options.decision
    if options.step is not None:
        wanted = f"{wanted}/{options.rank}/{options.step}"
    try:
        story = find_decision(entries_of(options), wanted, options.run)
    except UnknownDecisionError as error:
        raise CommandError(str(error)) from None
    if options.json:
        print_json(plain(story))
    else:
        say(*format_story(story))
    return 0
