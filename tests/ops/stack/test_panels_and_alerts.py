"""Every query of a dashboard and every alert, asked of the real Prometheus."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from http import HTTPStatus

import pytest

from esper_otel.leyline.metrics import BY_KEY, RUN_ENDED
from esper_tamiyo.journaling.own_metrics import OWN_METRICS
from esper_tamiyo.language.table_file import load
from ops.generate.alerts import health
from ops.generate.alerts.from_table import translated
from ops.generate.alerts.promql import JUDGED
from ops.generate.dashboards import answers
from ops.generate.dashboards.json_files import FOLDER
from ops.generate.dashboards.sample_run import RANKS, REPORT_S, RUN, TAMIYO, send_sample_run
from ops.generate.files import ROOT
from ops.generate.prometheus_names import prometheus_name, series_name
from ops.stack.queries import QueryError
from ops.stack.services import clean_environment
from testkit.patience import PATIENCE_S

STEPS, STEP_S = 600, 1.0
QUERIES = [
    pytest.param(query, id=f"{path.stem}: {query.panel}: {number}")
    for path in sorted((ROOT / FOLDER).glob("*.json"))
    for number, query in enumerate(answers.queries(json.loads(path.read_text())))
]
(SLOW,) = (query.values[0] for query in QUERIES if query.values[0].panel == "Slow steps")
SLOW_STEP = 14
LOOP = f"""
import time
import esper_otel
run = esper_otel.start(span_every=0)
for step in range(1, 21):
    with run.phase("forward"):
        time.sleep(0.2 if step == {SLOW_STEP} else 0.005)
    run.step()
report = run.close(20.0)
assert report.traces.delivered == report.traces.produced > 0, report
"""
MADE = translated(load("default"))
EXPRESSIONS = {
    # Prometheus records who is judged as time goes by, and these steps are of before.
    **{
        alert.name: alert.expr.replace(JUDGED.record, f"({JUDGED.expr})")
        for alert in MADE.alerts
    },
    **{
        alert.name: alert.expr
        for alert in (*health.runs(), *health.tamiyo(), *health.collector())
    },
    **{one.record: one.expr for one in (*MADE.recordings, JUDGED)},
}


@pytest.fixture(scope="session")
def sample_run(stack, wait_until, tmp_path_factory):
    """When the made-up run ended that Prometheus now has."""
    begin_s = float(int(time.time()) - STEPS - 20)
    send_sample_run(stack.url, tmp_path_factory.mktemp("sample_run"), begin_s, STEPS, STEP_S)
    url = f"http://127.0.0.1:{stack.ports.prometheus}"
    end_s = begin_s + STEPS * STEP_S

    def arrived():
        steps = f'count_over_time(tolaria_step{{esper_run_id="{RUN}"}}[1h])'
        reports = f'count_over_time(tamiyo_uptime_seconds{{instance="{TAMIYO}"}}[1h])'
        ranks = [one.values for one in answers.at(url, steps, end_s)]
        told = [one.values for one in answers.at(url, reports, end_s)]
        return ranks == [[STEPS]] * RANKS and told == [[STEPS * STEP_S / REPORT_S]]

    wait_until(arrived)
    return url, begin_s, end_s


@pytest.mark.parametrize("query", QUERIES)
def test_a_panel_has_something_to_show(sample_run, query):
    url, begin_s, end_s = sample_run
    values = {"run": RUN, "rank": ".*", "seed": ".*", "jaeger": ""}
    spans = {"__interval": "5s", "__rate_interval": "60s", "__range": f"{STEPS}s"}
    expr = answers.chosen(query.expr, values | spans)
    if query.is_instant:
        found = answers.at(url, expr, end_s)
    else:
        found = answers.over(url, expr, begin_s, end_s, 5.0)
    # Alerts are what Prometheus makes itself, within minutes, of what goes wrong.
    assert found or "ALERTS" in expr


FOUND = {"EsperNonfiniteLoss", "EsperIsolationViolations", "TamiyoDecided"}
"""What is wrong in the sample run and needs no baseline, which takes minutes to record."""


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_alert_can_be_asked_for_and_is_empty_or_true(sample_run, name):
    url, begin_s, end_s = sample_run
    found = answers.over(url, EXPRESSIONS[name], begin_s, end_s, 15.0)
    assert found or name not in FOUND


def test_prometheus_scrapes_what_the_alerts_about_the_collector_look_at(stack, wait_until):
    exprs = {alert.name: alert.expr for alert in health.collector()}
    well = exprs["CollectorDown"].replace("== 0", "== 1")
    filled = exprs["CollectorQueueFills"].replace("> 0.5", ">= 0")
    assert {well, filled}.isdisjoint(exprs.values())
    wait_until(lambda: stack.prometheus.ask("query", query=well))
    queues = wait_until(lambda: stack.prometheus.ask("query", query=filled))
    exporters = {one["metric"]["exporter"] for one in queues}
    assert exporters == {"otlp_grpc/jaeger", "otlp_grpc/prometheus"}


def test_what_prometheus_refuses_for_good_is_told_as_lost_and_not_as_refused_to_trainers(
    stack, rank, wait_until
):
    exprs = {alert.name: alert.expr for alert in health.collector()}
    now_ns = time.time_ns()
    one = rank(metrics=1)
    one.step(0, now_ns)
    wait_until(lambda: stack.prometheus.series(f'tolaria_step{{esper_run_id="{one.run}"}}'))
    one.step(1, now_ns)
    assert one.close(20.0).metrics.delivered == 2
    lost = wait_until(lambda: stack.prometheus.ask("query", query=exprs["CollectorLoses"]))
    assert [told["metric"]["exporter"] for told in lost] == ["otlp_grpc/prometheus"]
    refused = 'otelcol_receiver_refused_metric_points{receiver="otlp/handover"} > 0'
    assert stack.prometheus.ask("query", query=refused)
    assert not stack.prometheus.ask("query", query=exprs["CollectorRefuses"])


def test_a_wrong_query_is_told_in_the_words_of_prometheus(sample_run):
    with pytest.raises(QueryError, match="parse error"):
        answers.at(sample_run[0], "sum by (", sample_run[2])


def test_a_slow_step_is_found_in_jaeger_as_the_link_asks(stack, sample_run, wait_until):
    url, begin_s, end_s = sample_run
    expr = answers.chosen(SLOW.expr, {"run": RUN, "rank": ".*", "__interval": "5s"})
    slowest = max(v for one in answers.over(url, expr, begin_s, end_s, 5.0) for v in one.values)
    asked = {
        "service": "esper-trainer",
        "start": f"{begin_s:.0f}000000",
        "end": f"{end_s:.0f}000000",
        "limit": "20",
        "minDuration": f"{slowest!r}ms",
        "tags": json.dumps({"esper.run_id": RUN}),
    }
    search = f"http://127.0.0.1:{stack.ports.jaeger}/api/traces?{urllib.parse.urlencode(asked)}"

    def found():
        with urllib.request.urlopen(search) as answer:
            return json.load(answer)["data"]

    (trace,) = wait_until(found)
    (step,) = (span for span in trace["spans"] if span["operationName"] == "train.step")
    assert step["duration"] == pytest.approx(slowest * 1000, abs=1)


def test_a_trainer_traces_the_step_that_the_panel_shows_as_slow(stack, wait_until, tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": stack.url,
        "OTEL_SERVICE_NAME": "slow",
        "ESPER_TAMIYO_SOCKET": str(tmp_path / "nobody.sock"),
        "ESPER_RUN_ID": "slow",
    }
    subprocess.run(
        [sys.executable, str(script)],
        env=clean_environment(environment),
        check=True,
        timeout=PATIENCE_S,
    )
    expr = answers.chosen(SLOW.expr, {"run": "slow", "rank": ".*", "__interval": "5m"})

    def traced():
        """Steps to the milliseconds of their spans."""
        spans = [span for trace in stack.jaeger.traces("slow") for span in trace["spans"]]
        steps = [span for span in spans if span["operationName"] == "train.step"]
        return {
            tag["value"]: span["duration"] / 1000
            for span in steps
            for tag in span["tags"]
            if tag["key"] == "esper.step"
        }

    found = wait_until(lambda: SLOW_STEP in (steps := traced()) and steps)

    def shown():
        """Whether the panel has that step: the first of a run's samples come before it."""
        slowest = [float(one["value"][1]) for one in stack.prometheus.ask("query", query=expr)]
        # A step's latency begins with the end of the step before, its span behind the hook.
        return slowest == [pytest.approx(found[SLOW_STEP], rel=0.1)]

    assert wait_until(shown)
    assert len(found) < 20


