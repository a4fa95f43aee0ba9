"""What the bench of enforcing makes of last losses, and the troubles it brings about."""

import pytest
import torch

from bench.enforced import (
    TRAININGS,
    TROUBLES,
    Compared,
    WrongGradients,
    WrongSign,
    begin,
    of_health,
    of_trouble,
)
from bench.small_trainings import Factors
from bench.unusual_trainings import UNUSUAL


def compared(healthy, advised, enforced, trouble="sign", training="digits"):
    return Compared(trouble, training, 0, healthy, advised, enforced)


def test_harm_is_avoided_as_far_as_the_loss_comes_back():
    assert compared(1.0, 3.0, 1.5).avoided == pytest.approx(0.75)
    assert compared(1.0, 3.0, 0.5).avoided == 1.0
    assert compared(1.0, 3.0, 4.0).avoided == pytest.approx(-0.5)


def test_what_ends_like_its_healthy_twin_was_not_harmed():
    assert not compared(1.0, 1.04, 1.0).is_harmed
    assert compared(1.0, 1.06, 1.0).is_harmed


def test_no_run_has_to_be_better_than_its_healthy_twin():
    assert compared(1.0, 0.5, 1.0).worse == 1.0
    assert compared(1.0, 2.0, 3.0).worse == 1.5


def test_the_median_is_that_of_trainings_that_were_harmed():
    harmed = [compared(1.0, 3.0, enforced) for enforced in (1.0, 1.2, 9.0)]
    rows = of_trouble([compared(1.0, 1.0, 1.0), *harmed])
    left, over_healthy, harmless, worst, worse, *_ = rows
    assert (left.value, left.holds) == (pytest.approx(0.1), True)
    assert over_healthy.value == 1.2
    assert (harmless.value, harmless.baseline) == (1, 4)
    assert (worst.value, worst.holds) == (3.0, False)
    assert worse.value == 1


def test_a_healthy_training_that_ends_worse_is_shown():
    worst, changed, *shown = of_health({"gan": [1.0, 1.5], "vae": [1.0, 1.0]})
    assert (worst.value, worst.holds) == (1.5, False)
    assert changed.value == 1
    assert [row.figure for row in shown] == ["no trouble, gan, worst"]


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_begins_in_the_middle(name):
    torch.manual_seed(0)
    work = TRAININGS["regression"](0)
    trouble = TROUBLES[name](begin(work))
    assert not trouble.is_on(begin(work) - 1)
    assert trouble.is_on(begin(work))


def test_a_wrong_sign_turns_gradients_for_its_steps():
    torch.manual_seed(0)
    work, trouble = TRAININGS["regression"](0), WrongSign(5)
    parameter = next(work.model.parameters())
    for step, sign in ((4, 1), (5, -1), (44, -1), (45, 1)):
        parameter.grad = torch.ones_like(parameter)
        trouble.gradients(step, work)
        assert parameter.grad.eq(sign).all()


def test_gradients_pile_up_where_an_optimizer_does_not_feel_their_size():
    torch.manual_seed(0)
    work, trouble = Factors(), WrongGradients(3)
    parameter = next(work.model.parameters())
    seen = []
    for step in range(1, 6):
        trouble.clear(step, work)
        one = torch.ones_like(parameter)
        parameter.grad = one if parameter.grad is None else parameter.grad + one
        trouble.gradients(step, work)
        seen.append(float(parameter.grad.max()))
    assert seen == [1.0, 1.0, 2.0, 3.0, 4.0], "zero_grad is not called from the third step on"


@pytest.mark.parametrize("name", ["heavytail", "alternating", "embedding"])
def test_an_unusual_training_goes_on_with_its_batches(name):
    torch.manual_seed(0)
    work = UNUSUAL[name](1)
    first, second = work.batch(), work.batch()
    assert not torch.equal(first[0], second[0])
    assert work.loss(first).isfinite()
    assert work.evaluate() > 0
