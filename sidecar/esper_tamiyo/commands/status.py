"""``tamiyo status``: show how the sidecar is doing."""

from __future__ import annotations

import argparse
from typing import Any

from esper_otel.leyline.wire import Status, StatusRequest
from esper_tamiyo.commands.common import Commands, add_socket, pairs, print_json, reply


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser("status", help="show how the sidecar is doing")
    add_socket(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=_status)


def _status(options: argparse.Namespace) -> int:
    answer = reply(StatusRequest(), options.socket)
    report: dict[str, Any] = answer.report if isinstance(answer, Status) else {}
    if options.json:
        print_json(report)
        return 0
    age = report["last_frame_age_s"]
    seen = "it has seen no step yet" if age is None else f"newest step {age:.1f} s ago"
    print(f"tamiyo {report['pid']}, up {report['uptime_s']:.0f} s; {seen}")
    for name in ("table", "connections", "answers"):
        print(f"{name}: {pairs(report[name])}")
    engine = report["engine"]
    print(f"frames: {pairs(engine['frames'])}")
    print(f"ingest: {pairs(report['ingest']) if report['ingest'] else 'off'}")
    for run in engine["runs"]:
        mode = ", conservative" if run["conservative"] else ""
        print(
            f"  {run['run']}/{run['rank']}: step {run['newest_step']}, "
            f"{run['action']} ({run['reason']}){mode}"
        )
    return 0
