"""Dashboards: made from the registry, and nothing of it forgotten."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from esper_otel.leyline.metrics import BY_KEY, CUSTOM, RUN_ENDED
from esper_otel.leyline.stages import Stage
from esper_tamiyo.journaling.own_metrics import OWN_METRICS
from ops.generate.dashboards.answers import chosen, queries
from ops.generate.dashboards.json_files import BY_HAND, DASHBOARDS, FOLDER
from ops.generate.dashboards.panels import UNITS
from ops.generate.dashboards.queries import RISING_STEPS
from ops.generate.prometheus_names import prometheus_name, series_name
from ops.stack.programs import PROMETHEUS, MissingError, find
from testkit.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
PROVISIONING = ROOT / "docker" / "grafana" / "provisioning"
NAMES = ("training", "seeds", "tamiyo")
BOARDS = {name: json.loads((ROOT / FOLDER / f"{name}.json").read_text()) for name in NAMES}
EVERY = [query for board in BOARDS.values() for query in queries(board)]

OF_RUNS = {prometheus_name(metric) for metric in BY_KEY.values()}

each_board = pytest.mark.parametrize("name", NAMES)


def test_no_dashboard_lies_there_that_the_code_does_not_make():
    assert {path.stem for path in (ROOT / FOLDER).glob("*.json")} == {*NAMES} == {*DASHBOARDS}


def names_in(text):
    return set(re.findall(r"\b(?:tolaria|kasmina|tamiyo)_\w+", text))


def test_every_metric_of_the_registry_and_of_tamiyo_has_a_panel():
    asked = set().union(*(names_in(query.expr) for query in EVERY))
    asked = {re.sub(r"_bucket$", "", name) for name in asked}
    own = {series_name(metric.name, metric.unit, metric.kind.value) for metric in OWN_METRICS}
    others = (CUSTOM, RUN_ENDED)
    assert asked == own | {prometheus_name(metric) for metric in (*BY_KEY.values(), *others)}


@each_board
def test_it_can_be_told_what_to_show(name):
    board = BOARDS[name]
    variables = {one["name"] for one in board["templating"]["list"]}
    seed = {"seed"} if name == "seeds" else set()
    assert variables == {"datasource", "run", "rank", "jaeger"} | seed
    assert all(one["multi"] for one in board["templating"]["list"] if one["type"] == "query")
    values = dict.fromkeys(variables, "x") | {
        "__interval": "5s",
        "__rate_interval": "60s",
        "__range": "60s",
    }
    for query in queries(board):
        assert "$" not in chosen(query.expr, values)


@each_board
def test_decisions_stage_changes_and_ends_are_marked(name):
    marks = {one["name"]: one for one in BOARDS[name]["annotations"]["list"]}
    assert {*marks} == {"Decision", "Stage change", "Run ended"}
    for mark in marks.values():
        assert names_in(mark["expr"])
        assert "$__" not in mark["expr"], "Grafana has no interval to put into annotations"
        assert mark["titleFormat"]
        assert mark["tagKeys"]


@each_board
def test_panels_have_places_ids_and_the_data_source_that_is_chosen(name):
    panels = BOARDS[name]["panels"]
    (source,) = (v for v in BOARDS[name]["templating"]["list"] if v["type"] == "datasource")
    ids = [panel["id"] for panel in panels]
    assert sorted(ids) == sorted({*ids})
    titles = [(panel["title"], panel["type"]) for panel in panels]
    assert sorted(titles) == sorted({*titles})
    sources = yaml.safe_load((PROVISIONING / "datasources" / "esper.yaml").read_text())
    assert source["query"] in {one["type"] for one in sources["datasources"]}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": source["query"], "uid": "${datasource}"}
            assert {str(t["datasource"]) for t in panel["targets"]} == {
                str(panel["datasource"])
            }


@each_board
def test_what_is_imported_by_hand_asks_for_its_data_source_and_is_else_the_same(name):
    told = json.loads((ROOT / BY_HAND / f"{name}.json").read_text())
    (wanted,) = told.pop("__inputs")
    assert (wanted["type"], wanted["pluginId"]) == ("datasource", "prometheus")
    required = {(one["type"], one["id"]) for one in told.pop("__requires")}
    panels = {panel["type"] for panel in told["panels"]} - {"row"}
    assert required == {("datasource", "prometheus"), *(("panel", panel) for panel in panels)}
    (source,) = (v for v in told["templating"]["list"] if v["type"] == "datasource")
    assert source.pop("current")["value"] == f"${{{wanted['name']}}}"
    assert told.pop("id") is None
    of_ours = json.loads((ROOT / FOLDER / f"{name}.json").read_text())
    for one in of_ours["templating"]["list"]:
        if one["type"] == "datasource":
            one.pop("current", None)
    of_ours.pop("id", None)
    assert told == of_ours


@each_board
def test_curves_of_several_runs_are_told_apart(name):
    for query in queries(BOARDS[name]):
        of_runs = {*names_in(query.expr)} & OF_RUNS
        by_itself = any(
            panel["title"] == query.panel and panel.get("repeat") == "run"
            for panel in BOARDS[name]["panels"]
        )
        if of_runs and query.kind != "annotation" and not by_itself:
            assert "{{esper_run_id}}" in query.legend, query.panel
            assert not re.search(r"\b(avg|sum|max|min|count) ?\(", query.expr), query.panel


@pytest.mark.parametrize(
    ("name", "title"), [("training", "Loss by step: $run"), ("seeds", "Alpha by step: $run")]
)
def test_some_panels_have_steps_as_their_axis(name, title):
    (panel,) = (p for p in BOARDS[name]["panels"] if p["title"] == title)
    assert (panel["type"], panel["repeat"]) == ("trend", "run")
    axis = panel["options"]["xField"]
    told = [target["legendFormat"] for target in panel["targets"]]
    assert told.count(axis) == 1
    # Such a panel reads one table, whose axis has no holes and never falls.
    made = {one["id"]: one["options"] for one in panel["transformations"]}
    assert [*made] == ["joinByField", "filterByValue", "sortBy", "organize"]
    assert made["filterByValue"]["filters"][0]["fieldName"] == axis
    assert made["sortBy"]["sort"] == [{"field": axis, "desc": False}]


def test_steps_that_are_an_axis_rise_even_where_nothing_new_comes(tmp_path):
    try:
        promtool = find(PROMETHEUS).with_name("promtool")
    except MissingError as error:
        pytest.skip(str(error))
    expr = chosen(RISING_STEPS, {"run": "r", "rank": ".*", "__interval": "5s"})
    ranks = {"0": "0+1x30", "1": "_ _ _ _ _ _ _ 0+1x23"}  # the second is behind
    # Behind the last step Prometheus repeats it for five minutes.
    newest = {5: 5, 20: 20, 30: 30, 35: None, 60: None}
    told = [
        {"labels": '{esper_run_id="r"}', "value": step} if step is not None else None
        for step in newest.values()
    ]
    test = {
        "interval": "1s",
        "input_series": [
            {"series": f'tolaria_step{{esper_run_id="r",esper_rank="{rank}"}}', "values": steps}
            for rank, steps in ranks.items()
        ],
        "promql_expr_test": [
            {"expr": expr, "eval_time": f"{at}s", "exp_samples": [one] if one else []}
            for at, one in zip(newest, told, strict=True)
        ],
    }
    path = tmp_path / "axis.yaml"
    path.write_text(json.dumps({"evaluation_interval": "5s", "tests": [test]}))
    done = subprocess.run(
        [promtool, "test", "rules", path], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_slow_step_leads_to_its_trace():
    (slow,) = (p for p in BOARDS["training"]["panels"] if p["title"] == "Slow steps")
    (link,) = slow["fieldConfig"]["defaults"]["links"]
    assert link["url"].startswith("$jaeger/search?service=${__field.labels.job}")
    for told in ("${__field.labels.esper_run_id}", "=${__value.numeric}ms", "${__from}000"):
        assert told in link["url"]


def test_stages_have_their_names_and_each_its_colour():
    (timeline,) = (p for p in BOARDS["seeds"]["panels"] if p["title"] == "Stages")
    assert timeline["type"] == "state-timeline"
    (mapping,) = timeline["fieldConfig"]["defaults"]["mappings"]
    told = {int(value): one for value, one in mapping["options"].items()}
    assert {value: one["text"] for value, one in told.items()} == {
        s.value: s.name for s in Stage
    }
    assert len({one["color"] for one in told.values()}) == len(Stage)


def test_units_are_those_of_the_registry():
    for query in EVERY:
        keys = [m for m in BY_KEY.values() if prometheus_name(m) in names_in(query.expr)]
        units = {metric.unit for metric in keys}
        if units == {"ms"} and "/" not in query.expr:
            assert query.unit == UNITS["ms"], query.panel
