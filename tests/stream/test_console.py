"""Steps on the console, where ``OTEL_METRICS_EXPORTER`` asks for them."""

import sys

import pytest

from testkit.receiver import HttpReceiver

NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def console(monkeypatch):
    """The environment asks for the console, beside others that are named."""

    def ask(value="console"):
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", value)
        return {"OTEL_METRICS_EXPORTER": value, "OTEL_TRACES_EXPORTER": "none"}

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return ask


@pytest.fixture
def http():
    with HttpReceiver() as receiver:
        yield receiver


def test_each_step_is_a_line_of_what_people_look_for(console, open_stream, row, seed, capsys):
    stream = open_stream(NOBODY, console())
    stream.frame(1, row(1, 0.25, gradient_norm=1.5, step_latency_ms=12.3456789, lr_scale=1.0))
    stream.frame(2, row(2, 0.125, lr_scale=0.5, nonfinite=2.0), [seed("a"), seed("b", 0.0)])
    stream.frame(3, row(3, float("nan")), [seed("b", 0.5)])
    report = stream.close()
    assert capsys.readouterr().out.splitlines() == [
        "step=1 loss=0.25 gradient_norm=1.5 step_latency_ms=12.3457",
        "step=2 loss=0.125 lr_scale=0.5 nonfinite=2 a: TRAINING alpha=0.25 b: TRAINING",
        "step=3 b: TRAINING alpha=0.5",
    ]
    assert (report.frames, report.metrics.produced, report.files) == (3, 0, ())


def test_beside_otlp_steps_are_sent_as_well(console, http, open_stream, row, capsys):
    stream = open_stream(http.url, console("otlp,console"), world_size=2, rank=1)
    stream.frame(1, row(1))
    assert stream.close().metrics.delivered == 2
    assert capsys.readouterr().out == "rank=1 step=1 loss=0.5\n"


def test_a_seed_cannot_write_lines_of_its_own(console, open_stream, row, seed, capsys):
    stream = open_stream(NOBODY, console())
    stream.frame(1, row(1), [seed("a\nstep=2")])
    stream.close()
    assert capsys.readouterr().out == "step=1 loss=0.5 a\\nstep=2: TRAINING alpha=0.25\n"


def test_a_console_that_is_gone_is_said_once_and_steps_go_on(
    console, http, open_stream, row, caplog, monkeypatch, wait_until
):
    stream = open_stream(http.url, console("otlp,console"))

    class Gone:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Gone())
    stream.frame(1, row(1))
    wait_until(lambda: "no longer printed" in caplog.text)
    stream.frame(2, row(2))
    assert stream.close().metrics.delivered == 4
    assert caplog.text.count("no longer printed") == 1


@pytest.mark.parametrize("value", ["", "otlp", "none"])
def test_nobody_asks_nothing_is_printed(console, open_stream, row, capsys, value):
    stream = open_stream(NOBODY, console(value))
    stream.frame(1, row(1))
    stream.close(0.1)
    assert capsys.readouterr().out == ""
