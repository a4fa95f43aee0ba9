"""The PromQL of the panels, in the names that Prometheus has for our metrics."""

from __future__ import annotations

from esper_otel.leyline.custom import EVALUATION
from esper_otel.leyline.metrics import BY_KEY, CUSTOM, RANK, RUN_ENDED, RUN_ID, SEED_ID
from esper_tamiyo.journaling.own_metrics import OWN_METRICS, InstrumentKind
from ops.generate.prometheus_names import label_name, prometheus_name, series_name

RUN, RANK_OF_RUN = label_name(RUN_ID), label_name(RANK)

CHOSEN_RUNS = f'{RUN}=~"$run"'
CHOSEN_RANKS = f'{CHOSEN_RUNS}, {RANK_OF_RUN}=~"$rank"'
CHOSEN_SEEDS = f'{CHOSEN_RANKS}, {SEED_ID}=~"$seed"'

TOLD_WITHIN = "1m"
"""A step longer than this leaves gaps."""

REPORTED_WITHIN = "3m"
"""Tamiyo reports once a minute at most: what it has not said for so long is over."""

_OWN = {metric.name: metric for metric in OWN_METRICS}


def of(key: str) -> str:
    """The chosen ranks' (or seeds') series of a metric of the registry."""
    metric = BY_KEY[key]
    chosen = CHOSEN_SEEDS if metric.scope == "seed" else CHOSEN_RANKS
    return f"{prometheus_name(metric)}{{{chosen}}}"


def mean(key: str) -> str:
    """Averaged over what a pixel spans."""
    return f"avg_over_time({of(key)}[$__interval])"


def last(key: str) -> str:
    """As it is, while it is told: Prometheus itself would repeat it for five minutes."""
    return f"last_over_time({of(key)}[{TOLD_WITHIN}])"


def most(key: str) -> str:
    """The largest that a pixel spans: one slow step in a thousand is seen."""
    return f"max_over_time({of(key)}[$__interval])"


def total(key: str) -> str:
    """Summed over what a pixel spans."""
    return f"sum_over_time({of(key)}[$__interval])"


def by_run(operator: str, series: str) -> str:
    """What the chosen ranks of each run come to together."""
    return f"{operator} by ({RUN}) ({series})"


def custom(*, evaluations: bool = False) -> str:
    """What the scripts of the chosen ranks report themselves, by name; or ``evaluations``
    alone."""
    only = f', {label_name(EVALUATION)}="true"' if evaluations else ""
    series = f"{prometheus_name(CUSTOM)}{{{CHOSEN_RANKS}{only}}}"
    return f"avg_over_time({series}[$__interval])"


def over_ranks(key: str) -> str:
    """The mean over the chosen ranks of each run."""
    return by_run("avg", mean(key))


def own(name: str) -> str:
    """A gauge of Tamiyo's, or a counter as it stands."""
    metric = _OWN[name]
    return series_name(metric.name, metric.unit, metric.kind.value)


def reported(name: str) -> str:
    """A gauge of Tamiyo's while it reports it."""
    return f"last_over_time({own(name)}[{REPORTED_WITHIN}])"


def increase(name: str, *labels: str, where: str = "", span: str = "$__rate_interval") -> str:
    """By how much a counter of Tamiyo's rose, by ``labels``.

    A counter whose labels are new begins with its first count, which ``increase`` cannot
    see: what was not there before counts as it stands.
    """
    series = f"{own(name)}{{{where}}}" if where else own(name)
    new = f"({series} unless {series} offset {span})"
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} ({new} or increase({series}[{span}]))"


def share(name: str, percent: float) -> str:
    """What so many percent of a histogram of Tamiyo's do not exceed."""
    assert _OWN[name].kind is InstrumentKind.HISTOGRAM, name
    buckets = f"rate({own(name)}_bucket[$__rate_interval])"
    return f"histogram_quantile({percent / 100:g}, sum by (le) ({buckets}))"


_NOW = by_run("max", most("step"))
_BEFORE = by_run("max", f"max_over_time({of('step')}[$__interval] offset $__interval)")
RISING_STEPS = f"{_NOW} unless ({_NOW} <= {_BEFORE})"
"""The newest step of each pixel, where it is above that of the pixel before: an axis has each
step once, and rising."""

_STAGE = prometheus_name(BY_KEY["kasmina.seed.stage"])
STAGE_CHANGES = f"changes({_STAGE}{{{CHOSEN_RANKS}}}[30s]) > 0"
ENDS = f"last_over_time({prometheus_name(RUN_ENDED)}{{{CHOSEN_RANKS}}}[30s])"
DECISIONS = (
    increase("tamiyo.decisions", "action", "rule", where='action!="CONTINUE"', span="1m")
    + " > 0"
)
"""For annotations, where Grafana has no interval of its own to offer."""

_NORMS = " * ".join(last(f"kasmina.seed.isolation.{side}_norm") for side in ("host", "seed"))
COSINE = f"{last('kasmina.seed.isolation.dot')} / ({_NORMS} > 0)"
"""A norm of zero has no direction: then there is no point."""

PHASES = {
    "input wait": "input_wait_ms",
    "forward": "forward_ms",
    "backward": "backward_ms",
    "optimizer": "optimizer_ms",
    "esper": "hook_latency_ms",
}
_NOTHING = f"0 * {over_ranks('step_latency_ms')}"
OTHER = (
    f"clamp_min({over_ranks('step_latency_ms')} - "
    f"({' + '.join(f'({over_ranks(key)} or {_NOTHING})' for key in PHASES.values())}), 0)"
)
"""What is left of the step."""

SLOW_FACTOR, SLOW_SPAN = 2, "10m"
SLOW_STEPS = (
    f"{most('step_latency_ms')} > "
    f"{SLOW_FACTOR} * quantile_over_time(0.5, {of('step_latency_ms')}[{SLOW_SPAN}])"
)
"""The slowest step of each pixel, where that is slow; the exact time, for a link to find it."""
