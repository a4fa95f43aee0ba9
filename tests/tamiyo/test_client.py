import itertools
import logging
import struct
import threading
import time

import pytest

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import (
    BREAKER_OPEN,
    PROTOCOL_ERROR,
    TIMEOUT,
    UNREACHABLE,
    Action,
    Proposal,
    SeedOperation,
)
from esper_otel.leyline.frames import seed_row, step_row
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.tamiyo import client as client_module
from esper_otel.tamiyo.breaker import State
from esper_otel.tamiyo.client import TamiyoClient
from tamiyo.fake_sidecar import FakeSidecar, answer

GENEROUS_MS = 2000.0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.sock"


def connect(path, deadline_ms=GENEROUS_MS):
    return TamiyoClient(
        path, run="r", instance="i", rank=3, world_size=4, deadline_ms=deadline_ms
    )


def ask(client, step=1, **more):
    row = step_row()
    row[0] = step
    return client.ask(step, 1000 + step, row, **more)


def test_the_answer_to_an_ask_is_the_decision(path):
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        decision = ask(client, 7)
        client.close()
    assert (decision.action, decision.reason, decision.step) == (Action.OPTIMIZER, "a_rule", 7)
    assert client.table_version == "table 1"
    (hello,) = sidecar.hellos
    assert (hello.run, hello.rank, hello.world_size) == ("r", 3, 4)
    assert (tuple(hello.step_columns), tuple(hello.seed_columns)) == (STEP_KEYS, SEED_KEYS)


def test_an_ask_carries_the_seeds_and_the_proposal(path):
    seed = seed_row()
    seed[0] = 4.0
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        ask(client, 1, seeds=[("s1", seed)], proposal=Proposal("s1", SeedOperation.BLEND))
        client.close()
    (seen,) = sidecar.asks
    assert seen.seeds[0].seed_id == "s1"
    assert seen.seeds[0].values[0] == 4.0
    assert seen.proposal == Proposal("s1", SeedOperation.BLEND)


def test_one_connection_serves_many_asks(path):
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        assert [ask(client, step).step for step in range(1, 51)] == list(range(1, 51))
        client.close()
    assert len(sidecar.hellos) == 1


def test_nobody_listening_is_unreachable_then_not_asked_any_more(path, caplog):
    client = connect(path)
    with caplog.at_level(logging.WARNING):
        reasons = [ask(client, step).reason for step in range(1, 8)]
    assert reasons == [UNREACHABLE] * 3 + [BREAKER_OPEN] * 4
    assert len(caplog.records) == 1, "told once"
    assert str(path) in caplog.text


def test_silence_ends_at_the_deadline(path):
    with FakeSidecar(path, reply=lambda _: []):
        client = connect(path, deadline_ms=20)
        began = time.monotonic()
        decision = ask(client)
        took = time.monotonic() - began
        client.close()
    assert (decision.action, decision.reason) == (Action.CONTINUE, TIMEOUT)
    assert took >= 0.015, "it was waited for"


def test_a_late_answer_is_not_taken_for_the_next_one(path):
    let_go = threading.Event()
    count = itertools.count(1)

    def late_first(message):
        if next(count) == 1:
            let_go.wait(10)
        return answer(message)

    with FakeSidecar(path, late_first):
        client = connect(path, deadline_ms=30)
        assert ask(client, 1).reason == TIMEOUT
        let_go.set()
        client._deadline_ns = int(GENEROUS_MS * 1e6)
        assert ask(client, 2).step == 2
        client.close()


GARBAGE = {
    "not MessagePack": struct.pack("<I", 3) + b"\xc1\xc1\xc1",
    "another message": wire.encode(wire.Refusal("go away")),
    "an absurd length": b"\xff\xff\xff\xff",
}


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_a_protocol_error_and_a_fresh_connection(path, reply):
    replies = iter([[reply]])
    with FakeSidecar(path, lambda message: next(replies, None) or answer(message)) as sidecar:
        client = connect(path)
        decision = ask(client, 1)
        assert (decision.action, decision.reason) == (Action.CONTINUE, PROTOCOL_ERROR)
        assert ask(client, 2).reason == "a_rule"
        client.close()
    assert len(sidecar.hellos) == 2


def test_killed_in_the_middle_of_an_answer(path):
    def half(message):
        return [answer(message)[0][:10], b""]

    with FakeSidecar(path, half) as sidecar:
        client = connect(path)
        assert ask(client, 1).reason == UNREACHABLE
        sidecar.reply = answer
        assert ask(client, 2).reason == "a_rule"
        client.close()


def test_it_recovers_when_the_cool_down_has_passed(path, monkeypatch, caplog):
    now = [time.perf_counter_ns()]
    monkeypatch.setattr(client_module, "perf_counter_ns", lambda: now[0])
    client = connect(path, deadline_ms=200)
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


def test_a_frozen_sidecar_is_waited_for_three_times_and_never_again(path, monkeypatch):
    waited = []
    with FakeSidecar(path, reply=lambda _: []):
        client = connect(path, deadline_ms=5)
        original = client._await
        monkeypatch.setattr(
            client, "_await", lambda *args: (waited.append(1), original(*args))[1]
        )
        now = [time.perf_counter_ns()]
        monkeypatch.setattr(client_module, "perf_counter_ns", lambda: now[0])
        for step in range(200):
            # Real time stands still for the client but for these 10 ms a step.
            if step < 3:
                monkeypatch.setattr(client_module, "perf_counter_ns", time.perf_counter_ns)
            else:
                now[0] = max(now[0], time.perf_counter_ns()) + 10_000_000
                monkeypatch.setattr(client_module, "perf_counter_ns", lambda: now[0])
            assert ask(client, step).action is Action.CONTINUE
        client.close()
    assert len(waited) == 3
    assert client.breaker.opened > 2, "probes went out meanwhile"


def test_a_path_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(ValueError, match="107 bytes"):
        connect(tmp_path / ("x" * 120))
