"""Alert rules: made from the table, checked by promtool, each with its place in the runbook."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from esper_otel.leyline.metrics import BY_KEY, RUN_ENDED
from esper_tamiyo.language.table_file import TableSource, load, parse
from ops.generate.alerts import health
from ops.generate.alerts.alert import RUNBOOK
from ops.generate.alerts.from_table import translated
from ops.generate.alerts.promql import JUDGED, Translator, UntranslatableError
from ops.generate.alerts.rules import RULES, files
from ops.generate.prometheus_assets import RUNBOOK_PAGE, anchor
from ops.generate.prometheus_names import prometheus_name
from ops.stack.programs import PROMTOOL, MissingError, find

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
DEFAULT = load("default")
MADE = translated(DEFAULT)
HEALTH = [*health.runs(), *health.tamiyo(), *health.collector()]


@pytest.fixture(scope="module")
def promtool():
    try:
        return find(PROMTOOL)
    except MissingError as error:
        pytest.skip(str(error))


def test_every_rule_of_the_table_alerts_or_has_its_reason():
    said = [alert.labels["rule"] for alert in MADE.alerts]
    assert [rule.id for rule in DEFAULT.rules if rule.id in {*said}] == said
    assert {*said} | {*MADE.untranslated} == {rule.id for rule in DEFAULT.rules}
    assert not {*said} & {*MADE.untranslated}


@pytest.mark.parametrize("alert", [*MADE.alerts, *HEALTH], ids=lambda alert: alert.name)
def test_an_alert_says_how_grave_it_is_and_where_to_read_on(alert):
    written = alert.written()
    assert re.fullmatch(r"\d+[sm]", written["for"])
    assert written["labels"]["severity"] in {"info", "warning", "high", "critical"}
    url = f"{{{{ $externalURL }}}}/user/{RUNBOOK_PAGE.name}#{alert.anchor}"
    assert written["annotations"]["runbook_url"] == url


def test_links_lead_to_the_address_that_the_generator_is_given():
    made = files("https://wiki.example/runbook")
    texts = [made[path] for path in made if path.suffix == ".yaml"]
    links = [link for text in texts for link in re.findall(r"runbook_url: (\S+)", text)]
    assert len(links) == len([*MADE.alerts, *HEALTH])
    assert all(link.startswith("https://wiki.example/runbook#") for link in links)


def test_the_runbook_has_a_place_for_every_alert_and_every_rule():
    wanted = {alert.anchor for alert in HEALTH} | {rule.id for rule in DEFAULT.rules}
    headings = re.findall(r"^#+ (.*)$", (ROOT / RUNBOOK).read_text(), re.MULTILINE)
    assert wanted <= {*map(anchor, headings)}
    assert wanted <= {*re.findall(r'id="([^"]*)"', (ROOT / RUNBOOK_PAGE).read_text())}


HEAD = "version: t-1\nrules:\n- {id: a, severity: HIGH, action: PAUSE, text: t, "
LR, STEP = (prometheus_name(BY_KEY[key]) for key in ("optimizer_lr", "step_latency_ms"))
PAST = "(esper:tolaria_loss:median10m + 1 * abs(esper:tolaria_loss:median10m))"
ON = "on(esper_run_id, esper_rank, instance)"


@pytest.mark.parametrize(
    ("row", "expr"),
    [
        ("metric: loss, above: 2", "max_over_time(tolaria_loss[5m]) > 2"),
        ("metric: loss, at_least: 2", "max_over_time(tolaria_loss[5m]) >= 2"),
        ("metric: loss, below: 2", "min_over_time(tolaria_loss[5m]) < 2"),
        ("metric: loss, at_most: 2", "min_over_time(tolaria_loss[5m]) <= 2"),
        ("metric: loss, above: 2, for: 3", "quantile_over_time(0.5, tolaria_loss[1m]) > 2"),
        ("metric: optimizer_lr, at_most: 0", f"min_over_time({LR}[5m]) <= 0"),
        (
            "metric: loss, above_baseline: 2",
            f"max_over_time(tolaria_loss[5m]) > {ON} {PAST}",
        ),
        (
            "metric: loss, below_baseline: 2, baseline: highest",
            f"min_over_time(tolaria_loss[5m]) < {ON} "
            "(max_over_time(esper:tolaria_loss:median10m[1d])"
            " + 1 * abs(max_over_time(esper:tolaria_loss:median10m[1d])))",
        ),
        (
            "metric: kasmina.seed.alpha, above_baseline: 2, baseline_of: loss",
            f"max_over_time(kasmina_seed_alpha_ratio[5m]) > {ON} group_left () {PAST}",
        ),
        (
            "metric: gradient_norm, above_baseline: 10",
            f"max_over_time(tolaria_gradient_norm[5m]) > {ON} "
            "(10 * esper:tolaria_gradient_norm:median10m)",
        ),
        (
            "metric: loss, rises_by: 2",
            "max_over_time(tolaria_loss[5m]) - min_over_time(tolaria_loss[6m]) >= 2",
        ),
        (
            "metric: loss, unchanged_for: 200",
            "changes(tolaria_loss[1h]) == 0 and count_over_time(tolaria_loss[1h]) >= 200",
        ),
        (
            "metric: loss, risen_for: 11",
            f"quantile_over_time(0.5, tolaria_loss[1m]) > {ON} "
            "(esper:tolaria_loss:upper10m + 0.02 * abs(esper:tolaria_loss:upper10m))",
        ),
        (
            "metric: loss, fallen_for: 11",
            f"quantile_over_time(0.5, tolaria_loss[1m]) < {ON} "
            "(esper:tolaria_loss:lower10m - 0.02 * abs(esper:tolaria_loss:lower10m))",
        ),
        ("nonfinite: true", "max_over_time(tolaria_nonfinite[5m]) > 0"),
        (
            "any: [{metric: loss, above: 2}, {metric: accuracy, below: 1}]",
            f"(max_over_time(tolaria_loss[5m]) > 2)\n  or {ON} "
            "(min_over_time(tolaria_accuracy_ratio[5m]) < 1)",
        ),
        (
            "all: [{metric: loss, above: 2}, {metric: kasmina.seed.alpha, above: 0}]",
            "last_over_time(esper:a:at_once[5m])",
        ),
        (
            "for: 3, all: [{metric: loss, above: 2}, {metric: accuracy, below: 1}]",
            "quantile_over_time(0.5, tolaria_loss[1m])\n"
            f"  and {ON} (count_over_time(((tolaria_loss > 2)"
            f" and {ON} (tolaria_accuracy_ratio < 1))[1m:5s]) > 6)",
        ),
        (
            "all: [{metric: loss, above: 2}, {metric: loss, above_baseline: 2}]",
            f"(max_over_time(tolaria_loss[5m]) > 2)\n  and {ON} "
            f"(max_over_time(tolaria_loss[5m]) > {ON} {PAST})",
        ),
        (
            "all: [{metric: loss, rises_by: 2}, {metric: accuracy, below: 1}]",
            "(max_over_time(tolaria_loss[5m]) - min_over_time(tolaria_loss[6m]) >= 2)\n"
            f"  and {ON} (min_over_time(tolaria_accuracy_ratio[5m]) < 1)",
        ),
    ],
)
def test_a_condition_in_promql(row, expr):
    table = parse(TableSource("t.yaml", f"{HEAD}{row}}}\n".encode()))
    assert Translator(table.baseline).translate(table.rules[0]).text == expr


def test_parts_that_one_step_fulfils_are_compared_at_the_same_step():
    row = "all: [{metric: loss, above: 2}, {metric: kasmina.seed.alpha, above: 0}]"
    table = parse(TableSource("t.yaml", f"{HEAD}{row}}}\n".encode()))
    translator = Translator(table.baseline)
    translator.translate(table.rules[0])
    (recorded,) = translator.recordings.values()
    assert recorded.record == "esper:a:at_once"
    assert recorded.expr == (
        f"last_over_time(((kasmina_seed_alpha_ratio > 0) and {ON} (tolaria_loss > 2))[1m:1s])"
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("metric: loss, above: 2, downgrade: true", "proposed"),
        ("metric: loss, above_baseline: 2, baseline: frozen", "start of the run"),
        ("metric: loss, nonfinite: true", "not finite"),
        ("metric: loss, missing_for: 20", "absent"),
    ],
)
def test_what_promql_cannot_say_has_a_reason(row, reason):
    text = f"{HEAD}{row}}}\n".replace("PAUSE", "OPTIMIZER")
    table = parse(TableSource("t.yaml", text.encode()))
    with pytest.raises(UntranslatableError, match=reason):
        Translator(table.baseline).translate(table.rules[0])


def test_only_series_that_somebody_makes_are_asked_for():
    records = {one.record for one in (*MADE.recordings, JUDGED)}
    known = records | {prometheus_name(metric) for metric in (*BY_KEY.values(), RUN_ENDED)}
    recordings = (one.expr for one in (*MADE.recordings, JUDGED))
    for expr in [*(a.expr for a in MADE.alerts), *recordings]:
        used = set(re.findall(r"\b(?:tolaria|kasmina|esper:)[\w:]+", expr))
        assert used
        assert used <= known


def test_promtool_finds_nothing_wrong_with_the_rules(promtool):
    rules = sorted(map(str, (ROOT / RULES).glob("*.yaml")))
    done = subprocess.run([promtool, "check", "rules", *rules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("name", ["table", "health"])
def test_the_rules_alert_when_they_should(promtool, tmp_path, name):
    text = (HERE / f"{name}.test.yaml").read_text().replace("RULES", str(ROOT / RULES))
    path = tmp_path / "test.yaml"
    path.write_text(text)
    done = subprocess.run(
        [promtool, "test", "rules", path],
        env=os.environ | {"GOGC": "400"},  # it is collecting garbage a quarter of the time
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_files_of_rules_are_yaml_that_prometheus_names_groups_in():
    names = [
        group["name"]
        for path, text in files().items()
        if path.suffix == ".yaml"
        for group in yaml.safe_load(text)["groups"]
    ]
    assert sorted(names) == sorted({*names})
