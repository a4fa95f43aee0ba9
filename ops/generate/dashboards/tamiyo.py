"""*Tamiyo*: what it decides, how fast, and whether it sees what it should."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from esper_tamiyo.judging.observer import RuleState
from ops.generate.dashboards.panels import (
    BY_RANK,
    Line,
    PanelBuilder,
    board,
    lines,
    number,
    stacked,
    states,
)
from ops.generate.dashboards.queries import (
    REPORTED_WITHIN,
    increase,
    most,
    own,
    reported,
    share,
)

STATES = {
    RuleState.PENDING: (1, "yellow"),
    RuleState.RECOVERING: (2, "blue"),
    RuleState.FIRING: (3, "red"),
}
"""Those that are worth a colour, each with a number by which the worst of several wins."""

_LATENCIES = (50, 95, 99)


def tamiyo() -> Dashboard:
    """The dashboard."""
    made = board(
        "esper-tamiyo",
        "esper / Tamiyo",
        "Decisions and rules, and how the sidecar itself is. Its own metrics are of all runs "
        "it serves; the variables choose whose waiting and annotations are shown.",
    )
    for panel in (*_head(), *_deciding()):
        made = made.with_panel(panel)
    made = made.with_row(Row("Whether it sees what it should"))
    for panel in _seeing():
        made = made.with_panel(panel)
    return made


def _head() -> list[PanelBuilder]:
    return [
        number("Ranks heard of", "none", f"sum({reported('tamiyo.runs')})"),
        number(
            "In conservative mode",
            "none",
            f"sum({reported('tamiyo.conservative')})",
            "Ranks for which every seed operation is refused for a while.",
        ),
        number("Connections", "none", f"sum({reported('tamiyo.connections')})"),
        number("Serving for", "s", f"min({reported('tamiyo.uptime')})"),
        number(
            "Table in use for",
            "s",
            f"time() - max({reported('tamiyo.table.loaded')})",
        ),
        number("Tables in use", "none", f"count({reported('tamiyo.table.info')})"),
    ]


def _deciding() -> list[PanelBuilder]:
    worst = " or ".join(
        f"{value} * (max by (rule, state) ({_in_state(state)}) > bool 0)"
        for state, (value, _) in STATES.items()
    )
    return [
        stacked(
            "Decisions by rule",
            "short",
            [
                Line(
                    increase("tamiyo.decisions", "rule", "action", where='rule!="nominal"'),
                    "{{rule}}: {{action}}",
                )
            ],
            "Those that are not `nominal`; `conservative_mode` refused a seed operation.",
        ),
        stacked(
            "All decisions by action",
            "short",
            [Line(increase("tamiyo.decisions", "action"), "{{action}}")],
        ),
        stacked(
            "Updates checked before they were made",
            "short",
            [Line(increase("tamiyo.checks", "decided"), "{{decided}}")],
            "A trainer in `enforce` mode found a value beyond its guards and asked first. "
            "`smaller`: lower rate or clipped gradients for this update; `skipped`: left out.",
        ),
        states(
            "Rules",
            [Line(f"max by (rule) ({worst})", "{{rule}}")],
            {value: (state.value, color) for state, (value, color) in STATES.items()},
            "Of the rank, or the seed, for which each is worst.",
        ),
        states(
            "Conservative mode",
            [Line(f"sum({reported('tamiyo.conservative')}) > bool 0", "any rank")],
            {0: ("no", "green"), 1: ("conservative", "orange")},
            width=12,
        ),
        lines(
            "Alerts of Prometheus",
            "none",
            [Line('count by (alertname, alertstate) (ALERTS{rule!=""})', "{{alertname}}")],
            "Rules of Tamiyo's table that can be said in PromQL, as Prometheus judges them.",
            width=12,
        ),
    ]


def _in_state(state: RuleState) -> str:
    series = f'{own("tamiyo.rules")}{{state="{state.value}"}}'
    return f"last_over_time({series}[{REPORTED_WITHIN}])"


def _seeing() -> list[PanelBuilder]:
    return [
        lines(
            "Answering",
            "ms",
            [Line(share("tamiyo.answer.duration", of), f"p{of}") for of in _LATENCIES],
            "From receiving a request, about a step or an update, to having answered it.",
        ),
        lines(
            "Time spent on decision requests",
            "ms",
            [Line(most("tamiyo_latency_ms"), BY_RANK)],
            "On the training thread: sending, collecting the answer, and waiting where it is "
            "late. The longest that a pixel spans.",
        ),
        lines(
            "Unanswered decision requests in a row",
            "none",
            [Line(most("unjudged_steps"), BY_RANK)],
            "Above 0 nobody evaluates the run: a scaled learning rate stays scaled.",
        ),
        lines(
            "Lag of the stream",
            "ms",
            [Line(share("tamiyo.ingest.lag", of), f"p{of}") for of in _LATENCIES],
            "From a streamed step's own time to its evaluation.",
        ),
        lines(
            "Frames",
            "short",
            [
                Line(increase("tamiyo.frames", "state"), "{{state}}"),
                Line(increase("tamiyo.frames.missed"), "missed"),
            ],
            "`duplicate` is no fault: an ask and the stream tell the same step.",
        ),
        lines(
            "Points received",
            "short",
            [
                Line(increase("tamiyo.ingest.points", "state"), "{{state}}"),
                Line(increase("tamiyo.ingest.unusable", "reason"), "unusable: {{reason}}"),
            ],
        ),
        lines(
            "OTLP requests",
            "short",
            [
                Line(increase("tamiyo.ingest.requests", "state"), "{{state}}"),
                Line(
                    increase("tamiyo.ingest.connections.closed", "reason"),
                    "connections: {{reason}}",
                ),
            ],
        ),
        lines("Waiting", "short", [Line(reported("tamiyo.queue.depth"), "{{queue}}")]),
        lines(
            "Journal",
            "short",
            [Line(increase("tamiyo.journal.entries", "state"), "{{state}}")],
            "What is `lost` cannot be replayed.",
        ),
        stacked(
            "Ranks by whether they are heard of",
            "none",
            [Line(f"sum by (state) ({reported('tamiyo.runs')})", "{{state}}")],
        ),
        lines(
            "Restarts and reloads",
            "none",
            [
                Line(increase("tamiyo.restarts", "process"), "{{process}} started again"),
                Line(increase("tamiyo.hung", "process"), "{{process}} did not respond"),
                Line(increase("tamiyo.table.reloads", "state"), "another table {{state}}"),
            ],
        ),
        lines(
            "Heartbeat",
            "short",
            [Line(f"sum(rate({own('tamiyo.heartbeat')}[$__rate_interval]))", "per second")],
            "About one a second for each sidecar.",
        ),
    ]
