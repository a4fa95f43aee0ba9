"""Tamiyo's own metrics: the one table they are made, exported and documented from.

Values are read from the report of ``tamiyo status``, in which counts run from the start
of the decide process. The table in ``docs/decisions.md`` is made from this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from esper_otel.leyline.endings import HowEnded

Report = Mapping[str, Any]
Values = Iterable[tuple[float, dict[str, str]]]
"""Values with their attributes."""


class InstrumentKind(StrEnum):
    """What sort of instrument."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class OwnMetric(NamedTuple):
    """One metric: ``read`` finds its values in a report.

    A histogram has no ``read``; ``distribution`` is its name in the heartbeat.
    """

    name: str
    kind: InstrumentKind
    unit: str
    meaning: str
    attributes: tuple[str, ...] = ()
    read: Callable[[Report], Values] = lambda report: ()
    distribution: str = ""


def _one(*path: str) -> Callable[[Report], Values]:
    """The number at ``path``, where there is one."""

    def read(report: Report) -> Values:
        value: Any = report
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return [] if value is None else [(value, {})]

    return read


def _each(attribute: str, names: Mapping[str, str], *path: str) -> Callable[[Report], Values]:
    """The numbers called ``names`` at ``path``, each with its attribute's value."""

    def read(report: Report) -> Values:
        values: Any = report
        for name in path:
            values = (values or {}).get(name)
        return [
            (values[name], {attribute: told})
            for name, told in names.items()
            if values and values.get(name) is not None
        ]

    return read


def _decisions(report: Report) -> Values:
    for row in report.get("decisions") or ():
        yield (
            row["count"],
            {name: row[name] for name in ("action", "severity", "rule")},
        )


def _table(report: Report) -> Values:
    table = report.get("table") or {}
    return [(1, {"version": table["version"]})] if "version" in table else []


def _queues(report: Report) -> Values:
    for queue, path in (
        ("frames", ("ingest", "frames_waiting")),
        ("notes", ("scribe", "notes_waiting")),
        ("field_reports", ("scribe", "field_reports_pending")),
    ):
        for value, _ in _one(*path)(report):
            yield value, {"queue": queue}


def _runs(report: Report) -> Values:
    states = (report.get("engine") or {}).get("states") or {}
    return [(count, {"state": state}) for state, count in states.items()]


def _rules(report: Report) -> Values:
    for row in (report.get("engine") or {}).get("rules") or ():
        yield row["count"], {"rule": row["rule"], "state": row["state"]}


PROCESSES = (
    ("ingest", "ingest"),
    ("scribe", "scribe"),
    ("table_watch", "table"),
    ("state_writer", "state"),
    ("page", "page"),
)
"""The sidecar's processes beside the one that decides, and their parts of a report."""

