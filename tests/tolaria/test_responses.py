import pytest
from msgspec import structs

from esper_otel.leyline.decisions import (
    FAILED_OPEN,
    NOMINAL,
    NOT_ASKED,
    WARMING_UP,
    Action,
    Decision,
    Severity,
    unanswered,
)
from esper_otel.tolaria.responses import RateFactor, Responses
from esper_otel.tolaria.updates import AS_IT_IS, UpdateOrder


def optimizer(**parameters):
    return Decision(
        "d", "r", 1, 1, Action.OPTIMIZER, Severity.HIGH, "a_rule", parameters=parameters
    )


NOTHING = unanswered("r", 1, NOMINAL)
PAUSE = Decision("d", "r", 1, 1, Action.PAUSE, Severity.HIGH, "loss_spike")


def responses(release_steps=3, enforce=True):
    rate = RateFactor(minimum=0.01, maximum=1.0, release_steps=release_steps)
    return Responses(rate, enforce=enforce)


def test_a_decision_scales_the_rate():
    subject = responses()
    assert subject.apply_rate(optimizer(lr_scale=0.5))
    assert subject.lr_scale == 0.5


@pytest.mark.parametrize("decision", [optimizer(), optimizer(skip_step=1.0), PAUSE, NOTHING])
def test_a_judged_step_without_a_cut_is_a_clean_one(decision):
    subject = responses(release_steps=3)
    subject.apply_rate(optimizer(lr_scale=0.5))
    changed = [subject.apply_rate(decision) for _ in range(4)]
    assert not any(changed)
    assert subject.lr_scale > 0.5


@pytest.mark.parametrize("reason", sorted(FAILED_OPEN | {NOT_ASKED, WARMING_UP}))
def test_while_nobody_judges_what_is_held_stays_held(reason):
    subject = responses(release_steps=3)
    subject.apply_rate(optimizer(lr_scale=0.5))
    for step in range(500):
        assert not subject.apply_rate(unanswered("r", step, reason))
    assert subject.lr_scale == 0.5
    for _ in range(3):
        subject.apply_rate(NOTHING)
    assert subject.lr_scale == 0.5, "the wait begins when somebody judges again"
    subject.apply_rate(NOTHING)
    assert subject.lr_scale > 0.5


def test_a_pause_that_has_weights_put_back_scales_the_rate_as_well():
    subject = responses()
    asked = structs.replace(PAUSE, parameters={"restore": 1.0, "lr_scale": 0.5})
    assert subject.asks_to_restore(asked)
    assert subject.apply_rate(asked)
    assert subject.lr_scale == 0.5
    assert not subject.apply_rate(structs.replace(PAUSE, parameters={"lr_scale": 0.5}))


@pytest.mark.parametrize(
    ("decision", "enforce"),
    [
        (optimizer(restore=1.0), False),
        (optimizer(lr_scale=0.5), True),
        (structs.replace(optimizer(restore=1.0), reason="timeout"), True),
    ],
)
def test_weights_are_put_back_by_decisions_that_are_applied_and_ask_for_it(decision, enforce):
    assert not responses(enforce=enforce).asks_to_restore(decision)


def test_in_advise_nothing_is_applied():
    subject = responses(enforce=False)
    paused = []
    subject.on_pause(paused.append)
    assert not subject.apply_rate(optimizer(lr_scale=0.5))
    assert not subject.apply_pause(PAUSE)
    assert subject.order_of(optimizer(skip_step=1.0)) == AS_IT_IS
    assert (subject.lr_scale, paused) == (1.0, [])


def test_a_pause_calls_what_has_registered_for_it():
    subject = responses()
    assert not subject.apply_pause(PAUSE), "nobody has yet"
    seen = []
    subject.on_pause(seen.append)
    assert subject.apply_pause(PAUSE)
    assert not subject.apply_pause(NOTHING)
    assert seen == [PAUSE]


def test_a_callback_that_raises_takes_nothing_from_the_others(caplog):
    subject = responses()
    seen = []
    subject.on_pause(lambda decision: 1 / 0)
    subject.on_pause(seen.append)
    assert subject.apply_pause(PAUSE)
    assert seen == [PAUSE]
    assert "run.on_pause raised" in caplog.text


@pytest.mark.parametrize(
    ("parameters", "order"),
    [
        ({}, AS_IT_IS),
        ({"skip_step": 1.0}, UpdateOrder(skip=True)),
        ({"restore": 1.0}, UpdateOrder(restore=True)),
        ({"max_norm": 2.0}, UpdateOrder(max_norm=2.0)),
        ({"max_norm": float("nan")}, AS_IT_IS),
        ({"max_norm": -1.0}, AS_IT_IS),
        ({"lr_scale": 0.25, "max_norm": 1.0}, UpdateOrder(0.25, 1.0)),
        ({"lr_scale": 0.0}, AS_IT_IS),
        ({"lr_scale": 1e-9}, UpdateOrder(0.01)),
    ],
)
def test_what_a_decision_asks_of_one_update(parameters, order):
    assert responses().order_of(optimizer(**parameters)) == order


@pytest.mark.parametrize("reason", sorted(FAILED_OPEN))
def test_without_an_answer_nothing_is_done_to_an_update(reason):
    assert responses().order_of(unanswered("r", 1, reason)) == AS_IT_IS
