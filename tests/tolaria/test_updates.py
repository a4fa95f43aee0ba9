"""The rate and the gradients of one update are changed, and all of it is taken back."""

import gc
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from tolaria.probed import change, rates, sgd

from esper_otel.tolaria.updates import UpdateOrder, Updates

pytestmark = pytest.mark.usefixtures("closing_updates")


def test_numbers_are_exchanged_and_put_back_as_the_very_objects():
    optimizer, subject = sgd(0.3, 0.7), Updates()
    own = rates(optimizer)
    assert change(subject, optimizer, 0.25)
    assert rates(optimizer) == [0.3 * 0.25, 0.7 * 0.25]
    subject.put_back(optimizer)
    assert all(now is before for now, before in zip(rates(optimizer), own, strict=True))


def test_a_factor_of_one_touches_nothing():
    optimizer, subject = sgd(0.3), Updates()
    own = optimizer.param_groups[0]["lr"]
    assert not change(subject, optimizer, 1.0)
    assert optimizer.param_groups[0]["lr"] is own


def test_the_scale_of_one_update_comes_on_top():
    optimizer, subject = sgd(1.0), Updates()
    change(subject, optimizer, 0.5, UpdateOrder(lr_scale=0.5))
    assert rates(optimizer) == [0.25]


def test_a_tensor_is_scaled_in_place_and_once_however_many_groups_share_it():
    shared = torch.tensor(0.3)
    optimizer, subject = sgd(shared, shared), Updates()
    bits = shared.clone()
    change(subject, optimizer, 0.1)
    assert rates(optimizer)[0] is shared
    assert float(shared) == pytest.approx(0.03)
    subject.put_back(optimizer)
    assert torch.equal(shared, bits), "to the last bit: 0.3 * 0.1 / 0.1 would not be"


def test_a_tensor_on_a_device_is_not_read():
    optimizer, subject = sgd(0.1), Updates()
    rate = torch.tensor(0.5, device="meta")  # reading it would raise
    optimizer.param_groups[0]["lr"] = rate
    assert change(subject, optimizer, 0.5)
    subject.put_back(optimizer)
    assert optimizer.param_groups[0]["lr"] is rate


def test_a_rate_that_is_being_learnt_is_exchanged_within_the_scripts_own_graph():
    rate = torch.tensor(0.5, requires_grad=True)
    optimizer, subject = sgd(0.1), Updates()
    optimizer.param_groups[0]["lr"] = rate
    change(subject, optimizer, 0.5)
    used = optimizer.param_groups[0]["lr"]
    subject.put_back(optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    used.backward()
    assert float(rate.grad) == 0.5


@pytest.mark.parametrize("rate", [None, True, "fast", torch.tensor(1)])
def test_what_is_no_rate_is_left_alone(rate):
    optimizer, subject = sgd(0.1), Updates()
    optimizer.param_groups[0]["lr"] = rate
    assert not change(subject, optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    subject.put_back(optimizer)


def test_one_rate_per_element_is_scaled():
    rate = torch.tensor([0.1, 0.2])
    optimizer, subject = sgd(0.1), Updates()
    optimizer.param_groups[0]["lr"] = rate
    assert change(subject, optimizer, 0.5)
    assert torch.allclose(rate, torch.tensor([0.05, 0.1]))
    subject.put_back(optimizer)
    assert rate.tolist() == torch.tensor([0.1, 0.2]).tolist()


def test_groups_that_a_wrapper_shares_with_its_base_are_scaled_once():
    base, subject = sgd(1.0), Updates()
    wrapper = sgd(1.0)
    wrapper.param_groups = base.param_groups
    change(subject, wrapper, 0.5)
    change(subject, base, 0.5)
    assert rates(base) == [0.5]
    subject.put_back(base)
    assert rates(base) == [0.5], "the wrapper still is within its step"
    subject.put_back(wrapper)
    assert rates(base) == [1.0]


def test_a_rate_that_the_step_itself_sets_is_taken_to_be_scaled():
    optimizer, subject = sgd(1.0, torch.tensor(1.0)), Updates()
    change(subject, optimizer, 0.5)
    first, second = optimizer.param_groups
    first["lr"] *= 0.9  # as hypergradient methods do
    second["lr"].mul_(0.9)
    subject.put_back(optimizer)
    assert rates(optimizer) == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, Fraction])
def test_any_real_number_is_a_rate(kind):
    optimizer, subject = sgd(0.1), Updates()
    optimizer.param_groups[0]["lr"] = own = kind(0.5)
    assert change(subject, optimizer, 0.25)
    assert float(rates(optimizer)[0]) == 0.125
    subject.put_back(optimizer)
    assert rates(optimizer)[0] is own


def test_gradients_beyond_the_largest_norm_are_scaled_down_to_it():
    optimizer, subject = sgd(0.1), Updates()
    (parameter,) = optimizer.param_groups[0]["params"]
    norm = float(parameter.grad.norm())
    change(subject, optimizer, 1.0, UpdateOrder(max_norm=2 * norm))
    assert float(parameter.grad.norm()) == pytest.approx(norm), "it is within"
    subject.put_back(optimizer)
    change(subject, optimizer, 1.0, UpdateOrder(max_norm=norm / 4))
    assert float(parameter.grad.norm()) == pytest.approx(norm / 4)


def test_no_optimizer_is_kept_alive():
    subject = Updates()
    optimizer = sgd(0.1)
    change(subject, optimizer, 0.5)
    subject.put_back(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
