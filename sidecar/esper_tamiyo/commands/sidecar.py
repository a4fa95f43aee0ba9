"""A running sidecar: ``tamiyo status``, its newest decision (``ask``), and ``silence``.

Exit status of ``status``: 0 when it answers and every part of it works, 3 when it answers but a
part does not (which one is said on standard error), 1 when nobody answers. ``silence`` exits
with 1 when there is no such run or rule, which is said with what there is.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import printable, say
from esper_otel.leyline.wire import (
    Latest,
    LatestRequest,
    SilenceReply,
    SilenceRequest,
    Status,
    StatusRequest,
)
from esper_tamiyo.commands import (
    CommandError,
    add_socket,
    plain,
    print_json,
    reply,
)

IMPAIRED = 3
"""Exit status of a sidecar that answers while a part of it does not work."""


def add_status(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "status",
        help="show the health of the sidecar",
        epilog="Exit status: 0 all parts work, 3 it answers but a part does not, 1 not "
        "reachable.",
        examples=[
            ("tamiyo status", "in a few lines"),
            ("tamiyo status --json", "every count there is"),
        ],
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
    ingest, writer = report["ingest"], report["scribe"]
    if ingest is not None and ingest.get("state") == "silent":
        troubles.append("OTLP is not received: the ingest process does not respond")
    elif ingest is not None and not ingest["listening"]:
        troubles.append("OTLP is not received: the ingest process is restarting")
    if writer is not None and writer["state"] in ("down", "silent"):
        troubles.append(f"the journal is not written: the journal writer is {writer['state']}")
    elif writer is not None and writer["error"]:
        troubles.append(f"the journal cannot be written: {printable(writer['error'])}")
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


def _duration(seconds: float) -> str:
    """Seconds as people say them, by the two largest units."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _counted(counts: dict[str, Any]) -> str:
    """Counts that are not 0, and values that are no counts; "" when there is none."""
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
        for name, value in counts.items()
        if value
    )


def _table(table: dict[str, Any]) -> str:
    """Which table is in use, and how often it was reloaded."""
    told = [str(table.get("version", ""))]
    if "rules" in table:
        told.append(f"{table['rules']:,} rules")
    if table.get("source"):
        told.append(f"from {table['source']}")
    told += [f"{table[name]:,} {name}" for name in ("reloads", "refused") if table.get(name)]
    return ", ".join(filter(None, told))


def _pace(answers: dict[str, float | None]) -> str:
    """How fast answers are, "" where none was given."""
    half, nearly = answers.get("p50_at_most"), answers.get("p99_at_most")
    if half is None or nearly is None:
        return ""
    return f"; half within {half:g} ms, 99 % within {nearly:g} ms"


_ADDRESSES = ("otlp_grpc", "otlp_http")
_OF_A_PROCESS = ("state", "listening", "pid", "rss_mb", "held_bytes", *_ADDRESSES)


def _ingest(ingest: dict[str, Any] | None) -> str:
    """Where OTLP is received, and what came."""
    if ingest is None:
        return "off"
    grpc, http = (ingest.get(name, "") for name in _ADDRESSES)
    came = _counted({name: ingest[name] for name in ingest if name not in _OF_A_PROCESS})
    return f"gRPC on {grpc}, HTTP on {http}; {came or 'nothing came yet'}"


def _journal(writer: dict[str, Any] | None) -> str:
    """Where the journal is, and what was written."""
    if writer is None or not writer.get("journal"):
        return "off"
    names = ("written", "lost", "files_taken_away", "notes_waiting", "field_reports_pending")
    counts = _counted({name: writer.get(name, 0) for name in (*names, "restarts", "hung")})
    return f"{writer['journal']}; {counts or 'nothing written yet'}"


