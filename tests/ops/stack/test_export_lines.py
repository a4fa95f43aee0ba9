"""Exported lines of OTLP's JSON, sent to the real Collector, whose exporter they imitate."""

import json
import time
import urllib.request

from esper_otel.export import Format, export
from esper_otel.leyline.metrics import BY_KEY
from ops.generate.prometheus_names import prometheus_name
from report.made import BEGAN_NS, frames, recorded, spans
from testkit.patience import PATIENCE_S

SIGNALS = {"resourceMetrics": "metrics", "resourceSpans": "traces", "resourceLogs": "logs"}


def test_a_collector_takes_every_line_and_prometheus_has_the_steps(stack, wait_until, tmp_path):
    # A minute ago: what is much older than its newest sample Prometheus refuses.
    since_s = (time.time_ns() - BEGAN_NS) / 1e9 - 60.0
    made = frames(50, run="exported", at_s=since_s, loss=lambda step: 1.0 / (1 + step))
    recorded(tmp_path / "run.metrics.otlp", made, at_once=20)
    spans(tmp_path / "run.traces.otlp", "exported", 30)
    to = tmp_path / "run.jsonl"
    assert export([tmp_path], Format.OTLP_JSON, to).problems == []
    sent = []
    for line in to.read_bytes().splitlines():
        (signal,) = SIGNALS.keys() & json.loads(line).keys()
        sent.append(signal)
        request = urllib.request.Request(
            f"{stack.url}/v1/{SIGNALS[signal]}", line, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            assert json.load(answer) == {"partialSuccess": {}}
    assert (sent.count("resourceMetrics"), sent.count("resourceSpans")) == (3, 1)
    selector = f'{prometheus_name(BY_KEY["loss"])}{{esper_run_id="exported"}}'
    (series,) = wait_until(
        lambda: [one for one in stack.prometheus.series(selector) if len(one.samples) == 50]
    )
    assert [value for _, value in series.samples] == [1.0 / (1 + step) for step in range(50)]
