"""Alerts about runs that end, and about the health of Tamiyo and of the Collector between it
and the trainers."""

from __future__ import annotations

from collections.abc import Iterable

from esper_otel.leyline.endings import HowEnded
from esper_otel.leyline.metrics import BY_KEY, EXCEPTION_TYPE, HOW_ENDED, RUN_ENDED, RUN_ID
from esper_otel.settings import EsperSettings
from esper_tamiyo.journaling.own_metrics import OWN_METRICS
from ops.generate.alerts.alert import Alert, Severity
from ops.generate.prometheus_names import label_name, prometheus_name, series_name

WITHIN = "5m"

DEADLINE_MS = f"{EsperSettings().tamiyo_deadline_ms:g}"
"""Of the trainer's client, unless it is set otherwise."""

LAG_MS = 1000
"""More than three times what the way through the Collector may take at the default interval."""

_OWN = {metric.name: metric for metric in OWN_METRICS}
_SIGNALS = ("metric_points", "spans", "log_records")
"""As the Collector's counters name them."""

_TRAINING = f"count(count_over_time({prometheus_name(BY_KEY['step'])}[{WITHIN}]))"
"""Whether anybody trains: without a trainer nobody misses Tamiyo."""


def _own(name: str) -> str:
    metric = _OWN[name]
    return series_name(metric.name, metric.unit, metric.kind.value)


def _rises(name: str, where: str = "", by: str = "") -> str:
    """By how much a counter of Tamiyo's rose."""
    return _risen(f"{_own(name)}{{{where}}}" if where else _own(name), by)


def _risen(series: str, by: str) -> str:
    """By how much a counter rose; one that is new counts as it stands."""
    new = f"({series} unless {series} offset {WITHIN})"
    return f"sum by ({by}) ({new} or increase({series}[{WITHIN}])) > 0"


def _share(name: str, percent: int) -> str:
    buckets = f"rate({_own(name)}_bucket[{WITHIN}])"
    return f"histogram_quantile({percent / 100:g}, sum by (le, instance) ({buckets}))"


def _alert(
    name: str, severity: Severity, for_: str, expr: str, summary: str, description: str = ""
) -> Alert:
    return Alert(
        name=name,
        expr=expr,
        for_=for_,
        severity=severity,
        anchor=name.lower(),
        summary=summary,
        description=description or "Seen: {{ $value | humanize }}",
    )


def runs() -> list[Alert]:
    """About runs that end as they should not, as their trainers say."""
    run, exception = label_name(RUN_ID), label_name(EXCEPTION_TYPE)
    failed = f'{label_name(HOW_ENDED)}="{HowEnded.EXCEPTION}"'
    ends = f"last_over_time({prometheus_name(RUN_ENDED)}{{{failed}}}[{WITHIN}])"
    return [
        Alert(
            name="EsperRunFailed",
            expr=f"count by ({run}, {exception}) ({ends})",
            for_="0s",
            severity="high",
            anchor="esperrunfailed",
            summary=f"An exception ended a run: {{{{ $labels.{exception} }}}}.",
            description=f"Run {{{{ $labels.{run} }}}}, on {{{{ $value }}}} of its ranks.",
        )
    ]


