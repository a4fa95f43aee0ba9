"""What an optimizer's groups say of rate and momentum."""

import math

import pytest

from esper_otel.leyline.frames import present, step_row
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.tolaria.rates import BaseRate, put_optimizer


@pytest.mark.parametrize(
    ("groups", "factor", "told"),
    [
        ([{"lr": 0.1, "momentum": 0.9}], 1.0, {"optimizer_lr": 0.1, "optimizer_momentum": 0.9}),
        ([{"lr": 0.2}], 0.5, {"optimizer_lr": 0.1}),
        ([{"lr": 0.1}, {"lr": 0.3}], 0.5, {"optimizer_lr": 0.1}),
        ([{"lr": 1}], 1.0, {"optimizer_lr": 1.0}),
        (
            [{"lr": 0.1, "betas": (0.9, 0.999)}, {"lr": 0.3, "betas": (0.7, 0.999)}],
            1.0,
            {"optimizer_lr": 0.2, "optimizer_momentum": 0.8},
        ),
        ([{"lr": 0.1}, {"lr": None}], 1.0, {}),
        ([{"lr": 0.1}, {}], 1.0, {}),
        (
            [{"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": 0.1, "betas": None}],
            1.0,
            {"optimizer_lr": 0.1, "optimizer_momentum": 0.9},
        ),
        ([{"lr": 0.1, "betas": [0.8]}], 1.0, {"optimizer_lr": 0.1, "optimizer_momentum": 0.8}),
        ([{"lr": 0.1, "betas": ()}], 1.0, {"optimizer_lr": 0.1}),
        ([{"lr": 0.1, "betas": 0.9}], 1.0, {"optimizer_lr": 0.1}),
        ([{"lr": math.inf}], 1.0, {"nonfinite": 1.0}),
        (
            [{"lr": math.nan, "momentum": 0.9}],
            1.0,
            {"nonfinite": 1.0, "optimizer_momentum": 0.9},
        ),
        ([], 1.0, {}),
    ],
)
def test_rate_and_momentum_of_groups_as_far_as_they_are_numbers(groups, factor, told):
    row = step_row()
    row[STEP_SLOT["nonfinite"]] = 0.0
    put_optimizer(row, groups, factor, BaseRate())
    row[STEP_SLOT["optimizer_lr_base"]] = math.nan
    assert present(STEP_KEYS, row) == pytest.approx({"nonfinite": 0.0, **told})


@pytest.mark.parametrize(
    ("groups", "base"),
    [
        ([{"lr": 0.001, "initial_lr": 0.1}], 0.1),
        ([{"lr": 0.001, "initial_lr": 0.1}, {"lr": 0.1, "initial_lr": 0.3}], 0.2),
        ([{"lr": 0.001, "initial_lr": 0.1}, {"lr": 0.1}], 0.0505),
        ([{"lr": 0.001}], 0.001),
        ([{"lr": math.inf}], None),
        ([{"lr": "auto"}], None),
    ],
)
def test_the_base_rate_is_that_of_a_schedule_else_the_first(groups, base):
    row = step_row()
    row[STEP_SLOT["nonfinite"]] = 0.0
    put_optimizer(row, groups, 1.0, BaseRate())
    found = present(STEP_KEYS, row).get("optimizer_lr_base")
    assert found == (None if base is None else pytest.approx(base))


def test_the_first_rate_stays_the_base_when_the_script_sets_another():
    base, groups = BaseRate(), [{"lr": 0.1}]
    assert base.of(groups) == 0.1
    groups[0]["lr"] = 3.0
    assert base.of(groups) == 0.1
