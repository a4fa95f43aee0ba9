"""A request to the sidecar: its decision, or the reason why there is none."""

import logging
import os
import struct
import time

import pytest

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import (
    BREAKER_OPEN,
    PROTOCOL_ERROR,
    SUPERSEDED,
    TIMEOUT,
    UNREACHABLE,
    Action,
    Proposal,
    SeedOperation,
    unanswered,
)
from esper_otel.leyline.frames import seed_row
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from tamiyo.fake_sidecar import FakeSidecar, answer
from tamiyo.requests_made import ask, connect


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


def test_who_is_no_longer_its_rank_hears_of_it_at_once_and_once(path, caplog):
    def replaced(request):
        told = unanswered("r", request.step, SUPERSEDED)
        return [wire.encode(wire.Answer(request.request_id, told))]

    with FakeSidecar(path, replaced):
        client = connect(path)
        reasons = {ask(client, step).reason for step in (1, 2, 3)}
        client.close()
    assert reasons == {SUPERSEDED}
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        "esper-otel: another process, which began later, trains as rank 3"
    )


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


def test_a_sidecar_that_nobody_started_is_unreachable_and_then_not_asked_any_more(path, caplog):
    client = connect(path)
    with caplog.at_level(logging.WARNING):
        reasons = [ask(client, step).reason for step in range(1, 8)]
    assert reasons == [UNREACHABLE] * 3 + [BREAKER_OPEN] * 4
    assert len(caplog.records) == 1, "told once"
    assert str(path) in caplog.text


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


def test_a_sidecar_killed_in_the_middle_of_an_answer_is_asked_again_at_the_next_step(path):
    def half(message):
        return [answer(message)[0][:10], b""]

    with FakeSidecar(path, half) as sidecar:
        client = connect(path)
        assert ask(client, 1).reason == UNREACHABLE
        sidecar.reply = answer
        assert ask(client, 2).reason == "a_rule"
        client.close()


def test_a_forked_child_leaves_the_parents_connection_alone(path):
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        ask(client, 1)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if ask(client, 2).reason == BREAKER_OPEN else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert ask(client, 3).reason == "a_rule"
        client.close()
    assert [message.step for message in sidecar.asks] == [1, 3]
    assert len(sidecar.hellos) == 1


def test_a_sidecar_of_another_user_is_not_asked(path, monkeypatch):
    with FakeSidecar(path) as sidecar:
        monkeypatch.setattr(wire, "may_steer", lambda uid: False)
        client = connect(path)
        assert ask(client).reason == UNREACHABLE
        client.close()
    assert sidecar.asks == sidecar.hellos == []


@pytest.mark.parametrize("deadline_ms", [0.4, 1.0, 2.5, 20.0])
def test_silence_ends_at_the_deadline_which_may_be_any_fraction_of_a_millisecond(
    path, deadline_ms
):
    with FakeSidecar(path, reply=lambda _: []):
        client = connect(path, deadline_ms)
        began = time.perf_counter()
        decision = ask(client)
        assert time.perf_counter() - began >= 0.9 * deadline_ms / 1e3, "it was waited for"
        client.close()
    assert (decision.action, decision.reason) == (Action.CONTINUE, TIMEOUT)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(ValueError, match="107 bytes"):
        connect(tmp_path / ("x" * 120))
