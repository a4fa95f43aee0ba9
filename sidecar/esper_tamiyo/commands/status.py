"""``tamiyo status``: show the health of the sidecar.

Exit status: 0 when it answers and every part of it works, 3 when it answers but a part
does not (which one is said on standard error), 1 when nobody answers.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from esper_otel.leyline.terminal import printable, say
from esper_otel.leyline.wire import Status, StatusRequest
from esper_tamiyo.commands.common import Commands, add_socket, pairs, print_json, reply

IMPAIRED = 3
"""Exit status of a sidecar that answers while a part of it does not work."""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "status",
        help="show the health of the sidecar",
    )
    parser.epilog = (
        "Exit status: 0 all parts work, 3 it answers but a part does not, 1 not reachable."
    )
    add_socket(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=_status)


def _status(options: argparse.Namespace) -> int:
    answer = reply(StatusRequest(), options.socket)
    report: dict[str, Any] = answer.report if isinstance(answer, Status) else {}
    if options.json:
        print_json(report)
    else:
        _show(report)
    troubles = troubles_in(report)
    for trouble in troubles:
        say(*f"tamiyo: {trouble}".split("\n"), file=sys.stderr)
    return IMPAIRED if troubles else 0


def troubles_in(report: dict[str, Any]) -> list[str]:
    """The parts that do not work, in words."""
    troubles = []
    ingest, scribe = report["ingest"], report["scribe"]
    if ingest is not None and ingest.get("state") == "silent":
        troubles.append("OTLP is not received: the ingest process does not respond")
    elif ingest is not None and not ingest["listening"]:
        troubles.append("OTLP is not received: the ingest process is restarting")
    if scribe is not None and scribe["state"] in ("down", "silent"):
        troubles.append(f"the journal is not written: the scribe process is {scribe['state']}")
    elif scribe is not None and scribe["error"]:
        troubles.append(f"the journal cannot be written: {printable(scribe['error'])}")
    if report["table"].get("watch") in ("down", "silent"):
        troubles.append(f"the table is not watched: that process is {report['table']['watch']}")
    state = report.get("state")
    if state and state["error"]:
        troubles.append(f"a restart forgets all ranks, state is not kept: {state['error']}")
    page = report.get("page")
    if page and page["state"] in ("down", "silent"):
        troubles.append(f"the page is not served: its process is {page['state']}")
    elif page and page["error"]:
        troubles.append(f"the page shows nothing new: {printable(page['error'])}")
    error = report["table"].get("last_error")
    if error:
        troubles.append(f"the table was not reloaded: {error}")
    return troubles


def _state(state: dict[str, Any]) -> str:
    """How state is kept for a restart, on one line."""
    if not state:
        return "off"
    restored = state["restored"]
    said = [f"{state['bytes']} bytes written to {state['folder']}"]
    if restored["problem"]:
        said.append(f"nothing restored: {restored['problem']}")
    elif restored["age_s"] is not None:
        said.append(
            f"restored {restored['ranks']} ranks, {restored['age_s']:.1f} s after their newest "
            f"step; {restored['too_old'] + restored['unfit']} left out"
        )
    return "; ".join(said)


def _show(report: dict[str, Any]) -> None:
    age = report["last_frame_age_s"]
    seen = "it has no step yet" if age is None else f"newest step {age:.1f} s ago"
    say(f"tamiyo {report['pid']}, up {report['uptime_s']:.0f} s; {seen}")
    for name in ("table", "connections", "answers", "checks", "answer_ms"):
        if name in report:  # a sidecar of before there were checks has none to tell
            say(f"{name}: {pairs(report[name])}")
    if "state" in report:
        say(f"state: {_state(report['state'])}")
    engine = report["engine"]
    say(f"frames: {pairs(engine['frames'])}, missed {report['missed_steps']}")
    if refused := {why: count for why, count in engine.get("refused", {}).items() if count}:
        say(f"refused: {pairs(refused)}")
    if "room_for" in engine:
        kept = {name: f"{engine[name]} of {most}" for name, most in engine["room_for"].items()}
        say(f"kept: {pairs(kept)}")
    for name in ("ingest", "scribe"):
        say(f"{name}: {pairs(report[name]) if report[name] else 'off'}")
    if report.get("page"):
        say(f"page: {pairs(report['page'])}")
    say(f"ranks: {pairs(engine['states'])}")
    for run in engine["runs"]:
        mode = ", conservative" if run["conservative"] else ""
        state = run.get("state")
        silent = f"; stale, no data for {run['silent_s']:.0f} s" if state == "stale" else ""
        if "ended" in run:
            silent = f"; {state}: {run['ended']}"
        say(
            f"  {run['run']}/{run['rank']}: step {run['newest_step']}, "
            f"{run['action']} ({run['reason']}){mode}{silent}"
        )
    for each in engine.get("silences", ()):
        until = "the run ends" if each["until_step"] is None else f"step {each['until_step']}"
        say(f"silenced for run {each['run']}: {each['rule']}, until {until}")
