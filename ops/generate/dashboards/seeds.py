"""*Seeds*: the state of each small network inside the host, and its effect on the host."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from ops.generate.dashboards.panels import (
    BY_RANK,
    BY_RUN,
    BY_SEED,
    Line,
    PanelBuilder,
    board,
    by_steps,
    for_each_run,
    lines,
    number,
    stage_names,
    states,
)
from ops.generate.dashboards.queries import COSINE, by_run, last, mean, most, of


def seeds() -> Dashboard:
    """The dashboard."""
    made = board(
        "esper-seeds",
        "esper / Seeds",
        "Stages, blending and isolation of every seed.",
        seeds=True,
    )
    for panel in _panels():
        made = made.with_panel(panel)
    return made


def _of_runs(title: str, unit: str, operator: str, series: str, text: str = "") -> PanelBuilder:
    return number(title, unit, by_run(operator, series), text, legend=BY_RUN, width=6)


def _panels() -> list[PanelBuilder]:
    return [
        _of_runs("Seeds alive", "none", "max", of("kasmina.seeds_live")),
        _of_runs(
            "Isolation violations",
            "none",
            "max",
            of("kasmina.isolation.violations"),
            "Of all seeds of a rank, since the run began. Anything but 0 is a defect.",
        ),
        _of_runs(
            "Kernels replaced by identity", "none", "sum", of("kasmina.seed.fallback_used")
        ),
        _of_runs("Last fetch of a kernel", "ms", "max", of("kasmina.kernel_fetch_ms")),
        states("Stages", [Line(last("kasmina.seed.stage"), BY_SEED)], stage_names()),
        lines(
            "Alpha",
            "percentunit",
            [Line(mean("kasmina.seed.alpha"), BY_SEED)],
            "Share of the seed's output in the host's.",
        )
        .min(0)
        .max(1),
        lines("Steps of blending", "none", [Line(last("kasmina.seed.alpha_steps"), BY_SEED)]),
        lines(
            "Isolation: cosine of host and seed",
            "short",
            [Line(COSINE, BY_SEED)],
            "Cosine of the two gradients at the slot's input: -1 when they pull in opposite "
            "directions. No point while a norm is zero.",
        )
        .min(-1)
        .max(1),
        lines(
            "Isolation: norms",
            "short",
            [
                Line(mean("kasmina.seed.isolation.host_norm"), f"host, {BY_SEED}"),
                Line(mean("kasmina.seed.isolation.seed_norm"), f"seed, {BY_SEED}"),
            ],
            "The seed norm is 0 while the seed must be isolated.",
        ),
        lines(
            "Isolation: inner product",
            "short",
            [Line(mean("kasmina.seed.isolation.dot"), BY_SEED)],
        ),
        lines(
            "Isolation violations",
            "none",
            [
                Line(last("kasmina.seed.isolation_violations"), BY_SEED),
                Line(last("kasmina.isolation.violations"), f"all, {BY_RANK}"),
            ],
            "Running counts.",
        ),
        lines(
            "Kernel latency",
            "ms",
            [Line(most("kasmina.seed.last_kernel_latency_ms"), BY_SEED)],
        ),
        states(
            "Kernel attached",
            [Line(last("kasmina.seed.kernel_attached"), BY_SEED)],
            {0: ("no", "#6e7687"), 1: ("attached", "green")},
            width=8,
        ),
        states(
            "Identity in place of the kernel",
            [Line(last("kasmina.seed.fallback_used"), BY_SEED)],
            {0: ("no", "green"), 1: ("identity", "red")},
            width=8,
        ),
        for_each_run(
            by_steps(
                "Alpha by step: $run",
                "percentunit",
                [Line(mean("kasmina.seed.alpha"), BY_SEED)],
                "The step is the newest of the chosen ranks.",
            )
            .min(0)
            .max(1)
        ),
    ]
