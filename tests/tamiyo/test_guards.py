"""Guards come with answers; none of them is lost, whoever reads the answer."""

import threading

from esper_otel.leyline.decisions import TIMEOUT
from esper_otel.leyline.wire import Guard
from esper_otel.tamiyo.breaker import State
from sidecar.running import until
from tamiyo.fake_sidecar import FakeSidecar, answer
from tamiyo.requests_made import ask, be_patient, check, connect, send

# --- guards


LOSS = Guard("loss", above=5.0)
NORM = Guard("gradient_norm", above=5.0)


def holds(client, loss=9.0, norm=9.0):
    """Which of the guards above it has, None before any were told."""
    guards = client.guards
    if guards is None:
        return None
    return guards.crossed(loss, 0.0, None), guards.crossed(0.0, norm, None)


def test_guards_are_those_of_the_newest_answer_that_had_any(path):
    told = iter([None, [LOSS], None, [NORM], []])
    with FakeSidecar(path, lambda message: answer(message, next(told))):
        client = connect(path)
        seen = []
        for step in range(5):
            ask(client, step)
            seen.append(holds(client))
        client.close()
    assert seen == [None, (True, False), (True, False), (False, True), (False, False)]


def test_the_answer_to_a_check_may_bring_guards_too(path):
    with FakeSidecar(path, lambda message: answer(message, [LOSS])):
        client = connect(path)
        check(client)
        assert holds(client) == (True, False)
        client.close()


def test_guards_of_an_answer_that_is_late_are_not_lost(path):
    """The sidecar tells them once; that nobody waited any more is not known there."""
    let_go = threading.Event()

    def late_first(message):
        if message.step == 1:
            let_go.wait(10)
        return answer(message, [LOSS] if message.step == 1 else None)

    with FakeSidecar(path, late_first):
        client = connect(path, deadline_ms=30)
        assert ask(client, 1).reason == TIMEOUT
        let_go.set()
        be_patient(client)
        assert ask(client, 2).step == 2
        assert holds(client) == (True, False)
        client.close()


def test_guards_of_an_answer_that_was_not_collected_are_not_lost(path):
    with FakeSidecar(path, lambda m: answer(m, [LOSS] if m.step == 1 else None)) as sidecar:
        client = connect(path)
        send(client, 1)
        until(lambda: sidecar.asks)
        ask(client, 2)
        assert holds(client) == (True, False)
        client.close()


def test_guards_of_the_answer_to_a_probe_are_not_lost(path):
    client = connect(path)
    for step in range(3):
        ask(client, step)
    told = iter([[LOSS]])
    with FakeSidecar(path, lambda message: answer(message, next(told, None))):
        until(lambda: client.breaker.state is State.CLOSED)
        assert ask(client, 30).reason == "a_rule"
        assert holds(client) == (True, False)
        client.close()
