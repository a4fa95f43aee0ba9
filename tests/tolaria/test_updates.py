"""What is done to one update, and that all of it is taken back."""

import gc
import types
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch

from esper_otel.tolaria import updates
from esper_otel.tolaria.step_hooks import AROUND_STEPS, AroundSteps
from esper_otel.tolaria.updates import AS_IT_IS, UpdateOrder, Updates


def sgd(*rates, **options):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    made = torch.optim.SGD(groups, lr=0.1, **options)
    for group in made.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones(2)
    return made


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def change(subject, optimizer, factor, order=AS_IT_IS):
    """As a step that begins does it; returns whether a rate was scaled."""
    subject.scaled = False
    subject.prepare(optimizer, factor, order)
    if subject.is_prepared(optimizer):
        subject.enter(optimizer, (optimizer,), {})
    return subject.scaled


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """Ends what a test has begun: classes of torch are as they were then.

    Runs that other tests of this process left open are none of this one's.
    """
    monkeypatch.setattr(updates, "AROUND_STEPS", AroundSteps())
    made = []
    before = Updates.__init__

    def begin(self):
        before(self)
        made.append(self)

    Updates.__init__ = begin
    yield
    Updates.__init__ = before
    for each in made:
        each.close()


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


class Probed(torch.optim.SGD):
    """Notes the rates of its updates; ``error`` is raised by the next one."""

    error: BaseException | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.used = []

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.used.append(rates(self)[0])
        error, self.error = self.error, None
        if error is not None:
            raise error
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data -= group["lr"] * parameter.grad
        return loss


@pytest.fixture
def probed():
    made = Probed([torch.nn.Parameter(torch.ones(2))], lr=0.3)
    made.param_groups[0]["params"][0].grad = torch.ones(2)
    return made


def halved(optimizer, subject=None, **options):
    """Every step of ``optimizer`` is made with half of its rate from now on."""
    subject = subject or Updates()
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: subject.prepare(optimizer, 0.5, **options)
    )
    return subject


def test_the_step_alone_uses_the_scaled_rate_and_hooks_see_the_scripts(probed):
    seen = []
    probed.register_step_pre_hook(lambda o, a, k: seen.append(rates(o)[0]))
    halved(probed)
    probed.register_step_pre_hook(lambda o, a, k: seen.append(rates(o)[0]))
    probed.register_step_post_hook(lambda o, a, k: seen.append(rates(o)[0]))
    for _ in range(3):
        probed.step()
    assert probed.used == [0.15] * 3
    assert seen == [0.3] * 9


def test_a_rate_that_a_hook_of_the_script_sets_is_scaled_and_stays(probed):
    def sets(optimizer, args, kwargs):
        optimizer.param_groups[0]["lr"] = 0.8

    halved(probed)
    probed.register_step_pre_hook(sets)
    probed.step()
    assert (probed.used, rates(probed)) == ([0.4], [0.8])


def test_a_schedule_that_a_hook_steps_is_the_scripts_own(probed):
    schedule = torch.optim.lr_scheduler.ExponentialLR(probed, 0.9)
    halved(probed)
    probed.register_step_post_hook(lambda o, a, k: schedule.step())
    for _ in range(5):
        probed.step()
    assert rates(probed) == [pytest.approx(0.3 * 0.9**5)]
    assert probed.used == pytest.approx([0.15 * 0.9**n for n in range(5)])


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)])
def test_a_step_that_raises_leaves_the_scripts_rate_and_gradients_behind(probed, error):
    (parameter,) = probed.param_groups[0]["params"]
    gradient = parameter.grad
    halved(probed)
    probed.error = error
    with pytest.raises(type(error)) as raised:
        probed.step()  # the first of all: nothing was prepared before it
    assert raised.value is error
    assert (probed.used, rates(probed)) == ([0.15], [0.3])
    assert parameter.grad is gradient


@pytest.mark.parametrize("scheduled", ["before", "after"])
def test_a_step_that_a_scheduler_has_wrapped_is_no_other(probed, scheduled):
    if scheduled == "before":
        torch.optim.lr_scheduler.StepLR(probed, 1)
    halved(probed)
    probed.step()
    if scheduled == "after":
        torch.optim.lr_scheduler.StepLR(probed, 1)
    probed.error = RuntimeError()
    with pytest.raises(RuntimeError):
        probed.step()
    assert (probed.used, rates(probed)) == ([0.15, 0.15], [0.3])


