"""Delivers telemetry that runs left unsent."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from esper_otel.commands.common import Subcommands
from esper_otel.leyline.terminal import say


def add(commands: Subcommands) -> None:
    """Describe this command to the parser."""
    parser = commands.add_parser("resend", help="deliver unsent telemetry of a run")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="or a folder of spool files"
    )
    parser.set_defaults(command=_resend)


def _resend(options: argparse.Namespace) -> int:
    from esper_otel.stream import resend
    from esper_otel.stream.spool_files import spool_files_in

    files: list[Path] = []
    for path in options.files:
        there = spool_files_in(path) if path.is_dir() else [path]
        files += there
        if not there:
            say(f"{path}: nothing to deliver")
    report = resend(files)
    for file in report.files:
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
