import itertools
import logging

import pytest

from esper_otel.leyline.decisions import NOMINAL, Action, Decision, Severity, unanswered
from esper_otel.tolaria.responses import LearningRate, Responses


class Optimizer:
    def __init__(self, *rates):
        self.param_groups = [{"lr": rate} for rate in rates]

    @property
    def rates(self):
        return [group["lr"] for group in self.param_groups]


def scaling(factor=0.5):
    return Decision(
        id="d",
        run="r",
        step=1,
        observed_step=1,
        action=Action.OPTIMIZER,
        severity=Severity.HIGH,
        reason="loss_diverging",
        parameters={"lr_scale": factor},
    )


NOTHING = unanswered("r", 1, NOMINAL)
PAUSE = Decision("d", "r", 1, 1, Action.PAUSE, Severity.HIGH, "loss_spike")


def responses(release_steps=10, enforce=True, minimum=0.01, maximum=1.0):
    rate = LearningRate(minimum=minimum, maximum=maximum, release_steps=release_steps)
    return Responses(rate, enforce=enforce)


def test_every_optimizer_decision_multiplies_every_group():
    optimizer = Optimizer(1.0, 0.1)
    subject = responses()
    assert subject.apply(scaling(), optimizer)
    assert subject.apply(scaling(), optimizer)
    assert optimizer.rates == pytest.approx([0.25, 0.025])
    assert subject.lr_scale == pytest.approx(0.25)
    assert subject.applied == 2


@pytest.mark.parametrize(
    ("factor", "minimum", "maximum", "bound"), [(0.1, 0.05, 1.0, 0.05), (3.0, 0.05, 2.0, 2.0)]
)
def test_the_product_of_all_factors_is_bounded(factor, minimum, maximum, bound):
    optimizer = Optimizer(1.0)
    subject = responses(minimum=minimum, maximum=maximum)
    for _ in range(5):
        subject.apply(scaling(factor), optimizer)
    assert optimizer.rates == pytest.approx([bound])


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_is_no_positive_number_is_not_applied(factor, caplog):
    optimizer = Optimizer(1.0)
    responses().apply(scaling(factor), optimizer)
    assert optimizer.rates == [1.0]
    assert "not a positive number" in caplog.text


def test_in_advise_nothing_is_applied():
    optimizer = Optimizer(1.0)
    subject = responses(enforce=False)
    paused = []
    subject.on_pause(paused.append)
    assert not subject.apply(scaling(), optimizer)
    assert not subject.apply(PAUSE, optimizer)
    assert (optimizer.rates, paused, subject.applied) == ([1.0], [], 0)


def test_after_enough_clean_steps_the_rate_is_given_back_to_the_last_bit():
    optimizer = Optimizer(0.3, 0.7)
    subject = responses(release_steps=10)
    subject.apply(scaling(0.125), optimizer)
    held = optimizer.rates
    seen = []
    for _ in range(20):
        subject.apply(NOTHING, optimizer)
        seen.append(optimizer.rates[0])
    assert seen[:10] == [held[0]] * 10, "held while it may come back"
    assert seen[10:] == sorted(seen[10:]), "then ever closer to the run's own"
    assert all(b / a < 1.3 for a, b in itertools.pairwise(seen[10:])), "gently"
    assert optimizer.rates == pytest.approx([0.3, 0.7], rel=1e-12)
    assert subject.lr_scale == 1.0


def test_trouble_that_comes_back_is_waited_out_twice_as_long():
    optimizer = Optimizer(1.0)
    subject = responses(release_steps=10)
    subject.apply(scaling(), optimizer)
    for _ in range(15):
        subject.apply(NOTHING, optimizer)
    assert optimizer.rates[0] > 0.5, "on its way back"
    subject.apply(scaling(), optimizer)
    held = optimizer.rates[0]
    for _ in range(20):
        subject.apply(NOTHING, optimizer)
        assert optimizer.rates[0] == held
    subject.apply(NOTHING, optimizer)
    assert optimizer.rates[0] > held


def test_a_pause_does_not_shorten_the_wait_but_counts_as_a_step():
    optimizer = Optimizer(1.0)
    subject = responses(release_steps=3)
    subject.apply(scaling(), optimizer)
    for _ in range(3):
        subject.apply(PAUSE, optimizer)
    assert optimizer.rates == [0.5]
    subject.apply(PAUSE, optimizer)
    assert optimizer.rates[0] > 0.5


def test_a_scheduler_that_sets_rates_absolutely_is_not_fought():
    optimizer = Optimizer(1.0)
    subject = responses(release_steps=5)
    subject.apply(scaling(0.25), optimizer)
    for _ in range(20):
        optimizer.param_groups[0]["lr"] = 0.9
        subject.apply(NOTHING, optimizer)
        assert optimizer.rates == [0.9]


def test_a_scheduler_that_multiplies_keeps_its_share_when_the_rate_is_given_back():
    optimizer = Optimizer(1.0)
    subject = responses(release_steps=5)
    subject.apply(scaling(0.1), optimizer)
    optimizer.param_groups[0]["lr"] *= 0.5
    for _ in range(10):
        subject.apply(NOTHING, optimizer)
    assert optimizer.rates == pytest.approx([0.5])


def test_a_pause_calls_what_has_registered_for_it():
    subject = responses()
    seen = []
    subject.on_pause(seen.append)
    assert subject.apply(PAUSE, None)
    assert not subject.apply(NOTHING, None)
    assert seen == [PAUSE]


class Scalar:
    """As much of a 0-d tensor as a capturable optimizer keeps its rate in."""

    def __init__(self, value, kind="cpu"):
        self.value = value
        self.device = type("device", (), {"type": kind})

    def __float__(self):
        assert self.device.type == "cpu", "reading this would synchronise"
        return self.value

    def fill_(self, value):
        self.value = value


def test_a_rate_kept_in_a_tensor_is_changed_in_place():
    optimizer = Optimizer(Scalar(1.0))
    held = optimizer.param_groups[0]["lr"]
    responses().apply(scaling(), optimizer)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.value == 0.5


def test_a_rate_on_a_device_is_left_alone_and_said_so_once(caplog):
    optimizer = Optimizer(Scalar(1.0, "cuda"))
    subject = responses()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            subject.apply(scaling(), optimizer)
    assert optimizer.param_groups[0]["lr"].value == 1.0
    assert len(caplog.records) == 1