class Links(HTMLParser):
    """The scripts and styles that a page asks for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        if tag in ("script", "link"):
            self.found += [told[key] for key in ("src", "href") if told.get(key)]


def test_prometheus_has_its_page_with_all_that_the_page_asks_for(stack):
    url = f"http://127.0.0.1:{stack.ports.prometheus}"
    links = Links()
    try:
        with urllib.request.urlopen(f"{url}/graph") as answer:
            links.feed(answer.read().decode())
            base = answer.url
    except urllib.error.HTTPError as error:  # where it was had before Go was
        if error.code != HTTPStatus.NOT_FOUND:
            raise
        pytest.skip("this Prometheus is Debian's, whose package has no page")
    assert links.found
    for link in links.found:
        with urllib.request.urlopen(urllib.parse.urljoin(base, link)) as answer:
            assert answer.status == 200


def test_prometheus_says_what_every_metric_means_and_where_its_alerts_lead(stack, wait_until):
    url = f"http://127.0.0.1:{stack.ports.prometheus}"

    def told():
        with urllib.request.urlopen(f"{url}/api/v1/metadata") as answer:
            found = json.load(answer)["data"]
        return found if "tolaria_loss" in found else None

    # It scrapes its help once a minute.
    found = wait_until(told)
    metrics = (*BY_KEY.values(), RUN_ENDED)
    for metric in metrics:
        (one,) = found[prometheus_name(metric)]
        assert one["type"] == "gauge"
        assert metric.meaning in one["help"]
    for own in OWN_METRICS:
        (one,) = found[series_name(own.name, own.unit, own.kind.value)]
        assert one["type"] == own.kind.value
    with urllib.request.urlopen(f"{url}/user/runbook.html") as answer:
        assert b'id="loss_spike"' in answer.read()
