"""Lists recorded runs, and removes old ones."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.commands import refuse
from esper_otel.leyline.command_line import Subcommands, age_in_s
from esper_otel.leyline.terminal import printable, say, say_json
from esper_otel.settings import EsperSettings, SettingsError

if TYPE_CHECKING:
    from esper_otel.home import RecordedRun

_ABOUT = """\
Lists recorded runs, newest first: those of `esper-otel run
--record`, and of scripts with ESPER_RECORD=true. `esper-otel report` and `show` take a
run's name or id."""

_PRUNE = """\
Removes the recorded runs that match any of the options, after a confirmation. It
keeps a run that is being written."""

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_runs(commands: Subcommands) -> None:
    """Describe this command to the parser."""
    parser = commands.add_parser(
        "runs",
        help="list recorded runs",
        description=_ABOUT,
        examples=[
            ("esper-otel runs --tag team=vision", "those with a tag"),
            ("esper-otel runs prune --older-than 30d", "remove old ones, after asking"),
        ],
    )
    _add_choice(parser, name="", tag=[], folder=None)
    parser.add_argument("--json", action="store_true", help="one JSON object for each run")
    parser.set_defaults(command=_list)
    more = parser.add_subparsers(metavar="COMMAND")
    prune = more.add_parser(
        "prune",
        help="remove recorded runs",
        description=_PRUNE,
        examples=[
            ("esper-otel runs prune --older-than 30d", "after asking"),
            ("esper-otel runs prune --more-than 20GB --yes", "the oldest, without asking"),
        ],
    )
    # Not with defaults, which would take the place of what stands before the word.
    _add_choice(prune, *[argparse.SUPPRESS] * 3)
    prune.add_argument(
        "--older-than",
        type=_age,
        metavar="AGE",
        help="last written longer ago than this: 30d, 12h",
    )
    prune.add_argument(
        "--more-than",
        type=_size,
        metavar="SIZE",
        help="the oldest, until the rest fits in this: 5GB, 500MB",
    )
    prune.add_argument("--keep", type=_count, metavar="N", help="all but the newest N")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    prune.set_defaults(command=_prune)


def _add_choice(
    parser: argparse.ArgumentParser, name: object, tag: object, folder: object
) -> None:
    """Options that say which runs are meant, with their defaults."""
    parser.add_argument(
        "--name", default=name, metavar="PATTERN", help="name or id, as in a shell: 'resnet*'"
    )
    parser.add_argument(
        "--tag", action="append", default=tag, metavar="KEY=VALUE", help="may be given again"
    )
    parser.add_argument(
        "--dir", type=Path, default=folder, metavar="DIR", help="another home of runs"
    )


def _chosen(options: argparse.Namespace) -> tuple[Path, list[RecordedRun]]:
    """Where they lie, and the runs that are meant; raises ``ValueError``."""
    from esper_otel.home import matching, runs_in

    tags: dict[str, str] = {}
    for text in options.tag:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ValueError(f"--tag {text}: expected KEY=VALUE")
        tags[key] = value
    home = options.dir or EsperSettings.read(os.environ).runs_path
    if options.dir is not None and not home.is_dir():
        raise ValueError(f"{home}: no such folder")
    return home, list(matching(runs_in(home), options.name, tags))


def _list(options: argparse.Namespace) -> int:
    from esper_otel.home import as_json

    try:
        home, runs = _chosen(options)
    except (SettingsError, ValueError) as error:
        return refuse(f"runs: {error}")
    states = [run.state for run in runs]
    if options.json:
        for run, state in zip(runs, states, strict=True):
            say_json(as_json(run, state))
    elif runs:
        say(*_table(runs, states))
    else:
        which = " that match" if options.name or options.tag else ""
        say(f"no runs{which} in {home}")
    return 0


def _table(runs: Sequence[RecordedRun], states: Sequence[str]) -> Iterator[str]:
    """The lines of the listing, its columns as wide as what is in them."""
    head = ("run", "began", "steps", "loss", "decisions", "ended", "size", "tags")
    rows = [head, *(_row(run, state) for run, state in zip(runs, states, strict=True))]
    right = {"steps", "loss", "decisions", "size"}
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    for row in rows:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def _row(run: RecordedRun, state: str) -> tuple[str, ...]:
    card = run.card
    name = f"{card.name} ({card.run})" if card.name else card.run
    if run.attempts > 1:
        state = f"{state}, attempt {card.attempt}"
    tags = " ".join(f"{key}={value}" for key, value in card.tags.items())
    loss = "–" if card.last_loss is None else f"{card.last_loss:.4g}"
    cells = (
        name,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(card.began_unix_nano / 1e9)),
        f"{card.steps:,}",
        loss,
        f"{card.decisions:,}",
        state,
        _shown_size(run.bytes),
        tags,
    )
    return tuple(map(printable, cells))


def _prune(options: argparse.Namespace) -> int:
    from esper_otel.home import RUNNING, remove

    if options.older_than is None and options.more_than is None and options.keep is None:
        return refuse("runs prune: expected --older-than, --more-than or --keep")
    try:
        home, runs = _chosen(options)
    except (SettingsError, ValueError) as error:
        return refuse(f"runs prune: {error}")
    goes = [run for run in _unwanted(runs, options) if run.state != RUNNING]
    if not goes:
        say(f"nothing to remove in {home}")
        return 0
    if not options.yes:
        say(*_table(goes, [run.state for run in goes]))
        size = _shown_size(sum(run.bytes for run in goes))
        many = "this run" if len(goes) == 1 else f"these {len(goes):,} runs"
        if not sys.stdin.isatty():
            return refuse(f"runs prune: {many} would go ({size}); expected --yes")
        if input(f"Remove {many} ({size})? [y/N] ").strip().lower() not in ("y", "yes"):
            say("nothing was removed")
            return 1
    status = 0
    for run in goes:
        try:
            if remove(run):
                say(f"removed {run.card.run} ({_shown_size(run.bytes)})")
            else:
                say(f"{run.card.run} is being written, and is kept")
        except OSError as error:
            say(f"esper-otel: runs prune: {run.folder}: {error.strerror}", file=sys.stderr)
            status = 1
    return status


def _unwanted(runs: Sequence[RecordedRun], options: argparse.Namespace) -> list[RecordedRun]:
    """Those of ``runs``, the newest first, that an option asks to remove; the oldest first."""
    now = time.time_ns()
    goes = []
    size = 0
    for place, run in enumerate(runs):
        size += run.bytes
        age_s = (now - run.card.updated_unix_nano) / 1e9
        is_old = options.older_than is not None and age_s > options.older_than
        is_beyond = options.keep is not None and place >= options.keep
        if is_old or is_beyond or (options.more_than is not None and size > options.more_than):
            goes.append(run)
    return goes[::-1]


def _shown_size(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def _age(text: str) -> float:
    age_s = age_in_s(text)
    if age_s is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an age like 30d, 12h or 2w")
    return age_s


def _size(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size like 5GB or 500MB")
    return float(match[1]) * _BYTES[match[2]]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 on")
    return int(text)
