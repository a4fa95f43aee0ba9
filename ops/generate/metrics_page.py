"""Makes ``docs/metrics.md`` from the registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esper_otel.leyline.custom import EVALUATION, NAME, PREFIX
from esper_otel.leyline.endings import HowEnded
from esper_otel.leyline.limits import MAX_CUSTOM, MAX_CUSTOM_NAME
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

Every optimizer step is one set of gauge points, all with that step's own timestamp. A
value that is not known is not sent: there is no zero that stands for "missing". A value
that was NaN or infinite is not sent either, but counted in `tolaria.nonfinite`.

*Key* is the name used in threshold tables. *Gated* metrics, and the probes behind them,
are off when `TOLARIA_STEP_ENRICHMENT_ENABLED=false`; the others are always there. Times are
milliseconds of a monotonic clock; weighted statistics give the newest value a weight of
0.2. Units are UCUM.

## Of a step

{steps}

## Of a seed

Every point carries the attribute `{seed_id}`.

{seeds}

Values of `kasmina.seed.stage`:

{stages}

## Of a run

{ended}

The attribute `{how_ended}` says how it ended: {hows}. Where an
exception did, or an interruption, `{exception_type}` names its type. It is one point with a
time of its own, behind all steps.
A process that is killed, by SIGKILL or by a SIGTERM that the script does not handle, says
nothing, nor does one that leaves by `os._exit`. Where a step follows after all, as after the
first of two trainings of one model, it was not the end, and another point says the next one.

## Of the script's own

{custom}

The attribute `{custom_name}` is what the script, or the framework, calls the value:
`run.report(kl=kl)` makes a point with `{custom_name}="kl"`, which tables call `custom.kl`. A
run can have {most_custom} names of up to {longest_custom} printable characters. They are one
metric, and not one for each name, as what a script calls its values need not be the name of a
metric: OpenTelemetry allows no blanks in those, Prometheus gives `val.loss` and `val_loss` the
same one, and `loss` is taken. With an attribute any text is a name, and one query finds all of
them. The price: they share a unit, so a sum over names means nothing.

Where a word of the name says that it is measured on held-out data (`val`, `valid`,
`validation`, `eval`, `evaluation`, `test`, `dev`, `heldout`), the point carries `{evaluation}`,
true. What is reported between two steps has the time of the step that follows: with that one
the sidecar evaluates it. A report shows evaluations at the step before, whose weights were
measured. What no step follows comes with the end of the run, at its time.

## Whose values they are

Which run and which process a point belongs to is said by its resource, never by its own
attributes, and a step number is never an attribute: it would make one series per step.

| resource attribute | meaning |
| --- | --- |
| `service.name` | `OTEL_SERVICE_NAME`, else `esper-trainer` |
| `{instance_id}` | unique per process |
| `{run_id}` | the run, the same for all its ranks |
| `{rank}`, `{world_size}` | this process among those of the run |
| `{local_rank}` | this process among those of the run on its host, where that is known |
| `esper.run.name`, `esper.run.tag.KEY` | name and tags of the run, where it has any |

Whatever else OpenTelemetry detects, or `OTEL_RESOURCE_ATTRIBUTES` adds, is there as well.

In Prometheus, resource attributes become labels of `target_info`; to have them on every
series set `resource_to_telemetry_conversion: {{enabled: true}}` on the Collector's
exporter, or `promote_resource_attributes` in Prometheus itself.

What a metric means is told to Prometheus by
[`docker/prometheus/assets/help.txt`](../docker/prometheus/assets/help.txt), which it scrapes of
itself ([operating](operating.md#the-stack-on-one-machine)): points carry no description, which
would double a step's bytes. The gauges of a meter provider of your own have it.

## About the names

OpenTelemetry's conventions advise seconds, and no unit in a name. These names were fixed
by the metric schema that threshold tables and dashboards are written against, so they
stay, and the unit is sent beside them all the same. That is why the translation to
Prometheus, which appends the unit's word unless the name has it already, gives names
such as `tolaria_step_latency_ms_milliseconds`: odd, but right, and the same everywhere.
The conventions have no names for training; for what they do name, processes and hosts,
use a Collector's host metrics receiver beside these.
"""