OWN_METRICS: tuple[OwnMetric, ...] = (
    OwnMetric(
        "tamiyo.decisions",
        InstrumentKind.COUNTER,
        "{decision}",
        "decisions made; `rule` is the winning rule, `nominal`, `warming_up` or "
        "`conservative_mode`",
        ("action", "severity", "rule"),
        _decisions,
    ),
    OwnMetric(
        "tamiyo.checks",
        InstrumentKind.COUNTER,
        "{update}",
        "updates checked before they were made, by decision: `unchanged`, `smaller`, "
        "`skipped`, or no decision because the rank was unknown (`unjudged`)",
        ("decided",),
        _each(
            "decided",
            {name: name for name in ("unchanged", "smaller", "skipped", "unjudged")},
            "checks",
        ),
    ),
    OwnMetric(
        "tamiyo.answer.duration",
        InstrumentKind.HISTOGRAM,
        "ms",
        "from receiving a decision request, or a check, to answering it, in the decision "
        "engine",
        distribution="answers",
    ),
    OwnMetric(
        "tamiyo.ingest.lag",
        InstrumentKind.HISTOGRAM,
        "ms",
        "from a streamed step's own time to its evaluation, by the wall clocks of both",
        distribution="lag",
    ),
    OwnMetric(
        "tamiyo.frames",
        InstrumentKind.COUNTER,
        "{frame}",
        "received step records: evaluated (`judged`), already received (`duplicate`), older "
        "than the newest and new (`late`), of a replaced process (`superseded`), unreadable "
        "or refused (`bad`)",
        ("state",),
        _each(
            "state",
            {name: name for name in ("judged", "duplicate", "late", "superseded", "bad")},
            "engine",
            "frames",
        ),
    ),
    OwnMetric(
        "tamiyo.frames.refused",
        InstrumentKind.COUNTER,
        "{frame}",
        "step records, and greetings of trainers, refused because they exceed a limit, by "
        "limit",
        ("reason",),
        lambda report: [
            (count, {"reason": reason})
            for reason, count in ((report.get("engine") or {}).get("refused") or {}).items()
        ],
    ),
    OwnMetric(
        "tamiyo.frames.missed",
        InstrumentKind.COUNTER,
        "{frame}",
        "skipped steps: absent when a newer one was evaluated (some may arrive late)",
        read=_one("missed_steps"),
    ),
    OwnMetric(
        "tamiyo.ingest.points",
        InstrumentKind.COUNTER,
        "{point}",
        "data points of accepted requests: used, of other instruments (`foreign`), of ours and "
        "unusable, or of late steps (`old`)",
        ("state",),
        _each(
            "state",
            {
                "points_used": "used",
                "points_foreign": "foreign",
                "points_unusable": "unusable",
                "points_old": "old",
            },
            "ingest",
        ),
    ),
    OwnMetric(
        "tamiyo.ingest.requests",
        InstrumentKind.COUNTER,
        "{request}",
        "OTLP requests: accepted, or the reason for their refusal",
        ("state",),
        _each(
            "state",
            {
                "requests": "accepted",
                "malformed": "malformed",
                "too_large": "too_large",
                "turned_away_busy": "busy",
                "unauthorized": "unauthorized",
                "timed_out": "timed_out",
                "failed": "failed",
            },
            "ingest",
        ),
    ),
    OwnMetric(
        "tamiyo.ingest.unusable",
        InstrumentKind.COUNTER,
        "{point}",
        "unusable data points of ours, by reason: no number, seed_id or step at their time "
        "(`no_step`), a `name` too long, a `time` or step out of range, too many `seeds` in a "
        "step, too many steps or seeds in a request (`amount`)",
        ("reason",),
        _each(
            "reason",
            {
                f"unusable_{reason}": reason
                for reason in ("no_step", "name", "time", "seeds", "amount")
            },
            "ingest",
        ),
    ),
    OwnMetric(
        "tamiyo.ingest.connections.closed",
        InstrumentKind.COUNTER,
        "{connection}",
        "HTTP connections closed to make room for others (`evicted`) or because no data "
        "arrived (`timed_out`); or not accepted yet because descriptors ran out "
        "(`not_accepted`)",
        ("reason",),
        _each(
            "reason",
            {
                "connections_evicted": "evicted",
                "connections_timed_out": "timed_out",
                "accepts_failed": "not_accepted",
            },
            "ingest",
        ),
    ),
    OwnMetric(
        "tamiyo.queue.depth",
        InstrumentKind.GAUGE,
        "{item}",
        "waiting items: streamed step records, journal notes, pending outcome reports",
        ("queue",),
        _queues,
    ),
    OwnMetric(
        "tamiyo.journal.entries",
        InstrumentKind.COUNTER,
        "{entry}",
        "journal entries: `written`, or `lost` because of a write error",
        ("state",),
        _each("state", {"written": "written", "lost": "lost"}, "scribe"),
    ),
    OwnMetric(
        "tamiyo.connections",
        InstrumentKind.GAUGE,
        "{connection}",
        "open connections of the decision socket",
        read=_one("connections", "open"),
    ),
    OwnMetric(
        "tamiyo.runs",
        InstrumentKind.GAUGE,
        "{rank}",
        "ranks: reporting (`healthy`), silent for too long (`stale`), ended (`finished`), or "
        "ended by an exception (`failed`)",
        ("state",),
        _runs,
    ),
    OwnMetric(
        "tamiyo.runs.ended",
        InstrumentKind.COUNTER,
        "{rank}",
        "ranks that reported the end of their run, by how it ended",
        ("how",),
        _each("how", {how.value: how.value for how in HowEnded}, "ends"),
    ),
    OwnMetric(
        "tamiyo.rules",
        InstrumentKind.GAUGE,
        "{subject}",
        "ranks, or seeds, for which a rule is pending, firing or recovering; or `unknown`: it "
        "had one of these states when the rank last reported",
        ("rule", "state"),
        _rules,
    ),
    OwnMetric(
        "tamiyo.conservative",
        InstrumentKind.GAUGE,
        "{rank}",
        "ranks that are in conservative mode",
        read=_one("engine", "conservative"),
    ),
    OwnMetric(
        "tamiyo.restarts",
        InstrumentKind.COUNTER,
        "{restart}",
        "restarts of a process of the sidecar",
        ("process",),
        lambda report: [
            (value, {"process": process})
            for process, part in PROCESSES
            for value, _ in _one(part, "restarts")(report)
        ],
    ),
    OwnMetric(
        "tamiyo.hung",
        InstrumentKind.COUNTER,
        "{process}",
        "processes of the sidecar that stopped responding and were killed and replaced",
        ("process",),
        lambda report: [
            (value, {"process": process})
            for process, part in PROCESSES
            for value, _ in _one(part, "hung")(report)
        ],
    ),
    OwnMetric(
        "tamiyo.table.info",
        InstrumentKind.GAUGE,
        "1",
        "always 1; `version` names the current table, with a hash of its content",
        ("version",),
        _table,
    ),
    OwnMetric(
        "tamiyo.table.loaded",
        InstrumentKind.GAUGE,
        "s",
        "time at which the current table was loaded, in Unix time",
        read=_one("table", "loaded_at"),
    ),
    OwnMetric(
        "tamiyo.table.reloads",
        InstrumentKind.COUNTER,
        "{reload}",
        "tables reloaded while serving: taken or refused",
        ("state",),
        _each("state", {"reloads": "taken", "refused": "refused"}, "table"),
    ),
    OwnMetric(
        "tamiyo.uptime",
        InstrumentKind.GAUGE,
        "s",
        "uptime of the sidecar",
        read=_one("uptime_s"),
    ),
    OwnMetric(
        "tamiyo.heartbeat",
        InstrumentKind.COUNTER,
        "{beat}",
        "incremented about once per second by the decision loop",
        read=_one("beat"),
    ),
)
