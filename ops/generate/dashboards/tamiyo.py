"""*Tamiyo*: its decisions, its latency, and the health of its ingest."""

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


CALM = "nominal|warming_up"
"""Reasons of decisions for which no rule fired."""


def tamiyo() -> Dashboard:
    """The dashboard."""
    made = board(
        "esper-tamiyo",
        "esper / Tamiyo",
        "Decisions and rules, and the health of the sidecar. Its own metrics cover all runs "
        "that it serves; the variables filter request times and annotations.",
    )
    for panel in (*_head(), *_deciding()):
        made = made.with_panel(panel)
    made = made.with_row(Row("Ingest health"))
    for panel in _seeing():
        made = made.with_panel(panel)
    return made


def _head() -> list[PanelBuilder]:
    return [
        number("Healthy ranks", "none", f"sum({_ranks('healthy')})"),
        number(
            "In conservative mode",
            "none",
            f"sum({reported('tamiyo.conservative')})",
            "Ranks whose seed operations are all refused for a while.",
        ),
        number("Connections", "none", f"sum({reported('tamiyo.connections')})"),
        number("Uptime", "s", f"min({reported('tamiyo.uptime')})"),
        number(
            "Age of the table",
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
                    increase("tamiyo.decisions", "rule", "action", where=f'rule!~"{CALM}"'),
                    "{{rule}}: {{action}}",
                )
            ],
            "All except `nominal` and `warming_up`; `conservative_mode` refused a seed "
            "operation.",
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
            "A trainer in `enforce` mode found a value beyond its guards and sent a request. "
            "`smaller`: lower rate or clipped gradients for this update; `skipped`: no update.",
        ),
        states(
            "Rules",
            [Line(f"max by (rule) ({worst})", "{{rule}}")],
            {value: (state.value, color) for state, (value, color) in STATES.items()},
            "Worst state of each rule over all ranks and seeds.",
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
            "Rules of Tamiyo's table with a PromQL form, as Prometheus evaluates them.",
            width=12,
        ),
    ]


def _in_state(state: RuleState) -> str:
    series = f'{own("tamiyo.rules")}{{state="{state.value}"}}'
    return f"last_over_time({series}[{REPORTED_WITHIN}])"


def _ranks(state: str) -> str:
    return f'last_over_time({own("tamiyo.runs")}{{state="{state}"}}[{REPORTED_WITHIN}])'


def _seeing() -> list[PanelBuilder]:
    return [
        lines(
            "Answering",
            "ms",
            [Line(share("tamiyo.answer.duration", of), f"p{of}") for of in _LATENCIES],
            "From receiving a request, about a step or an update, to answering it.",
        ),
        lines(
            "Time spent on decision requests",
            "ms",
            [Line(most("tamiyo_latency_ms"), BY_RANK)],
            "On the training thread: sending, collecting the answer, and waiting for a late "
            "one. The longest per pixel.",
        ),
        lines(
            "Unanswered decision requests in a row",
            "none",
            [Line(most("unjudged_steps"), BY_RANK)],
            "Above 0 the run is not evaluated: a scaled learning rate stays scaled.",
        ),
        lines(
            "Lag of the stream",
            "ms",
            [Line(share("tamiyo.ingest.lag", of), f"p{of}") for of in _LATENCIES],
            "From a streamed step's own time to its evaluation.",
        ),
        lines(
            "Step records",
            "short",
            [
                Line(increase("tamiyo.frames", "state"), "{{state}}"),
                Line(increase("tamiyo.frames.missed"), "missed"),
                Line(increase("tamiyo.frames.refused", "reason"), "refused: {{reason}}"),
            ],
            "`duplicate` is normal: a decision request and the stream carry the same step.",
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
            "`lost` entries cannot be recovered.",
        ),
        stacked(
            "Ranks by state",
            "none",
            [Line(f"sum by (state) ({reported('tamiyo.runs')})", "{{state}}")],
            "`stale`: no telemetry for too long, for an unknown reason. `finished` and "
            "`failed` ranks reported the end of their run, and are removed first.",
        ),
        lines(
            "Ends of runs",
            "short",
            [Line(increase("tamiyo.runs.ended", "how"), "{{how}}")],
            "As reported by their ranks.",
        ),
        lines(
            "Restarts and reloads",
            "none",
            [
                Line(increase("tamiyo.restarts", "process"), "{{process}} restarted"),
                Line(increase("tamiyo.hung", "process"), "{{process}} hung"),
                Line(increase("tamiyo.table.reloads", "state"), "table {{state}}"),
            ],
        ),
        lines(
            "Heartbeat",
            "short",
            [Line(f"sum(rate({own('tamiyo.heartbeat')}[$__rate_interval]))", "per second")],
            "About one per second for each sidecar.",
        ),
    ]
