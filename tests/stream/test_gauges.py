"""Observable gauges: a reader of the user's sees the latest frame, and only that."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from esper_otel.leyline.metrics import BY_INSTRUMENT
from esper_otel.stream import gauges
from esper_otel.stream.ring import FrameRing
from testkit.patience import PATIENCE_S

SCRIPT = """
import json
from math import nan
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from esper_otel.leyline.frames import seed_row, step_row
from esper_otel.settings import EsperSettings
from esper_otel.stream import Stream

def stream():
    made = Stream(EsperSettings(), run_id="run", instance_id="i")
    made.start()
    return made

def collected():
    data = reader.get_metrics_data()
    return {} if data is None else {
        metric.name: [metric.unit] + [
            [point.attributes.get("seed_id"), point.value] for point in metric.data.data_points
        ]
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }

def row(step, loss):
    values = step_row()
    values[:2] = [step, loss]
    return values

def seed(seed_id, alpha):
    values = seed_row()
    values[:2] = [3.0, alpha]
    return seed_id, values

first = stream()
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
seen = [collected()]
first.frame(1, row(1.0, 0.5), [seed("a", 0.1), seed("b", 0.2)])
seen.append(collected())
first.frame(2, row(2.0, nan), [seed("b", 0.3)])
seen.append(collected())
first.close()
seen.append(collected())
second = stream()
second.frame(1, row(9.0, nan))
seen.append(collected())
second.close()
print(json.dumps(seen))
"""


def test_a_reader_sees_the_latest_frame():
    """In a process of its own: a global provider can be set only once."""
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "OTEL_METRICS_EXPORTER": "none", "OTEL_TRACES_EXPORTER": "none"},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    before, both, one, closed, again = json.loads(finished.stdout)
    assert before == {}
    assert both == {
        "tolaria.step": ["{step}", [None, 1.0]],
        "tolaria.loss": ["{loss}", [None, 0.5]],
        "kasmina.seed.stage": ["{state}", ["a", 3.0], ["b", 3.0]],
        "kasmina.seed.alpha": ["1", ["a", 0.1], ["b", 0.2]],
    }
    assert one == {
        "tolaria.step": ["{step}", [None, 2.0]],
        "kasmina.seed.stage": ["{state}", ["b", 3.0]],
        "kasmina.seed.alpha": ["1", ["b", 0.3]],
    }
    assert closed == {}
    assert again == {"tolaria.step": ["{step}", [None, 9.0]]}
    assert all(BY_INSTRUMENT[name].unit == points[0] for name, points in both.items())


def test_a_fault_while_reading_is_kept_from_the_reader(monkeypatch):
    ring = FrameRing(4)
    monkeypatch.setattr(FrameRing, "latest", lambda self: 1 / 0)
    monkeypatch.setattr(gauges._shown, "ring", ring)
    assert gauges._never_raising(gauges._step_observations, 0) == []
