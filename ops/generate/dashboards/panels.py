"""Panels, variables and annotations as all dashboards of ours have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeVar
from urllib.parse import quote

from grafana_foundation_sdk.builders.common import StackingConfig, VizLegendOptions
from grafana_foundation_sdk.builders.common import VizTooltipOptions as Tooltip
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    TextBoxVariable,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.statetimeline import Panel as StateTimeline
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.builders.trend import Panel as Trend
from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common, dashboard

from esper_otel.leyline.metrics import BY_KEY, EXCEPTION_TYPE, HOW_ENDED, RUN_ID, SEED_ID
from esper_otel.leyline.stages import Stage
from ops.generate.dashboards.queries import (
    CHOSEN_RANKS,
    CHOSEN_RUNS,
    DECISIONS,
    ENDS,
    RANK_OF_RUN,
    RISING_STEPS,
    RUN,
    STAGE_CHANGES,
)
from ops.generate.prometheus_names import label_name, prometheus_name

PROMETHEUS = dashboard.DataSourceRef("prometheus", "${datasource}")
"""Whichever Prometheus is chosen above the panels."""

LEAST_INTERVAL = "5s"
"""Of what a pixel spans, so that there is a step in it for most runs."""

BY_RUN = f"{{{{{RUN}}}}}"
BY_RANK = f"{BY_RUN} rank {{{{{RANK_OF_RUN}}}}}"
BY_SEED = f"{BY_RUN} {{{{{SEED_ID}}}}} rank {{{{{RANK_OF_RUN}}}}}"

UNITS = {"ms": "ms", "s": "s", "%": "percent", "GBy": "decgbytes"}
"""Grafana's id of a unit; what stands in braces counts things, and needs none."""

WIDTH = 24
"""Columns of a dashboard."""

STAGE_COLORS = {
    Stage.UNKNOWN: "text",
    Stage.DORMANT: "#6e7687",
    Stage.GERMINATED: "super-light-blue",
    Stage.TRAINING: "blue",
    Stage.BLENDING: "yellow",
    Stage.SHADOWING: "orange",
    Stage.PROBATIONARY: "purple",
    Stage.FOSSILIZED: "green",
    Stage.CULLED: "red",
    Stage.EMBARGOED: "semi-dark-red",
    Stage.RESETTING: "light-orange",
    Stage.TERMINATED: "dark-red",
}

Names = dict[int, tuple[str, str]]
"""A word and a colour for each value of a state."""


STEP_AXIS = "step"

