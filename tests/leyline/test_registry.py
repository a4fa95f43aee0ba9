"""The registry against the contract."""

from __future__ import annotations

import re

import pytest

from esper_otel.leyline.metrics import (
    BY_INSTRUMENT,
    BY_KEY,
    SEED_KEYS,
    SEED_METRICS,
    SEED_SLOT,
    STEP_KEYS,
    STEP_METRICS,
    STEP_SLOT,
    Metric,
)

# key, unit, gated: the contract, written out once more and on purpose. A change here is a
# change to what every dashboard and threshold table of a user relies on.
CONTRACT = [
    ("step", "{step}", False),
    ("loss", "{loss}", False),
    ("accuracy", "1", False),
    ("gradient_norm", "{grad}", False),
    ("samples_per_s", "{sample}/s", False),
    ("hook_latency_ms", "ms", False),
    ("tamiyo_latency_ms", "ms", False),
    ("lr_scale", "1", False),
    ("update_skipped", "{update}", False),
    ("restored", "{restore}", False),
    ("gradients_kept", "1", False),
    ("unjudged_steps", "{step}", False),
    ("phase", "{phase}", False),
    ("step_latency_ms", "ms", True),
    ("forward_ms", "ms", True),
    ("backward_ms", "ms", True),
    ("optimizer_ms", "ms", True),
    ("kasmina.apply_ms", "ms", True),
    ("kasmina.finalize_ms", "ms", True),
    ("loss_delta", "{loss}", True),
    ("loss_ewma", "{loss}", True),
    ("loss_volatility", "{loss}", True),
    ("grad_norm_ewma", "{grad}", True),
    ("grad_var", "{grad}2", True),
    ("grad_conflict_rate", "1", True),
    ("optimizer_lr", "1", True),
    ("optimizer_lr_base", "1", True),
    ("optimizer_momentum", "1", True),
    ("input_wait_ms", "ms", True),
    ("h2d_copy_ms", "ms", True),
    ("gpu_mem_used_gb", "GBy", True),
    ("gpu_mem_free_gb", "GBy", True),
    ("gpu_util_percent", "%", True),
    ("cpu_util_percent", "%", True),
    ("nonfinite", "{value}", False),
    ("custom_nonfinite", "{value}", False),
    ("kasmina.isolation.violations", "{violation}", False),
    ("kasmina.kernel_fetch_ms", "ms", False),
    ("kasmina.seeds_live", "{seed}", False),
]

SEED_CONTRACT = [
    ("kasmina.seed.stage", "{state}"),
    ("kasmina.seed.alpha", "1"),
    ("kasmina.seed.alpha_steps", "{step}"),
    ("kasmina.seed.kernel_attached", "{flag}"),
    ("kasmina.seed.last_kernel_latency_ms", "ms"),
    ("kasmina.seed.isolation_violations", "{violation}"),
    ("kasmina.seed.fallback_used", "{flag}"),
    ("kasmina.seed.isolation.dot", "{grad}2"),
    ("kasmina.seed.isolation.host_norm", "{grad}"),
    ("kasmina.seed.isolation.seed_norm", "{grad}"),
]


@pytest.mark.parametrize(("key", "unit", "gated"), CONTRACT)
def test_a_step_metric_of_the_contract(key: str, unit: str, gated: bool) -> None:
    metric = BY_KEY[key]
    assert (metric.unit, metric.gated, metric.scope) == (unit, gated, "step")


@pytest.mark.parametrize(("key", "unit"), SEED_CONTRACT)
def test_a_seed_metric_of_the_contract(key: str, unit: str) -> None:
    metric = BY_KEY[key]
    assert (metric.unit, metric.gated, metric.scope) == (unit, False, "seed")


def test_the_registry_has_nothing_beside_the_contract() -> None:
    assert set(STEP_KEYS) == {key for key, _, _ in CONTRACT}
    assert set(SEED_KEYS) == {key for key, _ in SEED_CONTRACT}


def test_keys_and_instruments_are_unique_and_point_to_each_other() -> None:
    everything = (*STEP_METRICS, *SEED_METRICS)
    assert len(BY_KEY) == len(BY_INSTRUMENT) == len(everything)
    for metric in everything:
        assert BY_KEY[metric.key] is BY_INSTRUMENT[metric.instrument] is metric


@pytest.mark.parametrize(
    ("key", "instrument"),
    [("loss", "tolaria.loss"), ("kasmina.apply_ms", "kasmina.apply_ms")],
)
def test_an_instrument_belongs_to_tolaria_unless_it_says_kasmina(
    key: str, instrument: str
) -> None:
    assert BY_KEY[key].instrument == instrument


@pytest.mark.parametrize("metric", BY_KEY.values(), ids=lambda metric: metric.key)
def test_a_metric_is_one_that_opentelemetry_takes(metric: Metric) -> None:
    # The API's rule for instrument names; a unit is ASCII, 63 characters at most.
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_.\-/]{0,254}", metric.instrument)
    assert metric.unit.isascii()
    assert 0 < len(metric.unit) <= 63
    assert metric.meaning
    assert metric.when


@pytest.mark.parametrize(
    ("slots", "keys"), [(STEP_SLOT, STEP_KEYS), (SEED_SLOT, SEED_KEYS)], ids=["step", "seed"]
)
def test_slots_are_positions(slots: dict[str, int], keys: tuple[str, ...]) -> None:
    assert [keys[slot] for slot in slots.values()] == list(slots)
