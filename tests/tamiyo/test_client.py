import _thread
import itertools
import logging
import os
import random
import struct
import threading
import time

import pytest
from msgspec import structs

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import (
    BREAKER_OPEN,
    CONSERVATIVE_MODE,
    PROTOCOL_ERROR,
    SUPERSEDED,
    TIMEOUT,
    UNREACHABLE,
    Action,
    Proposal,
    SeedOperation,
    unanswered,
)
from esper_otel.leyline.endings import HowEnded, RunEnd
from esper_otel.leyline.frames import seed_row, step_row
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.leyline.wire import Guard
from esper_otel.tamiyo import client as client_module
from esper_otel.tamiyo import connection as connection_module
from esper_otel.tamiyo.breaker import State
from esper_otel.tamiyo.client import TamiyoClient
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, answer, decision_about
from testkit.patience import PATIENCE_S

GENEROUS_MS = 1e3 * PATIENCE_S


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
        client._patience_ns = int(GENEROUS_MS * 1e6)
        assert ask(client, 2).step == 2
        client.close()


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
        client._patience_ns = int(GENEROUS_MS * 1e6)
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
        client._patience_ns = int(GENEROUS_MS * 1e6)
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
        client._patience_ns = int(GENEROUS_MS * 1e6)
        let_go.set()
        until(lambda: client.breaker.state is State.CLOSED)
        assert ask(client, 4).reason == "nominal"
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


def until(condition, patience_s=PATIENCE_S):
    """Poll ``condition`` until it is true; fail when it does not become so."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.001)
    return found


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


@pytest.fixture
def probing(monkeypatch):
    """The threads that run now, of those the client has started."""
    running = []
    start = _thread.start_new_thread

    def started(function, arguments):
        running.append(function)

        def to_its_end():
            function(*arguments)
            running.remove(function)

        return start(to_its_end, ())

    monkeypatch.setattr(_thread, "start_new_thread", started)
    return running


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


def test_without_another_thread_it_goes_on_asking(path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    client = connect(path)
    assert [ask(client, step).reason for step in range(7)] == [UNREACHABLE] * 7
    monkeypatch.undo()
    with FakeSidecar(path):
        assert ask(client, 8).reason == "a_rule"
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


def test_a_sidecar_of_another_user_is_not_asked(path, monkeypatch):
    with FakeSidecar(path) as sidecar:
        monkeypatch.setattr(wire, "may_steer", lambda uid: False)
        client = connect(path)
        assert ask(client).reason == UNREACHABLE
        client.close()
    assert sidecar.asks == sidecar.hellos == []


@pytest.mark.parametrize("deadline_ms", [0.4, 1.0, 2.5, 20.0])
def test_the_deadline_may_be_any_fraction_of_a_millisecond(path, deadline_ms):
    with FakeSidecar(path, reply=lambda _: []):
        client = connect(path, deadline_ms)
        began = time.perf_counter()
        assert ask(client).reason == TIMEOUT
        assert time.perf_counter() - began >= 0.9 * deadline_ms / 1e3, "it was waited for"
        client.close()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(ValueError, match="107 bytes"):
        connect(tmp_path / ("x" * 120))


# --- sent now, collected later


def send(client, step=1, **more):
    row = step_row()
    row[0] = step
    client.send(step, 1000 + step, row, **more)


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


# --- checks


def check(client, step=1):
    row = step_row()
    row[0] = step
    return client.check(step, 1000 + step, row)


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
        decisions = []
        assert took_s(lambda: decisions.append(check(client, 5))) >= 0.015
        client.close()
    (decision,) = decisions
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
        client._patience_ns = int(GENEROUS_MS * 1e6)
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


FAILED = RunEnd(HowEnded.EXCEPTION, "ValueError")


def test_how_a_run_ended_is_said_without_waiting(path):
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        ask(client, 7)
        client.say_goodbye(7, 1008, FAILED)
        client.close()
        until(lambda: sidecar.goodbyes)
    assert sidecar.goodbyes == [wire.Goodbye(7, 1008, "exception", "ValueError")]


def test_an_answer_that_nobody_has_read_takes_no_goodbye_away(path):
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        ask(client, 6)
        client.send(7, 1007, step_row())
        until(lambda: len(sidecar.asks) == 2)
        client.say_goodbye(7, 1008, FAILED)
        client.close()
        until(lambda: sidecar.goodbyes)


def test_who_asks_again_after_a_goodbye_is_answered(path):
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        ask(client, 7)
        client.say_goodbye(7, 1008, FAILED)
        assert ask(client, 8).reason == "a_rule"
        client.close()
    assert len(sidecar.hellos) == 1


def test_a_sidecar_that_does_not_know_goodbyes_gets_none(path):
    with FakeSidecar(path) as sidecar:
        sidecar.takes_goodbyes = False
        client = connect(path)
        ask(client, 7)
        client.say_goodbye(7, 1008, FAILED)
        assert ask(client, 8).reason == "a_rule"
        client.close()
    assert sidecar.goodbyes == []


def test_nobody_is_connected_to_for_a_goodbye(path):
    with FakeSidecar(path) as sidecar:
        client = connect(path)
        client.say_goodbye(7, 1008, FAILED)  # it has never asked
        ask(client, 7)
        client.disable()  # as in a forked child
        client.say_goodbye(7, 1008, FAILED)
    assert len(sidecar.hellos) == 1
    assert sidecar.goodbyes == []