def tamiyo() -> list[Alert]:
    """About the sidecar, from its own metrics."""
    high = 'severity=~"HIGH|CRITICAL"'
    beats = _own("tamiyo.heartbeat")
    return [
        Alert(
            name="TamiyoDecided",
            expr=_rises("tamiyo.decisions", high, "rule, action"),
            for_="0s",
            severity="high",
            anchor="tamiyodecided",
            summary="Tamiyo decided {{ $labels.action }} by the rule {{ $labels.rule }}.",
            description="{{ $value | humanize }} times in five minutes; the runbook explains "
            "the rule under its name.",
        ),
        _alert(
            "TamiyoRunFailed",
            "high",
            "0s",
            _rises("tamiyo.runs.ended", f'how="{HowEnded.EXCEPTION}"', "instance"),
            "Runs of this Tamiyo ended by an exception.",
            "{{ $value | humanize }} ranks in five minutes; the journal names them.",
        ),
        _alert(
            "TamiyoSilent",
            "high",
            "2m",
            # By name and not by instance: one that was started again is another instance,
            # and the one beside a trainer that is done has nothing more to say.
            f"(max by (job) (last_over_time({beats}[1h]))"
            f" unless on(job) increase({beats}[{WITHIN}]) > 0)"
            f" and on() ({_TRAINING} > 0)",
            "Tamiyo heartbeat missing while training runs are active.",
        ),
        _alert(
            "TamiyoMissesSteps",
            "warning",
            WITHIN,
            _rises("tamiyo.frames.missed", by="instance"),
            "Tamiyo evaluated steps without having received those before them.",
        ),
        _alert(
            "TamiyoAnswersLate",
            "warning",
            WITHIN,
            f"{_share('tamiyo.answer.duration', 99)} > {DEADLINE_MS}",
            f"One decision request in a hundred takes more than {DEADLINE_MS} ms to answer.",
        ),
        _alert(
            "TamiyoLags",
            "warning",
            WITHIN,
            f"{_share('tamiyo.ingest.lag', 95)} > {LAG_MS}",
            "Streamed steps are evaluated more than a second after they ended.",
        ),
        _alert(
            "TamiyoRefuses",
            "warning",
            "0s",
            _rises("tamiyo.ingest.requests", 'state!="accepted"', "state"),
            "Tamiyo refuses OTLP requests: {{ $labels.state }}.",
        ),
        _alert(
            "TamiyoRestarted",
            "warning",
            "0s",
            _rises("tamiyo.restarts", by="process"),
            "A Tamiyo process ended and was restarted: {{ $labels.process }}.",
        ),
        _alert(
            "TamiyoHung",
            "high",
            "0s",
            _rises("tamiyo.hung", by="process"),
            "A Tamiyo process stopped responding and was replaced: {{ $labels.process }}.",
        ),
        _alert(
            "TamiyoJournalLoses",
            "warning",
            "0s",
            _rises("tamiyo.journal.entries", 'state="lost"', "instance"),
            "Decisions could not be written to the journal.",
        ),
    ]


def collector() -> list[Alert]:
    """About the Collector, from what Prometheus scrapes of it."""
    to_tamiyo, queued = 'exporter=~".*tamiyo"', 'exporter!~".*tamiyo|.*logs"'
    # What remote write could not bring, the half that hands over to it still has.
    of_trainers = 'receiver!~".*handover"'
    to_stay = 'exporter!~".*tamiyo|prometheus_remote_write"'
    return [
        _alert(
            "CollectorDown",
            "high",
            "1m",
            'up{part="collector"} == 0',
            "The Collector at {{ $labels.instance }} does not answer. Trainers spool their "
            "telemetry.",
        ),
        _alert(
            "CollectorQueueFills",
            "warning",
            "2m",
            f"otelcol_exporter_queue_size{{{queued}}} / otelcol_exporter_queue_capacity > 0.5",
            "The queue of {{ $labels.exporter }} is half full: its backend is down or slow.",
            "Full to {{ $value | humanizePercentage }}.",
        ),
        _alert(
            "CollectorRefuses",
            "high",
            "1m",
            _any_rises(
                f"otelcol_receiver_refused_{what}{{{of_trainers}}}" for what in _SIGNALS
            ),
            "The Collector rejects requests of trainers: memory or a queue is full.",
        ),
        _alert(
            "CollectorLoses",
            "warning",
            "0s",
            _any_rises(
                (f"otelcol_exporter_send_failed_{what}{{{to_stay}}}" for what in _SIGNALS),
                by="instance, exporter",
            ),
            "{{ $labels.exporter }} lost accepted telemetry: its backend rejected it "
            "permanently.",
        ),
        _alert(
            "CollectorDropsForTamiyo",
            "warning",
            "1m",
            _any_rises(
                f"otelcol_exporter_{why}_failed_metric_points{{{to_tamiyo}}}"
                for why in ("enqueue", "send")
            ),
            "Points for Tamiyo are dropped: it is down or slow, and evaluates decision "
            "requests only.",
        ),
    ]


def _any_rises(counters: Iterable[str], by: str = "instance") -> str:
    """That one of the Collector's counters rises; some are there from their first count on."""
    return " or ".join(_risen(one, by) for one in counters)
