"""Around the very step of an optimizer, within all hooks: what they and the script see."""

import types

import pytest
import torch
from tolaria.probed import Probed, halved, rates

from esper_otel.tolaria.step_hooks import AROUND_STEPS
from esper_otel.tolaria.updates import AS_IT_IS, UpdateOrder, Updates

pytestmark = pytest.mark.usefixtures("closing_updates")


@pytest.fixture
def probed():
    made = Probed([torch.nn.Parameter(torch.ones(2))], lr=0.3)
    made.param_groups[0]["params"][0].grad = torch.ones(2)
    return made


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


def test_a_fault_of_ours_is_told_once_and_the_step_is_made(probed, caplog):
    def judge():
        raise RuntimeError("a fault of ours")

    halved(probed, judge=judge)
    for _ in range(2):
        probed.step(lambda: None)
    assert rates(probed) == [0.3]
    assert len(caplog.records) == 1


def test_closing_puts_torchs_own_step_back(probed):
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
