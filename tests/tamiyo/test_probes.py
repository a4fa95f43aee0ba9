"""Probes: a thread finds out, while the circuit breaker is open, who answers again."""

import _thread
import logging
import random
import threading
import time

from esper_otel.leyline.decisions import (
    BREAKER_OPEN,
    TIMEOUT,
    UNREACHABLE,
    Proposal,
    SeedOperation,
)
from esper_otel.leyline.frames import seed_row
from esper_otel.tamiyo import client as client_module
from esper_otel.tamiyo.breaker import State
from sidecar.running import until
from tamiyo.fake_sidecar import FakeSidecar
from tamiyo.requests_made import ask, connect


def test_a_client_recovers_when_the_cool_down_has_passed(path, monkeypatch, caplog):
    now = [time.perf_counter_ns()]
    monkeypatch.setattr(client_module, "perf_counter_ns", lambda: now[0])
    client = connect(path)
    for step in range(3):
        ask(client, step)
    assert client.breaker.state is State.OPEN
    with FakeSidecar(path) as sidecar, caplog.at_level(logging.INFO):
        assert ask(client, 4).reason == BREAKER_OPEN, "still cooling down"
        assert sidecar.asks == []
        now[0] += 100_000_000
        assert ask(client, 5).reason == BREAKER_OPEN, "the probe is sent, not waited for"
        for _ in range(2000):
            decision = ask(client, 6)
            if decision.reason != BREAKER_OPEN:
                break
            now[0] += 1_000_000
            threading.Event().wait(0.001)
        assert decision.reason == "a_rule"
        assert "answers again" in caplog.text
        client.close()


def test_a_frozen_sidecar_is_waited_for_three_times_and_never_again(path):
    with FakeSidecar(path, reply=lambda _: []) as sidecar:
        client = connect(path, deadline_ms=5)
        reasons = [ask(client, step).reason for step in range(3)]
        until(lambda: reasons.append(ask(client).reason) or client.breaker.opened > 2)
        client.close()
        assert len(sidecar.asks) > 3, "probes went out meanwhile"
    assert reasons[:3] == [TIMEOUT] * 3
    assert set(reasons[3:]) == {BREAKER_OPEN}


def test_a_probe_repeats_the_ask_that_failed_last_and_proposes_nothing(path):
    client = connect(path)
    seed = seed_row()
    seed[0] = 4.0
    for step in (7, 8, 9):
        ask(client, step, seeds=[("s1", seed)], proposal=Proposal("s1", SeedOperation.BLEND))
    seed[0] = 5.0
    with FakeSidecar(path) as sidecar:
        until(lambda: client.breaker.state is State.CLOSED)
        assert ask(client, 30).reason == "a_rule"
        client.close()
    probe, following = sidecar.asks
    assert (probe.step, probe.proposal, probe.seeds[0].values[0]) == (9, None, 4.0)
    assert following.step == 30
    assert following.request_id > probe.request_id
    assert len(sidecar.hellos) == 1, "the connection is handed over"


def test_the_probing_thread_lives_while_the_breaker_is_open(path, probing):
    client = connect(path)
    for step in range(5):
        assert len(probing) == (step > 2)
        ask(client, step)
    with FakeSidecar(path):
        until(lambda: client.breaker.state is State.CLOSED)
        until(lambda: not probing)
        assert ask(client, 9).reason == "a_rule"
        client.close()


def test_closing_ends_the_probing_thread(path, probing):
    client = connect(path)
    for step in range(3):
        ask(client, step)
    assert len(probing) == 1
    client.close()
    until(lambda: not probing)
    assert ask(client).reason == BREAKER_OPEN


def test_a_client_that_can_start_no_thread_goes_on_asking(path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    client = connect(path)
    assert [ask(client, step).reason for step in range(7)] == [UNREACHABLE] * 7
    monkeypatch.undo()
    with FakeSidecar(path):
        assert ask(client, 8).reason == "a_rule"
        client.close()


def test_asking_and_probing_draw_from_no_global_generator(path):
    before = random.getstate()
    client = connect(path)
    for step in range(3):
        ask(client, step)
    with FakeSidecar(path):
        until(lambda: client.breaker.state is State.CLOSED)
        ask(client, 4)
        client.close()
    assert random.getstate() == before