def test_a_bound_step_of_the_scripts_own_stays_what_it_is(probed):
    def mine(optimizer):
        return Probed.step(optimizer)

    probed.step = own = types.MethodType(mine, probed)
    halved(probed)
    probed.step()
    assert probed.step is own
    assert probed.used == [0.15]
    torch.optim.lr_scheduler.StepLR(probed, 1)  # which takes the bound method apart


def test_a_class_that_calls_the_step_it_extends_is_scaled_once(probed):
    class Extended(Probed):
        def step(self, closure=None):
            return super().step(closure)

    probed.step()  # torch puts hooks around both
    extended = Extended([torch.nn.Parameter(torch.ones(2))], lr=0.3)
    halved(extended)
    extended.step()
    assert (extended.used, rates(extended)) == ([0.15], [0.3])


def test_a_skipped_update_is_not_made_at_all(probed):
    (parameter,) = probed.param_groups[0]["params"]
    gradient = parameter.grad
    halved(probed, order=UpdateOrder(skip=True))
    seen = []
    probed.register_step_pre_hook(lambda o, a, k: seen.append(parameter.grad is gradient))
    probed.register_step_post_hook(lambda o, a, k: seen.append(parameter.grad is gradient))
    assert probed.step() is None
    assert torch.equal(parameter, torch.ones(2))
    assert (probed.used, seen) == ([], [True, True])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_an_update_that_its_closure_shows_to_be_bad_is_not_made(kind):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = kind([parameter], lr=0.1)
    subject, orders = Updates(), iter([UpdateOrder(skip=True), AS_IT_IS])
    optimizer.register_step_pre_hook(
        lambda o, a, k: subject.prepare(o, 1.0, judge=lambda: next(orders))
    )

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 2.0, (
        "what a step returns is the closure's loss"
    )
    assert torch.equal(parameter, torch.ones(2))
    assert parameter.grad.tolist() == [2.0, 2.0]
    assert torch.is_grad_enabled()
    optimizer.step(closure)
    assert not torch.equal(parameter, torch.ones(2))


def test_a_closure_sees_the_scripts_own_rates(probed):
    seen = []
    halved(probed)
    probed.step(lambda: seen.append(rates(probed)[0]))
    assert (seen, probed.used, rates(probed)) == ([0.3], [0.15], [0.3])


def test_a_closure_that_raises_leaves_the_scripts_rate_behind(probed):
    halved(probed)
    with pytest.raises(ZeroDivisionError):
        probed.step(lambda: 1 / 0)
    assert rates(probed) == [0.3]


@pytest.mark.parametrize(
    ("order", "used", "moved"),
    [
        (AS_IT_IS, 0.15, True),
        (UpdateOrder(lr_scale=0.5), 0.075, True),
        (UpdateOrder(skip=True), 0.3, False),  # no optimizer of torch: it comes to its end
    ],
)
def test_what_a_closure_has_computed_is_judged_before_it_is_used(probed, order, used, moved):
    (parameter,) = probed.param_groups[0]["params"]
    parameter.grad = None
    judged = []

    def judge():
        judged.append(parameter.grad.clone())
        return order

    def closure():
        parameter.grad = torch.full((2,), 7.0)

    halved(probed, judge=judge)
    probed.step(closure)
    assert [each.tolist() for each in judged] == [[7.0, 7.0]]
    assert probed.used == [used]
    assert torch.equal(parameter, torch.ones(2)) is not moved
    assert parameter.grad.tolist() == [7.0, 7.0]


def test_what_raises_here_is_told_once_and_the_step_is_made(probed, caplog):
    def judge():
        raise RuntimeError("a fault of ours")

    halved(probed, judge=judge)
    for _ in range(2):
        probed.step(lambda: None)
    assert rates(probed) == [0.3]
    assert len(caplog.records) == 1


def test_closing_puts_torchs_own_back(probed):
    cell = dict(zip(Probed.step.__code__.co_freevars, Probed.step.__closure__, strict=True))[
        "func"
    ]
    step, own = cell.cell_contents, Probed.step
    one, two = halved(probed), Updates()
    probed.step()
    two.prepare(probed, 1.0)
    assert cell.cell_contents is not step
    assert Probed.step is own, "what others have got hold of is what there is"
    one.close()
    assert cell.cell_contents is not step, "another run is still there"
    two.close()
    assert cell.cell_contents is step


