"""Makes ``docs/metrics.md`` from the registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esper_otel.leyline.custom import EVALUATION, NAME, PREFIX
from esper_otel.leyline.endings import HowEnded
from esper_otel.leyline.frames import MAX_CUSTOM, MAX_CUSTOM_NAME
from esper_otel.leyline.metrics import (
    CUSTOM,
    EXCEPTION_TYPE,
    HOW_ENDED,
    INSTANCE_ID,
    LOCAL_RANK,
    RANK,
    RUN_ENDED,
    RUN_ID,
    SEED_ID,
    SEED_METRICS,
    STEP_METRICS,
    WORLD_SIZE,
    Metric,
)
from esper_otel.leyline.stages import TRANSITIONS, Stage
from ops.generate.files import COMMAND
from ops.generate.prometheus_names import prometheus_name

PAGE = Path("docs/metrics.md")


def files() -> dict[Path, str]:
    """What is written, by its place in the repository."""
    return {PAGE: page()}


def page() -> str:
    """The whole page, as Markdown."""
    return _TEMPLATE.format(
        command=COMMAND,
        steps=_table(STEP_METRICS),
        seeds=_table(SEED_METRICS),
        ended=_table([RUN_ENDED]),
        custom=_table([CUSTOM]).replace(f"`{CUSTOM.key}` |", f"`{PREFIX}NAME` |"),
        custom_name=NAME,
        evaluation=EVALUATION,
        most_custom=MAX_CUSTOM,
        longest_custom=MAX_CUSTOM_NAME,
        how_ended=HOW_ENDED,
        hows=", ".join(f"`{how.value}`" for how in HowEnded),
        exception_type=EXCEPTION_TYPE,
        stages=_stages(),
        seed_id=SEED_ID,
        run_id=RUN_ID,
        rank=RANK,
        world_size=WORLD_SIZE,
        local_rank=LOCAL_RANK,
        instance_id=INSTANCE_ID,
    )


def _table(metrics: Sequence[Metric]) -> str:
    rows = [
        ("instrument", "key in tables", "unit", "gated", "meaning", "present", "in Prometheus"),
        ("---",) * 7,
    ]
    rows += [
        (
            f"`{metric.instrument}`",
            "none" if metric.scope == "run" else f"`{metric.key}`",
            f"`{metric.unit}`",
            "yes" if metric.gated else "",
            metric.meaning,
            metric.when,
            f"`{prometheus_name(metric)}`",
        )
        for metric in metrics
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _stages() -> str:
    rows = ["| value | stage | may go to |", "| --- | --- | --- |"]
    rows += [
        f"| {stage.value} | {stage.name} | "
        f"{', '.join(target.name for target in sorted(TRANSITIONS[stage]))} |"
        for stage in Stage
    ]
    return "\n".join(rows)


_TEMPLATE = """\
<!-- Made by {command} from the registry; edits here are lost. -->

# Metrics

Every optimizer step is one set of gauge points, all with that step's own timestamp (a *step
record*). An unknown value is not sent: no zero stands for "missing". A NaN or infinite value is
not sent either, but counted in `tolaria.nonfinite`.

*Key* is the name used in threshold tables. *Gated* metrics, and their probes, are off when
`TOLARIA_STEP_ENRICHMENT_ENABLED=false`; the others are always present. Times are milliseconds
of a monotonic clock; weighted statistics give the newest value a weight of 0.2. Units are
UCUM.

## Of a step

{steps}

## Of a seed

Every point carries the attribute `{seed_id}`.

{seeds}

Values of `kasmina.seed.stage`:

{stages}

## Of a run

{ended}

The attribute `{how_ended}` says how the run ended: {hows}. After an exception or an
interruption, `{exception_type}` names its type. The metric is one point with its own time,
after all steps. A killed process sends no such point: this covers SIGKILL, a SIGTERM that the
script does not handle, and `os._exit`. If a step follows, as after the first of two trainings
of one model, the run had not ended, and another point reports the next end.

## Of the script's own

{custom}

The attribute `{custom_name}` is the name that the script, or the framework, gives the value:
`run.report(kl=kl)` makes a point with `{custom_name}="kl"`, and tables call it `custom.kl`. A
run can have {most_custom} names of up to {longest_custom} printable characters. All names
share one metric, because a script's name may not be a valid metric name: OpenTelemetry allows
no blanks, Prometheus maps `val.loss` and `val_loss` to the same name, and `loss` is taken. As
an attribute any text is valid, and one query finds all of them. The price: they share a unit,
so a sum over names has no meaning.

If a word of the name indicates held-out data (`val`, `valid`, `validation`, `eval`,
`evaluation`, `test`, `dev`, `heldout`), the point carries `{evaluation}`, true. A value
reported between two steps has the time of the following step, and the sidecar evaluates it
with that step. A report shows an evaluation at the preceding step, whose weights it measured.
A value after the last step arrives with the end of the run, at its time.

## Identifying runs and processes

The resource of a point identifies its run and process; the attributes of the point never do. A
step number is never an attribute, because it would create one series per step.

| resource attribute | meaning |
| --- | --- |
| `service.name` | `OTEL_SERVICE_NAME`, else `esper-trainer` |
| `{instance_id}` | unique per process |
| `{run_id}` | the run, the same for all its ranks |
| `{rank}`, `{world_size}` | this process among those of the run |
| `{local_rank}` | this process among those of the run on its host, where that is known |
| `esper.run.name`, `esper.run.tag.KEY` | name and tags of the run, where it has any |

Other attributes that OpenTelemetry detects, or that `OTEL_RESOURCE_ATTRIBUTES` adds, are
included.

In Prometheus, resource attributes become labels of `target_info`. To have them on every
series, set `resource_to_telemetry_conversion: {{enabled: true}}` on the Collector's exporter,
or `promote_resource_attributes` in Prometheus itself.

Prometheus gets the metric descriptions from
[`docker/prometheus/assets/help.txt`](../docker/prometheus/assets/help.txt), which it scrapes
from itself ([operating](operating.md#the-stack-on-one-machine)). The points carry no
description, because it would double the bytes of a step. The gauges of your own meter provider
have descriptions.

## About the names

OpenTelemetry's conventions recommend seconds, and no unit in a name. The metric schema of
threshold tables and dashboards fixed these names, so they stay, and the unit is sent as well.
The translation to Prometheus appends the unit's word unless the name ends in it, which gives
names such as `tolaria_step_latency_ms_milliseconds`: odd, but correct, and the same
everywhere. The conventions have no names for training. For processes and hosts, which they do
cover, use a Collector's host metrics receiver beside these. """
