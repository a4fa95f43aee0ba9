"""*Training*: how a run is doing, and where the time of its steps goes."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.models import common, dashboard

from esper_otel.leyline.custom import NAME
from ops.generate.dashboards.panels import (
    BY_RANK,
    BY_RUN,
    Line,
    PanelBuilder,
    board,
    by_steps,
    for_each_run,
    lines,
    number,
    stacked,
    to_trace,
    unit_of,
)
from ops.generate.dashboards.queries import (
    OTHER,
    PHASES,
    SLOW_FACTOR,
    SLOW_SPAN,
    SLOW_STEPS,
    by_run,
    custom,
    last,
    mean,
    most,
    of,
    over_ranks,
    total,
)


def training() -> Dashboard:
    """The dashboard."""
    made = board(
        "esper-training",
        "esper / Training",
        "Loss, gradients and the time of steps, per rank, at every step.",
    )
    for panel in (*_head(), *_learning()):
        made = made.with_panel(panel)
    made = made.with_row(Row("Step time breakdown"))
    for panel in _time():
        made = made.with_panel(panel)
    made = made.with_row(Row("Devices"))
    for panel in _devices():
        made = made.with_panel(panel)
    return made


def _head() -> list[PanelBuilder]:
    return [
        _of_runs("Step", "none", "max", of("step")),
        _of_runs("Loss", "none", "avg", of("loss"), "Mean over the chosen ranks."),
        _of_runs(
            "Accuracy", "percentunit", "avg", of("accuracy"), "Where the loop reports it."
        ),
        _of_runs("Samples per second", "short", "sum", of("samples_per_s"), "Of all ranks."),
        _of_runs("Step time", "ms", "avg", of("step_latency_ms")),
        _of_runs(
            "Non-finite values",
            "none",
            "sum",
            f"sum_over_time({of('nonfinite')}[$__range])",
            "NaN or infinite, in the time range shown. Curves omit them.",
        ),
    ]


def _of_runs(title: str, unit: str, operator: str, series: str, text: str = "") -> PanelBuilder:
    return number(title, unit, by_run(operator, series), text, legend=BY_RUN)


def _learning() -> list[PanelBuilder]:
    band = (
        lines(
            "Loss and its band",
            "short",
            [
                Line(mean("loss"), BY_RANK),
                Line(over_ranks("loss_ewma"), f"{BY_RUN} weighted mean"),
                Line(_edge("+"), f"{BY_RUN} upper"),
                Line(_edge("-"), f"{BY_RUN} lower"),
            ],
            "The band is the weighted mean and two weighted standard deviations to each side, "
            "of the chosen ranks.",
            width=12,
        )
        .override_by_regexp("/ (upper|lower)$/", [_DASHED])
        .override_by_regexp(
            "/ weighted mean$/", [dashboard.DynamicConfigValue("custom.lineWidth", 3)]
        )
    )
    return [
        band,
        lines(
            "Gradient norm",
            "short",
            [
                Line(most("gradient_norm"), BY_RANK),
                Line(over_ranks("grad_norm_ewma"), f"{BY_RUN} weighted mean"),
            ],
            "Before clipping; the largest per pixel.",
            width=12,
        ),
        lines("Change of the loss", "short", [Line(most("loss_delta"), BY_RANK)]),
        lines(
            "Volatility",
            "short",
            [
                Line(over_ranks("loss_volatility"), f"{BY_RUN} loss: standard deviation"),
                Line(over_ranks("grad_var"), f"{BY_RUN} gradient norm: variance"),
            ],
        ),
        lines(
            "Conflicting gradient sources",
            "percentunit",
            [Line(mean("grad_conflict_rate"), BY_RANK)],
            "Share of the compared pairs; with two sources or more.",
        ),
        lines(
            "Learning rate",
            "sci",
            [
                Line(mean("optimizer_lr"), BY_RANK),
                Line(mean("optimizer_lr_base"), f"base, {BY_RANK}"),
            ],
            "The rate of the updates: the script's own times the factor.",
        ),
        lines(
            "Learning rate factor",
            "short",
            [Line(mean("lr_scale"), BY_RANK)],
            "Factor of decisions on the script's own rate: 1 when none is applied, and always "
            "in `advise` mode.",
        ),
        lines(
            "Skipped updates",
            "none",
            [
                Line(total("update_skipped"), BY_RANK),
                Line(total("restored"), f"{BY_RANK}, snapshot restored"),
                Line(total("gradients_kept"), f"{BY_RANK}, gradients kept"),
            ],
            "Updates skipped by decisions, replaced by a restored snapshot, or with gradients "
            "of earlier ones (a forgotten `zero_grad`); count per pixel.",
        ),
        lines("Momentum", "short", [Line(mean("optimizer_momentum"), BY_RANK)]),
        lines("Accuracy", "percentunit", [Line(mean("accuracy"), BY_RANK)]),
        lines(
            "Custom values",
            "short",
            [
                Line(custom(), f"{{{{{NAME}}}}}, {BY_RANK}"),
                Line(total("custom_nonfinite"), f"not finite, {BY_RANK}"),
            ],
            "Values that the script reports under its own names, including validation metrics; "
            "and the count of NaN or infinite ones per pixel.",
        ),
        lines(
            "Phase",
            "none",
            [Line(most("phase"), BY_RANK)],
            "A rise marks a new phase reported by the loop: earlier values are no reference "
            "for later ones.",
        ),
        for_each_run(
            by_steps(
                "Loss by step: $run",
                "short",
                [
                    Line(mean("loss"), BY_RANK),
                    Line(over_ranks("loss_ewma"), f"{BY_RUN} weighted mean"),
                    Line(custom(evaluations=True), f"{{{{{NAME}}}}}, {BY_RANK}"),
                ],
                "And evaluations. The step is the newest of the chosen ranks.",
            )
        ),
    ]


def _time() -> list[PanelBuilder]:
    phases = [Line(over_ranks(key), name) for name, key in PHASES.items()]
    slow = (
        lines(
            "Slow steps",
            "ms",
            [Line(SLOW_STEPS, BY_RANK)],
            f"Steps that took more than {SLOW_FACTOR} times the median of {SLOW_SPAN}. Click "
            "one to search Jaeger for steps of that duration. A trainer traces a step as slow "
            "when it takes several times (ESPER_SPAN_SLOW_FACTOR) the weighted mean of those "
            "just before it. Repeated slow steps raise that mean, and may not be traced.",
        )
        .draw_style(common.GraphDrawStyle.POINTS)
        .point_size(7)
        .data_links([to_trace()])
    )
    waiting = f"{mean('input_wait_ms')} / {mean('step_latency_ms')}"
    return [
        for_each_run(
            stacked(
                "Step time by phase: $run",
                "ms",
                [*phases, Line(OTHER, "other")],
                "Mean over the chosen ranks. `esper` is the overhead of esper-otel on the "
                "training thread, including decision requests.",
                width=12,
            )
        ),
        lines(
            "Step time by rank",
            "ms",
            [Line(most("step_latency_ms"), BY_RANK)],
            "The slowest step per pixel.",
            width=12,
        ),
        slow,
        lines(
            "Share of the step spent waiting for input",
            "percentunit",
            [Line(waiting, BY_RANK)],
        ),
        lines("Samples per second", "short", [Line(mean("samples_per_s"), BY_RANK)]),
        lines(
            "Instrumentation overhead",
            "ms",
            [
                Line(over_ranks("hook_latency_ms"), f"{BY_RUN} esper-otel, of that"),
                Line(over_ranks("tamiyo_latency_ms"), f"{BY_RUN} decision requests"),
                Line(over_ranks("kasmina.apply_ms"), f"{BY_RUN} applying decisions"),
                Line(over_ranks("kasmina.finalize_ms"), f"{BY_RUN} seeds"),
            ],
        ),
        lines(
            "Host to device",
            unit_of("h2d_copy_ms"),
            [Line(mean("h2d_copy_ms"), BY_RANK)],
            "The first copy of a step; CUDA only.",
        ),
        lines(
            "Steps", "none", [Line(last("step"), BY_RANK)], "Ranks that fall behind fan out."
        ),
    ]


def _devices() -> list[PanelBuilder]:
    return [
        lines(
            "Utilisation",
            "percent",
            [
                Line(mean("cpu_util_percent"), f"CPU, {BY_RANK}"),
                Line(mean("gpu_util_percent"), f"GPU, {BY_RANK}"),
            ],
            width=12,
        ),
        lines(
            "Device memory",
            unit_of("gpu_mem_used_gb"),
            [
                Line(mean("gpu_mem_used_gb"), f"used, {BY_RANK}"),
                Line(mean("gpu_mem_free_gb"), f"free, {BY_RANK}"),
            ],
            "CUDA only.",
            width=12,
        ),
    ]


def _edge(sign: str) -> str:
    return f"{over_ranks('loss_ewma')} {sign} 2 * {over_ranks('loss_volatility')}"


_DASHED = dashboard.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [4, 6]})
