"""What is done to one update, and that all of it is taken back."""

import gc
import weakref

import pytest
import torch

from esper_otel.tolaria.updates import UpdateOrder, Updates


def sgd(*rates, **options):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    made = torch.optim.SGD(groups, lr=0.1, **options)
    for group in made.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones(2)
    return made


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_numbers_are_exchanged_and_put_back_as_the_very_objects():
    optimizer, subject = sgd(0.3, 0.7), Updates()
    own = rates(optimizer)
    assert subject.begin(optimizer, 0.25)
    assert rates(optimizer) == [0.3 * 0.25, 0.7 * 0.25]
    subject.end(optimizer)
    assert all(now is before for now, before in zip(rates(optimizer), own, strict=True))


def test_a_factor_of_one_touches_nothing():
    optimizer, subject = sgd(0.3), Updates()
    own = optimizer.param_groups[0]["lr"]
    assert not subject.begin(optimizer, 1.0)
    assert optimizer.param_groups[0]["lr"] is own


def test_the_scale_of_one_update_comes_on_top():
    optimizer, subject = sgd(1.0), Updates()
    subject.begin(optimizer, 0.5, UpdateOrder(lr_scale=0.5))
    assert rates(optimizer) == [0.25]


def test_a_tensor_is_scaled_in_place_and_once_however_many_groups_share_it():
    shared = torch.tensor(0.3)
    optimizer, subject = sgd(shared, shared), Updates()
    bits = shared.clone()
    subject.begin(optimizer, 0.1)
    assert rates(optimizer)[0] is shared
    assert float(shared) == pytest.approx(0.03)
    subject.end(optimizer)
    assert torch.equal(shared, bits), "to the last bit: 0.3 * 0.1 / 0.1 would not be"


def test_a_tensor_on_a_device_is_not_read():
    optimizer, subject = sgd(0.1), Updates()
    rate = torch.tensor(0.5, device="meta")  # reading it would raise
    optimizer.param_groups[0]["lr"] = rate
    assert subject.begin(optimizer, 0.5)
    subject.end(optimizer)
    assert optimizer.param_groups[0]["lr"] is rate


def test_a_rate_that_is_being_learnt_is_exchanged_within_the_scripts_own_graph():
    rate = torch.tensor(0.5, requires_grad=True)
    optimizer, subject = sgd(0.1), Updates()
    optimizer.param_groups[0]["lr"] = rate
    subject.begin(optimizer, 0.5)
    used = optimizer.param_groups[0]["lr"]
    subject.end(optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    used.backward()
    assert float(rate.grad) == 0.5


@pytest.mark.parametrize("rate", [None, True, "fast"])
def test_what_is_no_rate_is_left_alone(rate):
    optimizer, subject = sgd(0.1), Updates()
    optimizer.param_groups[0]["lr"] = rate
    assert not subject.begin(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    subject.end(optimizer)


def test_one_rate_per_element_is_scaled():
    rate = torch.tensor([0.1, 0.2])
    optimizer, subject = sgd(0.1), Updates()
    optimizer.param_groups[0]["lr"] = rate
    assert subject.begin(optimizer, 0.5)
    assert torch.allclose(rate, torch.tensor([0.05, 0.1]))
    subject.end(optimizer)
    assert rate.tolist() == torch.tensor([0.1, 0.2]).tolist()


def test_groups_that_a_wrapper_shares_with_its_base_are_scaled_once():
    base, subject = sgd(1.0), Updates()
    wrapper = sgd(1.0)
    wrapper.param_groups = base.param_groups
    subject.begin(wrapper, 0.5)
    subject.begin(base, 0.5)
    assert rates(base) == [0.5]
    subject.end(base)
    assert rates(base) == [0.5], "the wrapper still is within its step"
    subject.end(wrapper)
    assert rates(base) == [1.0]


def test_a_rate_that_the_script_sets_within_the_step_stays():
    optimizer, subject = sgd(1.0), Updates()
    subject.begin(optimizer, 0.5)
    optimizer.param_groups[0]["lr"] = 0.9
    subject.end(optimizer)
    assert rates(optimizer) == [0.9]


def test_a_skipped_update_changes_no_parameter_and_leaves_every_gradient():
    optimizer, subject = sgd(0.1, 0.2, momentum=0.9), Updates()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [(p.detach().clone(), p.grad) for p in parameters]
    subject.begin(optimizer, 1.0, UpdateOrder(skip=True))
    optimizer.step()
    subject.end(optimizer)
    for parameter, (value, gradient) in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is gradient
    assert not optimizer.state


def test_gradients_beyond_the_largest_norm_are_scaled_down_to_it():
    optimizer, subject = sgd(0.1), Updates()
    (parameter,) = optimizer.param_groups[0]["params"]
    norm = float(parameter.grad.norm())
    subject.begin(optimizer, 1.0, UpdateOrder(max_norm=2 * norm), norm)
    assert float(parameter.grad.norm()) == pytest.approx(norm), "it is within"
    subject.end(optimizer)
    subject.begin(optimizer, 1.0, UpdateOrder(max_norm=norm / 4), norm)
    assert float(parameter.grad.norm()) == pytest.approx(norm / 4)


class Failing(torch.optim.SGD):
    error: BaseException | None = None

    def step(self, closure=None):
        self.used = rates(self)
        if self.error is not None:
            raise self.error
        return super().step(closure)


@pytest.fixture
def failing():
    made = Failing([torch.nn.Parameter(torch.ones(2))], lr=0.3)
    made.param_groups[0]["params"][0].grad = torch.ones(2)
    return made


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)])
def test_a_step_that_raises_leaves_the_scripts_rate_and_gradients_behind(failing, error):
    subject = Updates()
    subject.guard(failing)
    (parameter,) = failing.param_groups[0]["params"]
    gradient = parameter.grad
    handle = failing.register_step_pre_hook(lambda o, a, k: subject.begin(o, 0.5) and None)
    failing.error = error
    with pytest.raises(type(error)) as raised:
        failing.step()
    assert raised.value is error
    assert (failing.used, rates(failing)) == ([0.15], [0.3])
    assert parameter.grad is gradient
    handle.remove()
    subject.close()


