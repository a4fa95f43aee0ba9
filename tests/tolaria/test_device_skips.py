"""A fused optimizer on the CPU reads ``found_inf`` as one on a GPU does."""

import pytest
import torch

from esper_otel.tolaria.updates import release, withhold_unless_finite

FUSED = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def made(kind, gradient, **options):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), gradient)
    return FUSED[kind]([parameter], lr=0.1, **options), parameter


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize(
    ("gradient", "skipped"), [(float("nan"), 1.0), (float("inf"), 1.0), (0.5, 0.0)]
)
def test_an_update_that_is_not_finite_is_left_out_and_any_other_made(kind, gradient, skipped):
    optimizer, parameter = made(kind, gradient, fused=True)
    found = withhold_unless_finite(optimizer, parameter.grad.norm())
    optimizer.step()
    release(optimizer, found)
    assert float(found) == skipped
    assert torch.equal(parameter, torch.ones(3)) is bool(skipped)
    assert bool(torch.isfinite(parameter).all())
    assert not hasattr(optimizer, "found_inf")


def test_the_next_update_is_made_again():
    optimizer, parameter = made("adam", float("nan"), fused=True)
    found = withhold_unless_finite(optimizer, parameter.grad.norm())
    optimizer.step()
    release(optimizer, found)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(3))


def test_an_optimizer_that_is_not_fused_cannot_be_told():
    optimizer, parameter = made("adam", float("nan"))
    assert withhold_unless_finite(optimizer, parameter.grad.norm()) is None
    assert not hasattr(optimizer, "found_inf")


def test_what_a_grad_scaler_tells_is_left_alone():
    optimizer, parameter = made("adam", float("nan"), fused=True)
    optimizer.found_inf = told = torch.zeros(())
    assert withhold_unless_finite(optimizer, parameter.grad.norm()) is None
    release(optimizer, None)
    assert optimizer.found_inf is told
