"""Checks: requests about an update before it is made."""

import time

from esper_otel.leyline.decisions import BREAKER_OPEN, TIMEOUT, UNREACHABLE, Action
from esper_otel.tamiyo.breaker import State
from sidecar.running import until
from tamiyo.fake_sidecar import FakeSidecar
from tamiyo.requests_made import ask, check, connect


def test_a_check_is_answered_as_an_ask_is(path):
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        ask(client, 1)
        decision = check(client, 2)
        ask(client, 2)
        client.close()
    assert (decision.step, decision.parameters) == (2, {"lr_scale": 0.5})
    (checked,) = sidecar.checks
    assert (checked.step, checked.time_unix_nano, checked.values[0]) == (2, 1002, 2.0)
    first, second = sidecar.asks
    assert first.request_id < checked.request_id < second.request_id, "one count for both"


def test_a_check_waits_until_its_deadline_and_no_longer(path):
    with FakeSidecar(path, reply=lambda _: []):
        client = connect(path, deadline_ms=20)
        began = time.monotonic()
        decision = check(client, 5)
        assert time.monotonic() - began >= 0.015, "it was waited for"
        client.close()
    assert (decision.step, decision.action, decision.reason) == (5, Action.CONTINUE, TIMEOUT)
    assert decision.parameters == {}


def test_checks_and_asks_that_fail_count_together(path):
    client = connect(path)
    reasons = [check(client).reason, ask(client).reason, check(client).reason]
    assert reasons == [UNREACHABLE] * 3
    assert check(client).reason == BREAKER_OPEN
    client.close()


def test_a_check_that_failed_last_is_what_the_probe_repeats(path):
    client = connect(path)
    for step in (7, 8, 9):
        check(client, step)
    with FakeSidecar(path) as sidecar:
        until(lambda: client.breaker.state is State.CLOSED)
        assert ask(client, 30).reason == "a_rule"
        client.close()
    assert [each.step for each in sidecar.checks] == [9]
