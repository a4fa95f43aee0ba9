"""Prints recorded steps."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from esper_otel.commands import recordings_of, refuse
from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.terminal import say, say_json


def add(commands: Subcommands) -> None:
    """Describe this command to the parser."""
    parser = commands.add_parser(
        "show",
        help="print recorded steps",
        examples=[
            ("esper-otel show baseline", "the steps of a run, by its name"),
            (
                "esper-otel show run.metrics.otlp --metrics loss,step_latency_ms",
                "some of its metrics",
            ),
        ],
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="a recording, or the name or id of a run that `esper-otel runs` lists",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per step record")
    parser.add_argument(
        "--metrics",
        metavar="KEY,…",
        default="loss,gradient_norm,step_latency_ms,optimizer_lr",
        help="columns, by key of the registry or as custom.NAME (default: %(default)s)",
    )
    parser.set_defaults(command=_show)


def _show(options: argparse.Namespace) -> int:
    from esper_otel.leyline.custom import is_custom
    from esper_otel.leyline.metrics import BY_KEY
    from esper_otel.stream import RecordingError, read_frames

    columns = [key for key in options.metrics.split(",") if key]
    for key in columns:
        if key not in BY_KEY and not is_custom(key):
            return refuse(
                f"show: --metrics {key}: expected keys of the metric registry, or custom.NAME"
            )
    status = 0
    for path in recordings_of(options.files, "show"):
        try:
            for frame in read_frames(path):
                if options.json:
                    say_json(json.dumps(msgspec.structs.asdict(frame)))
                else:
                    say(_line(frame, columns))
        except (RecordingError, OSError) as error:
            known = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
            say(f"esper-otel: show: {known}", file=sys.stderr)
            status = 1
    return status


def _line(frame: StepFrame, columns: Sequence[str]) -> str:
    shown = {"": frame.values} | {f"{seed_id} ": s for seed_id, s in frame.seeds.items()}
    words = [
        f"{whose}{key}={values[key]:.6g}"
        for whose, values in shown.items()
        for key in columns
        if key in values
    ]
    return " ".join([f"step={frame.step}", *words])
