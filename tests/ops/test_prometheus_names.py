"""What metrics and attributes are called in Prometheus."""

from __future__ import annotations

import re

import pytest

from esper_otel.leyline.metrics import BY_KEY, Metric
from ops.generate.prometheus_names import label_name, prometheus_name, series_name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("loss", "tolaria_loss"),
        ("hook_latency_ms", "tolaria_hook_latency_ms_milliseconds"),
        ("kasmina.apply_ms", "kasmina_apply_ms_milliseconds"),
        ("accuracy", "tolaria_accuracy_ratio"),
        ("gpu_mem_used_gb", "tolaria_gpu_mem_used_gb_gigabytes"),
        ("gpu_util_percent", "tolaria_gpu_util_percent"),  # the word is there already
        ("samples_per_s", "tolaria_samples_per_s_per_second"),
        ("grad_var", "tolaria_grad_var"),  # {grad}2: braces are no unit
        ("kasmina.isolation.violations", "kasmina_isolation_violations"),
        ("kasmina.seed.alpha", "kasmina_seed_alpha_ratio"),
    ],
)
def test_prometheus_name(key: str, name: str) -> None:
    assert prometheus_name(BY_KEY[key]) == name


def test_a_ratio_in_the_middle_of_a_name_moves_to_its_end() -> None:
    assert prometheus_name(Metric("hit_ratio_now", "1", "")) == "tolaria_hit_now_ratio"


def test_no_two_metrics_meet_in_prometheus() -> None:
    names = [prometheus_name(metric) for metric in BY_KEY.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)


@pytest.mark.parametrize(
    ("instrument", "unit", "kind", "name"),
    [
        ("tolaria.loss", "{loss}", "gauge", "tolaria_loss"),
        ("tolaria.step_latency_ms", "ms", "gauge", "tolaria_step_latency_ms_milliseconds"),
        ("tolaria.accuracy", "1", "gauge", "tolaria_accuracy_ratio"),
        ("tolaria.cpu_util_percent", "%", "gauge", "tolaria_cpu_util_percent"),
        ("tolaria.samples_per_s", "{sample}/s", "gauge", "tolaria_samples_per_s_per_second"),
        ("tamiyo.decisions", "{decision}", "counter", "tamiyo_decisions_total"),
        ("tamiyo.ingest.lag", "ms", "histogram", "tamiyo_ingest_lag_milliseconds"),
        ("tamiyo.uptime", "s", "gauge", "tamiyo_uptime_seconds"),
    ],
)
def test_names_in_prometheus(instrument, unit, kind, name):
    assert series_name(instrument, unit, kind) == name


def test_an_attribute_becomes_a_label():
    assert label_name("esper.run_id") == "esper_run_id"


def test_a_unit_that_nobody_translated_is_refused():
    with pytest.raises(KeyError, match="furlong"):
        series_name("a.b", "furlong")
