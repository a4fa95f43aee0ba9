"""Delivers telemetry that runs left unsent."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import say, say_json

if TYPE_CHECKING:
    from esper_otel.stream.redelivery import FileReport


def add_resend(commands: Subcommands) -> None:
    """Describe this command to the parser."""
    parser = commands.add_parser(
        "resend",
        help="deliver unsent telemetry of a run",
        examples=[
            (
                "esper-otel resend ~/.local/state/esper/spool",
                "of all runs that have ended",
            ),
            ("esper-otel resend --json spool/", "one JSON object for each file"),
        ],
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="or a folder of spool files"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object for each file, one a line"
    )
    parser.set_defaults(command=_resend)


def _resend(options: argparse.Namespace) -> int:
    from esper_otel.stream import resend
    from esper_otel.stream.spool_files import spool_files_in

    files: list[Path] = []
    for path in options.files:
        there = spool_files_in(path) if path.is_dir() else [path]
        files += there
        if not there and not options.json:
            say(f"{path}: nothing to deliver")
    report = resend(files)
    for file in report.files:
        if options.json:
            say_json(json.dumps(_plain(file)))
            continue
        rejected = f", {file.rejected:,} rejected by the receiver" if file.rejected else ""
        cut = (
            f", {file.cut_bytes:,} bytes of a truncated request removed"
            if file.cut_bytes
            else ""
        )
        say(f"{file.path}: {file.delivered:,} delivered{rejected}, {file.kept:,} kept{cut}")
        if file.problem:
            say(f"esper-otel: resend: {file.problem}", file=sys.stderr)
    return 0 if report.is_complete else 1


def _plain(file: FileReport) -> dict[str, object]:
    """What became of a file, as JSON; ``problem`` is "" where all of it was delivered."""
    names = ("delivered", "rejected", "kept", "cut_bytes", "problem")
    return {"file": str(file.path), **{name: getattr(file, name) for name in names}}
