from math import inf, nan

import pytest

from esper_otel.kasmina.gates import (
    BEFORE,
    PASSED,
    Facts,
    GateFailed,
    Limits,
    clean_reset,
    gradient_health,
    interface,
    sanity,
    stability,
    system_impact,
    usefulness,
)
from esper_otel.leyline.decisions import SeedOperation

LIMITS = Limits(gradient_ratio=100, kernel_ms=5, loss_rise=0.1, loss_fall=0.2, step_rise=1)


@pytest.mark.parametrize(
    ("gate", "facts", "reason"),
    [
        (sanity, {"attached": True, "finite": True}, None),
        (sanity, {}, "not available"),
        (sanity, {"attached": True, "finite": True, "trouble": "it sleeps"}, "it sleeps"),
        (sanity, {"attached": True}, "not all finite"),
        (gradient_health, {"seed_norm": 1.0, "host_norm": 1.0}, None),
        (gradient_health, {"seed_norm": 1.0}, None),
        (gradient_health, {"seed_norm": 1.0, "host_norm": 0.0}, None),
        (gradient_health, {"host_norm": 1.0}, "not known"),
        (gradient_health, {"seed_norm": inf, "host_norm": 1.0}, "not finite"),
        (gradient_health, {"seed_norm": 0.0, "host_norm": 1.0}, "no gradient"),
        (gradient_health, {"seed_norm": 101.0, "host_norm": 1.0}, "explodes"),
        (gradient_health, {"seed_norm": 0.009, "host_norm": 1.0}, "vanishes"),
        (stability, {"kernel_ms": 5.0}, None),
        (stability, {"kernel_ms": 5.1}, "budget"),
        (stability, {"kernel_ms": nan}, "not been called"),
        (stability, {"kernel_ms": 1.0, "trouble": "returned NaN"}, "returned NaN"),
        (interface, {"fits": True}, None),
        (interface, {}, "does not fit"),
        (system_impact, {}, None),
        (system_impact, {"loss": 1.1, "loss_before": 1.0}, None),
        (system_impact, {"loss": 1.11, "loss_before": 1.0}, "loss rose"),
        (system_impact, {"loss": -0.95, "loss_before": -1.0}, None),
        (system_impact, {"loss": -0.8, "loss_before": -1.0}, "loss rose"),
        (system_impact, {"loss_before": 1.0}, "not known"),
        (system_impact, {"step_ms": 2.0, "step_ms_before": 1.0}, None),
        (system_impact, {"step_ms": 2.1, "step_ms_before": 1.0}, "too long"),
        (system_impact, {"step_ms": 2.1}, None),
        (usefulness, {"loss": 0.8, "loss_before": 1.0}, None),
        (usefulness, {"loss": 0.81, "loss_before": 1.0}, "does not help"),
        (usefulness, {"loss": 0.8}, "not known"),
        (usefulness, {"loss": 2.0, "loss_before": 1.0}, "loss rose"),
        (clean_reset, {}, None),
        (clean_reset, {"remnants": 1}, "still referenced"),
    ],
)
def test_a_gate_is_a_function_of_facts_and_limits(gate, facts, reason):
    verdict = gate(Facts(**facts), LIMITS)
    if reason is None:
        assert verdict is PASSED
    else:
        assert isinstance(verdict, GateFailed)
        assert reason in str(verdict)


def test_a_reason_stays_the_same_while_its_numbers_change():
    verdicts = [gradient_health(Facts(seed_norm=n, host_norm=1.0), LIMITS) for n in (200, 300)]
    assert verdicts[0].reason == verdicts[1].reason
    assert verdicts[0].detail != verdicts[1].detail


def test_gates_stand_before_every_step_onward():
    assert set(BEFORE) == set(SeedOperation) - {SeedOperation.GERMINATE, SeedOperation.CULL}