_TO_ONE_TABLE: dict[str, dict[str, object]] = {
    "joinByField": {"byField": "Time", "mode": "outer"},
    "filterByValue": {
        "filters": [{"fieldName": STEP_AXIS, "config": {"id": "isNotNull", "options": {}}}],
        "match": "all",
        "type": "include",
    },
    # A run that began anew within the time shown has steps twice.
    "sortBy": {"fields": {}, "sort": [{"field": STEP_AXIS, "desc": False}]},
    "organize": {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": {}},
}

PanelBuilder = Builder[dashboard.Panel]
Curves = TypeVar("Curves", TimeSeries, Trend)


class Line(NamedTuple):
    """One query, and what its series are called."""

    expr: str
    legend: str


def unit_of(key: str) -> str:
    """Grafana's unit for a metric of the registry."""
    return UNITS.get(BY_KEY[key].unit, "short")


def lines(
    title: str, unit: str, shown: Iterable[Line], text: str = "", *, width: int = 8
) -> TimeSeries:
    """Curves over time; a gap that is only a long step is bridged."""
    panel = (
        TimeSeries()
        .title(title)
        .description(text)
        .unit(unit)
        .datasource(PROMETHEUS)
        .interval(LEAST_INTERVAL)
        .span(width)
        .height(8)
        .span_nulls(300_000)
        .line_width(1)
        .show_points(common.VisibilityMode.AUTO)
        .legend(
            VizLegendOptions().display_mode(common.LegendDisplayMode.LIST).show_legend(True)
        )
        .tooltip(Tooltip().mode(common.TooltipDisplayMode.MULTI))
    )
    return panel.targets(_targets(shown))


def stacked(
    title: str, unit: str, shown: Iterable[Line], text: str = "", *, width: int = 8
) -> TimeSeries:
    """Curves that add up, one upon the other."""
    stacking = StackingConfig().mode(common.StackingMode.NORMAL).group("A")
    return lines(title, unit, shown, text, width=width).stacking(stacking).fill_opacity(60)


def for_each_run(panel: Curves) -> Curves:
    """One such panel for each chosen run: curves of several do not add up."""
    return panel.repeat("run").repeat_direction("h").max_per_row(2)


def by_steps(title: str, unit: str, shown: Iterable[Line], text: str = "") -> Trend:
    """Curves over the steps of one run, to be repeated for each.

    Such a panel wants one table with a column that rises: the answers are joined by their
    time, which is left out then, and rows without a step go. PromQL has no such join.
    """
    panel = (
        Trend()
        .title(title)
        .description(f"{text} Decisions are marked in the panels over time alone.".strip())
        .unit(unit)
        .datasource(PROMETHEUS)
        .interval(LEAST_INTERVAL)
        .span(12)
        .height(8)
        .span_nulls(True)
        .line_width(1)
        .show_points(common.VisibilityMode.AUTO)
        .legend(
            VizLegendOptions().display_mode(common.LegendDisplayMode.LIST).show_legend(True)
        )
        .tooltip(Tooltip().mode(common.TooltipDisplayMode.MULTI))
        .x_field(STEP_AXIS)
        .override_by_name(
            STEP_AXIS,
            [
                dashboard.DynamicConfigValue("unit", "none"),
                dashboard.DynamicConfigValue("custom.axisLabel", "step"),
            ],
        )
    )
    for kind, options in _TO_ONE_TABLE.items():
        panel = panel.with_transformation(
            dashboard.DataTransformerConfig(id_val=kind, options=options)
        )
    return panel.targets(_targets([Line(RISING_STEPS, STEP_AXIS), *shown]))


def states(
    title: str, shown: Iterable[Line], names: Names, text: str = "", *, width: int = WIDTH
) -> StateTimeline:
    """Bars that change their colour; ``names`` gives each value its word and colour."""
    options = {
        str(value): dashboard.ValueMappingResult(word, color, index=place)
        for place, (value, (word, color)) in enumerate(names.items())
    }
    panel = (
        StateTimeline()
        .title(title)
        .description(text)
        .datasource(PROMETHEUS)
        .interval(LEAST_INTERVAL)
        .span(width)
        .height(8)
        .mappings([dashboard.ValueMap(options)])
        .merge_values(True)
        .fill_opacity(80)
        .row_height(0.85)
        .show_value(common.VisibilityMode.AUTO)
    )
    return panel.targets(_targets(shown))


def number(
    title: str, unit: str, expr: str, text: str = "", *, legend: str = "", width: int = 4
) -> Stat:
    """One number, as it is now, or one for each of what ``legend`` names."""
    panel = (
        Stat()
        .title(title)
        .description(text)
        .unit(unit)
        .datasource(PROMETHEUS)
        .span(width)
        .height(4)
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_mode(common.BigValueColorMode.NONE)
        .no_value("unknown")
    )
    query = Dataquery().expr(expr).instant().ref_id("A").datasource(PROMETHEUS)
    return panel.targets([query.legend_format(legend) if legend else query])


def _targets(shown: Iterable[Line]) -> list[Builder[variants.Dataquery]]:
    return [
        Dataquery()
        .expr(line.expr)
        .legend_format(line.legend)
        .range()
        .ref_id(chr(ord("A") + place))
        .datasource(PROMETHEUS)
        for place, line in enumerate(shown)
    ]


def stage_names() -> Names:
    """Every stage by its number."""
    return {stage.value: (stage.name, STAGE_COLORS[stage]) for stage in Stage}


def to_trace() -> DashboardLink:
    """From the milliseconds of a slow step to traces of that length in Jaeger's page."""
    tags = quote(f'{{"{RUN_ID}":"${{__field.labels.{RUN}}}"}}', safe="${}_.")
    search = "lookback=custom&start=${__from}000&end=${__to}000&limit=20"
    least = "minDuration=${__value.numeric}ms"
    url = f"$jaeger/search?service=${{__field.labels.job}}&{search}&{least}&tags={tags}"
    return DashboardLink("Traces of steps as slow").url(url).target_blank(True)


class EventAnnotation(dashboard.AnnotationQuery):
    """An annotation where ``expr`` has a point; what the SDK's own has no fields for added."""

    def __init__(self, name: str, expr: str, color: str, words: str, labels: str) -> None:
        super().__init__(name=name, datasource=PROMETHEUS, icon_color=color, expr=expr)
        self._words = words
        self._labels = labels

    def to_json(self) -> dict[str, object]:
        """For the encoder of the SDK."""
        more = {"titleFormat": self.name, "textFormat": self._words, "tagKeys": self._labels}
        return {**super().to_json(), **more, "step": "15s"}


class Built(Builder[dashboard.AnnotationQuery]):
    """A builder of what is built already, for the SDK, which asks for builders."""

    def __init__(self, annotation: dashboard.AnnotationQuery) -> None:
        self._annotation = annotation

    def build(self) -> dashboard.AnnotationQuery:
        """The annotation that was given."""
        return self._annotation


def board(uid: str, title: str, text: str, *, seeds: bool = False) -> Dashboard:
    """An empty dashboard with our variables, annotations and links."""
    made = (
        Dashboard(title)
        .uid(uid)
        .description(text)
        .tags(["esper"])
        .time("now-30m", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(
            DatasourceVariable("datasource")
            .label("Data source")
            .type(PROMETHEUS.type_val or "")
        )
        .with_variable(_runs())
        .with_variable(_variable("rank", "Rank", _labels_of("step", RANK_OF_RUN, CHOSEN_RUNS)))
        .annotation(
            Built(
                EventAnnotation(
                    "Decision", DECISIONS, "red", "{{action}} by {{rule}}", "action,rule"
                )
            )
        )
        .annotation(
            Built(
                EventAnnotation(
                    "Stage change",
                    STAGE_CHANGES,
                    "blue",
                    f"{{{{{SEED_ID}}}}} changed its stage",
                    SEED_ID,
                )
            )
        )
        .annotation(
            Built(
                EventAnnotation(
                    "Run ended",
                    ENDS,
                    "purple",
                    f"{{{{{label_name(HOW_ENDED)}}}}} {{{{{label_name(EXCEPTION_TYPE)}}}}}",
                    RANK_OF_RUN,
                )
            )
        )
        .link(
            DashboardLink("esper")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["esper"])
            .include_vars(True)
            .keep_time(True)
        )
    )
    if seeds:
        query = _labels_of("kasmina.seed.stage", label_name(SEED_ID), CHOSEN_RANKS)
        made = made.with_variable(_variable("seed", "Seed", query))
    return made.with_variable(
        TextBoxVariable("jaeger").label("Jaeger").default_value("http://127.0.0.1:16686")
    )


def _labels_of(key: str, label: str, where: str) -> str:
    return f"label_values({prometheus_name(BY_KEY[key])}{{{where}}}, {label})"


def _runs() -> QueryVariable:
    """The runs to choose from, the newest first where their names begin with the time."""
    newest_first = dashboard.VariableSort.ALPHABETICAL_DESC
    return _query_variable("run", "Run", _labels_of("step", RUN, "")).sort(newest_first)


def _variable(name: str, label: str, query: str) -> QueryVariable:
    """Whichever are chosen, all of them at first."""
    made = _query_variable(name, label, query).sort(dashboard.VariableSort.NUMERICAL_ASC)
    return made.include_all(True).all_value(".*")


def _query_variable(name: str, label: str, query: str) -> QueryVariable:
    return (
        QueryVariable(name)
        .label(label)
        .datasource(PROMETHEUS)
        .query({"query": query, "refId": name})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
    )
