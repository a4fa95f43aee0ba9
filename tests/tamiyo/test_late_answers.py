"""Answers that come after the deadline: what still counts of them."""

import threading

import pytest
from msgspec import structs

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import CONSERVATIVE_MODE, TIMEOUT, Action, SeedOperation
from esper_otel.tamiyo.breaker import State
from sidecar.running import until
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, answer, decision_about
from tamiyo.requests_made import ask, be_patient, check, connect
from testkit.patience import PATIENCE_S


def late_then_nominal(let_go, told):
    """The ask about step 1 is answered with ``told`` once it is let go, all others nominal."""

    def reply(message):
        if isinstance(message, wire.Ask) and message.step == 1:
            let_go.wait(PATIENCE_S)
            return [wire.encode(wire.Answer(message.request_id, told))]
        return all_is_well(message)

    return reply


def decision_then(path, told, *, checks=False):
    """What an ask about step 2 gives when the one about step 1 is answered late."""
    let_go = threading.Event()
    with FakeSidecar(path, late_then_nominal(let_go, told)):
        client = connect(path, deadline_ms=30)
        assert ask(client, 1).reason == TIMEOUT
        let_go.set()
        be_patient(client)
        if checks:
            assert check(client).reason == "nominal", "one update is not the whole run"
        seen = ask(client, 2), ask(client, 3)
        client.close()
    assert seen[1].reason == "nominal", "and it comes once"
    return seen[0]


def decided(**parts):
    about = wire.Ask(1, 1, 1, [])
    return structs.replace(decision_about(about), **parts)


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize(
    "told",
    [
        decided(),
        decided(action=Action.PAUSE, parameters={}),
        decided(parameters={"restore": 1.0}),
    ],
    ids=["a smaller rate", "a pause", "weights put back"],
)
def test_what_a_late_answer_asks_for_comes_with_the_next(path, told, checks):
    assert decision_then(path, told, checks=checks) == structs.replace(told, step=2)


@pytest.mark.parametrize(
    "told",
    [
        decided(parameters={"lr_scale": 1.5}),
        decided(parameters={}),
        decided(action=Action.SEED, seed_operation=SeedOperation.BLEND, parameters={}),
        decided(action=Action.PAUSE, reason=CONSERVATIVE_MODE, parameters={}),
    ],
    ids=["a greater rate", "seeds wait", "a seed's operation", "a proposal's refusal"],
)
def test_what_was_meant_for_its_own_step_alone_is_dropped_when_it_is_late(path, told):
    assert decision_then(path, told).reason == "nominal"


def test_the_stronger_of_a_late_answer_and_the_next_counts(path):
    let_go = threading.Event()

    def reply(message):
        action = Action.OPTIMIZER
        if message.step == 1:
            let_go.wait(PATIENCE_S)
        else:
            action = Action.PAUSE
        told = structs.replace(decision_about(message), action=action)
        return [wire.encode(wire.Answer(message.request_id, told))]

    with FakeSidecar(path, reply):
        client = connect(path, deadline_ms=30)
        assert ask(client, 1).reason == TIMEOUT
        let_go.set()
        be_patient(client)
        assert (ask(client, 2).id, client.breaker.state) == ("test/2", State.CLOSED)
        client.close()


def test_what_comes_after_the_breaker_opened_is_not_asked_for_any_more(path):
    """How old it is by then, nobody knows."""
    let_go = threading.Event()

    def reply(message):
        let_go.wait(PATIENCE_S)
        return answer(message) if message.step < 4 else all_is_well(message)

    with FakeSidecar(path, reply):
        client = connect(path, deadline_ms=30)
        assert [ask(client, step).reason for step in (1, 2, 3)] == [TIMEOUT] * 3
        be_patient(client)
        let_go.set()
        until(lambda: client.breaker.state is State.CLOSED)
        assert ask(client, 4).reason == "nominal"
        client.close()
