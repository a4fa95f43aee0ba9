"""A goodbye: how a run ended, said without waiting."""

from esper_otel.leyline import wire
from esper_otel.leyline.endings import HowEnded, RunEnd
from esper_otel.leyline.frames import step_row
from sidecar.running import until
from tamiyo.fake_sidecar import FakeSidecar
from tamiyo.requests_made import ask, connect

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