def test_a_run_that_is_never_closed_takes_nothing_from_those_after_it(probed):
    left = Updates()
    AROUND_STEPS.watch(probed, left)
    try:
        halved(probed)
        probed.step()
        assert probed.used == [0.15]
    finally:
        AROUND_STEPS.leave(left)


def test_closing_within_a_step_leaves_the_scripts_rate_behind(probed):
    subject = halved(probed)
    probed.step(subject.close)
    assert rates(probed) == [0.3]


def test_of_two_runs_each_takes_back_what_it_did(probed):
    one, two = Updates(), Updates()
    other = Probed([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    halved(other, one)
    halved(probed, two)
    other.step()
    one.close()
    probed.error = RuntimeError()
    with pytest.raises(RuntimeError):
        probed.step()
    assert (probed.used, rates(probed), rates(other)) == ([0.15], [0.3], [1.0])


def test_no_optimizer_is_kept_alive():
    subject = Updates()
    optimizer = sgd(0.1)
    change(subject, optimizer, 0.5)
    subject.put_back(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


# --- momentum


MOMENTUM = UpdateOrder(momentum_scale=0.5)


def settings(optimizer, name):
    return [group[name] for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("name", "own", "ours"),
    [
        ("momentum", 0.9, 0.45),
        ("momentum", np.float32(0.5), 0.25),
        ("momentum", torch.tensor(0.5), 0.25),
        ("betas", (0.9, 0.999), (0.45, 0.999)),
        ("betas", [0.9, 0.999, 0.5], [0.45, 0.999, 0.5]),
        ("betas", (torch.tensor(0.5), 0.999), (0.25, 0.999)),
    ],
)
def test_momentum_is_exchanged_and_put_back_as_the_very_object(name, own, ours):
    optimizer, subject = sgd(0.1), Updates()
    (group,) = optimizer.param_groups
    group["momentum"] = None
    group[name] = own
    assert not change(subject, optimizer, 1.0, MOMENTUM), "no rate was scaled"
    assert group[name] == ours
    assert type(group[name]) is type(own)
    subject.put_back(optimizer)
    assert group[name] is own


@pytest.mark.parametrize(
    "own", [None, "fast", (), ("a", 0.9), torch.ones(2), torch.tensor(0.9, device="meta")]
)
def test_a_momentum_that_the_host_cannot_read_is_left_alone(own):
    optimizer, subject = sgd(0.1), Updates()
    (group,) = optimizer.param_groups
    group.update(momentum=None, betas=own)
    change(subject, optimizer, 1.0, MOMENTUM)
    assert group["betas"] is own
    subject.put_back(optimizer)
    assert group["betas"] is own


def test_a_momentum_that_the_step_itself_sets_stays():
    optimizer, subject = sgd(0.1, momentum=0.9), Updates()
    change(subject, optimizer, 1.0, MOMENTUM)
    optimizer.param_groups[0]["momentum"] = 0.7
    subject.put_back(optimizer)
    assert settings(optimizer, "momentum") == [0.7]


@pytest.mark.parametrize(
    ("kind", "name", "usual", "leapt"),
    [
        (torch.optim.SGD, "momentum", 0.9, 0.999),
        (torch.optim.Adam, "betas", (0.9, 0.999), (0.999, 0.999)),
        (torch.optim.AdamW, "betas", (0.9, 0.999), (0.9999, 0.999)),
        (torch.optim.RMSprop, "momentum", 0.9, 0.999),
    ],
)
@pytest.mark.parametrize("closure", [False, True])
def test_an_update_with_its_momentum_scaled_is_that_of_the_usual_momentum(
    kind, name, usual, leapt, closure
):
    def trained(value, order):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer, subject = kind([parameter], lr=0.05, **{name: usual}), Updates()
        for step in range(6):

            def loss(step=step):
                assert optimizer.param_groups[0][name] == (value if step >= 3 else usual)
                parameter.grad = torch.cos(parameter.detach() * step)

            if step == 3:
                optimizer.param_groups[0][name] = value
            if not closure:
                loss()
            subject.prepare(optimizer, 1.0, order if step >= 3 else AS_IT_IS)
            optimizer.step(*([loss] if closure else []))
        return parameter.detach()

    first = leapt[0] if name == "betas" else leapt
    scaled = trained(leapt, UpdateOrder(momentum_scale=0.9 / first))
    torch.testing.assert_close(scaled, trained(usual, AS_IT_IS))
    assert not torch.allclose(scaled, trained(leapt, AS_IT_IS))
