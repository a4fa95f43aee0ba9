"""Requests that are sent when a step ends and collected before the next update."""

import os
import threading
import time

import pytest

from esper_otel.leyline.decisions import BREAKER_OPEN, TIMEOUT, UNREACHABLE
from esper_otel.leyline.frames import seed_row
from esper_otel.tamiyo import client as client_module
from esper_otel.tamiyo import connection as connection_module
from esper_otel.tamiyo.breaker import State
from sidecar.running import until
from tamiyo.fake_sidecar import FakeSidecar
from tamiyo.requests_made import GENEROUS_MS, connect, send


@pytest.fixture
def elapse(monkeypatch):
    """Lets time go by, for the client alone."""
    passed = [0]

    def now():
        return time.perf_counter_ns() + passed[0]

    for module in (client_module, connection_module):
        monkeypatch.setattr(module, "perf_counter_ns", now)

    def elapse(milliseconds):
        passed[0] += int(milliseconds * 1e6)

    return elapse


def took_s(work):
    began = time.monotonic()
    work()
    return time.monotonic() - began


def test_a_decision_is_collected_once(path):
    with FakeSidecar(path):
        client = connect(path)
        assert client.collect() is None, "nothing has been asked"
        send(client, 7)
        assert client.collect().step == 7
        assert client.collect() is None
        client.close()


def test_sending_waits_for_nobody(path):
    with FakeSidecar(path, reply=lambda _: []):
        client = connect(path)
        assert took_s(lambda: send(client)) < GENEROUS_MS / 1e3 / 2
        client.close()


def test_an_answer_that_is_there_is_taken_however_late_it_is_collected(path, elapse):
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        send(client, 7)
        until(lambda: sidecar.asks)
        time.sleep(0.05)
        elapse(100 * GENEROUS_MS)
        assert (client.collect().reason, client.breaker.opened) == ("a_rule", 0)
        client.close()


def test_after_the_deadline_nobody_waits_for_an_answer_that_is_not_there(path, elapse):
    with FakeSidecar(path, reply=lambda _: []):
        client = connect(path, deadline_ms=10_000)
        send(client)
        elapse(10_001)
        reasons = []
        assert took_s(lambda: reasons.append(client.collect().reason)) < 5
        assert reasons == [TIMEOUT]
        client.close()


def test_the_deadline_counts_from_the_sending(path, elapse):
    with FakeSidecar(path, reply=lambda _: []):
        client = connect(path, deadline_ms=10_000)
        send(client)
        elapse(9_400)  # of the 9,500 that are waited
        assert 0.05 < took_s(client.collect) < 5
        client.close()


def test_an_ask_that_was_not_collected_is_dropped_with_its_answer(path):
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        send(client, 1)
        until(lambda: sidecar.asks)
        send(client, 2)
        assert client.collect().step == 2
        assert client.collect() is None
        client.close()


def test_a_sidecar_that_does_not_read_holds_up_no_step(path):
    stuck = threading.Event()
    seeds = [(f"s{number}", seed_row()) for number in range(100)]

    def stands_still(message):
        stuck.wait(30)
        return []

    with FakeSidecar(path, stands_still):
        client = connect(path, deadline_ms=5)
        for step in range(2000):
            send(client, step, seeds=seeds)
            if client._failure is not None:
                break
        assert client.collect().reason == TIMEOUT
        stuck.set()
        client.close()


def test_while_the_breaker_is_open_nothing_is_sent(path, probing):
    client = connect(path)
    for step in range(3):
        send(client, step)
        assert client.collect().reason == UNREACHABLE
    with FakeSidecar(path) as sidecar:
        client._closed.set()  # nor does the thread that finds out
        until(lambda: not probing)
        for step in range(3, 6):
            send(client, step)
            assert client.collect().reason == BREAKER_OPEN
        assert sidecar.asks == []


def test_what_fails_to_be_sent_counts_when_it_is_collected(path):
    client = connect(path)
    send(client)
    assert client.breaker.state is State.CLOSED
    for _ in range(3):
        send(client)
        client.collect()
    assert client.breaker.state is State.OPEN
    client.close()


def test_a_forked_child_collects_nothing_of_its_parents(path):
    """As a loader's worker does that is forked between two steps."""
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        send(client, 1)
        pid = os.fork()
        if pid == 0:
            decision = client.collect()
            fine = decision is None or decision.reason == BREAKER_OPEN
            send(client, 2)
            fine = fine and client.collect().reason == BREAKER_OPEN
            # Nor does it begin to look whether the sidecar answers again.
            os._exit(0 if fine and not client._reported_down else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert client.collect().step == 1
        client.close()
    assert [message.step for message in sidecar.asks] == [1]