def test_a_step_that_a_scheduler_has_wrapped_is_guarded_as_well(failing):
    scheduler = torch.optim.lr_scheduler.StepLR(failing, 1)
    assert "step" in vars(failing), "as torch does it"
    subject = Updates()
    subject.guard(failing)
    failing.register_step_pre_hook(lambda o, a, k: subject.begin(o, 0.5) and None)
    failing.error = RuntimeError()
    with pytest.raises(RuntimeError):
        failing.step()
    assert rates(failing) == [0.3]
    failing.error = None
    failing.step()
    subject.end(failing)
    scheduler.step()  # it would warn, had it not seen the step
    subject.close()


def test_a_scheduler_can_be_made_after_the_guard(failing):
    subject = Updates()
    subject.guard(failing)
    torch.optim.lr_scheduler.StepLR(failing, 1)
    failing.register_step_pre_hook(lambda o, a, k: subject.begin(o, 0.5) and None)
    failing.error = RuntimeError()
    with pytest.raises(RuntimeError):
        failing.step()
    assert rates(failing) == [0.3]
    subject.close()


def test_closing_puts_the_classes_back(failing):
    step = Failing.step
    scheduler = torch.optim.lr_scheduler.StepLR(failing, 1)
    own = vars(failing)["step"]
    subject = Updates()
    subject.guard(failing)
    assert Failing.step is not step
    subject.close()
    assert Failing.step is step
    assert vars(failing)["step"] is own
    del scheduler


def test_of_two_runs_each_takes_back_what_it_did(failing):
    step = Failing.step
    one, two = Updates(), Updates()
    other = sgd(1.0)
    one.guard(other)
    two.guard(failing)
    one.guard(failing)
    one.close()
    two.begin(failing, 0.5)
    failing.error = RuntimeError()
    with pytest.raises(RuntimeError):
        failing.step()
    assert rates(failing) == [0.3]
    two.close()
    assert Failing.step is step


def test_an_exception_that_no_guard_saw_is_made_good_at_the_next_step(failing):
    subject = Updates()
    subject.begin(failing, 0.5)
    subject.begin(failing, 0.5)
    assert rates(failing) == [0.15]
    subject.end(failing)
    assert rates(failing) == [0.3]


def test_no_optimizer_is_kept_alive():
    subject = Updates()
    optimizer = sgd(0.1)
    subject.guard(optimizer)
    subject.begin(optimizer, 0.5)
    subject.end(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    subject.close()