def _state(state: dict[str, Any]) -> str:
    """How state is kept for a restart, on one line."""
    if not state:
        return "off"
    restored = state["restored"]
    said = [f"{state['bytes']:,} bytes written to {state['folder']}"]
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
    seen = "it has no step yet" if age is None else f"newest step {_duration(age)} ago"
    say(f"tamiyo {report['pid']}, up {_duration(report['uptime_s'])}; {seen}")
    engine = report["engine"]
    parts = {
        "table": _table(report["table"]),
        "answers": _counted(report["answers"]) + _pace(report.get("answer_ms") or {}),
        "checks": _counted(report.get("checks", {})),
        "connections": _counted(report["connections"]),
        "state": _state(report.get("state") or {}),
        "frames": _counted({**engine["frames"], "missed": report["missed_steps"]}),
        "refused": _counted(engine.get("refused", {})),
        "kept": ", ".join(
            f"{engine[name]:,} of {most:,} {name}"
            for name, most in engine.get("room_for", {}).items()
        ),
        "OTLP": _ingest(report["ingest"]),
        "journal": _journal(report["scribe"]),
        "page": (report.get("page") or {}).get("address", ""),
        "ranks": _counted(engine["states"]),
    }
    say(*(f"{name}: {told}" for name, told in parts.items() if told))
    for run in engine["runs"]:
        mode = ", conservative" if run["conservative"] else ""
        state = run.get("state")
        silent = (
            f"; stale, no data for {_duration(run['silent_s'])}" if state == "stale" else ""
        )
        if "ended" in run:
            silent = f"; {state}: {run['ended']}"
        say(
            f"  {run['run']}/{run['rank']}: step {run['newest_step']}, "
            f"{run['action']} ({run['reason']}){mode}{silent}"
        )
    for each in engine.get("silences", ()):
        until = "the run ends" if each["until_step"] is None else f"step {each['until_step']}"
        say(f"silenced for run {each['run']}: {each['rule']}, until {until}")


def add_ask(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "ask",
        help="show the newest decision of a run",
        examples=[
            ("tamiyo ask", "of the most recent run"),
            ("tamiyo ask --run mine --rank 3 --json", "of one rank, as JSON"),
        ],
    )
    add_socket(parser)
    parser.add_argument("--run", default="", help="default: the most recently active run")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=_ask)


def _ask(options: argparse.Namespace) -> int:
    answer = reply(LatestRequest(options.run, options.rank), options.socket)
    decision = answer.decision if isinstance(answer, Latest) else None
    if decision is None:
        whose = f"run {options.run}" if options.run else "any run"
        raise CommandError(f"no step of {whose}, rank {options.rank}, has been seen")
    if options.json:
        print_json(plain(decision))
        return 0
    say(f"{decision.action}  {decision.severity}  {decision.reason}")
    say(f"run {decision.run}, step {decision.step}, table {decision.table_version}")
    if decision.conservative:
        say("conservative mode is on")
    for name, value in decision.parameters.items():
        say(f"{name} {value:g}")
    for finding in decision.findings:
        values = ", ".join(f"{key} {value:g}" for key, value in finding.values.items())
        say(f"  {finding.rule}: {finding.text} ({values})")
    return 0


def add_silence(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "silence",
        help="suppress a rule for one run while it trains",
        examples=[
            ("tamiyo silence mine loss_spike", "until the run ends"),
            ("tamiyo silence mine loss_spike --steps 500", "for a while"),
            ("tamiyo silence mine loss_spike --undo", "no longer"),
        ],
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("rule", metavar="RULE", help="id of the rule")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--steps", type=_count, metavar="N", help="for the next N steps")
    how_long.add_argument(
        "--until-end", action="store_true", help="until the run ends (the default)"
    )
    how_long.add_argument("--undo", action="store_true", help="end the silence")
    add_socket(parser)
    parser.set_defaults(command=_silence)


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number > 0:
        return number
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")


def _silence(options: argparse.Namespace) -> int:
    request = SilenceRequest(options.run, options.rule, options.steps, options.undo)
    answer = reply(request, options.socket)
    if not isinstance(answer, SilenceReply):  # a sidecar of before there were silences
        raise CommandError(getattr(answer, "message", "the sidecar did not understand it"))
    if answer.error:
        raise CommandError(answer.error)
    say(f"run {options.run}: {options.rule} {answer.told}")
    return 0
