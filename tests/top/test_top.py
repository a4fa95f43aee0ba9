"""``esper-otel top`` in a terminal, in a pipe, and beside a sidecar."""

import signal
import subprocess
import sys

import pytest

from esper_otel.cli import main
from esper_otel.leyline.otlp_file import framed
from esper_otel.top.screen import time_between
from report.made import frames, recorded
from sidecar.frames_made import otlp_of
from sidecar.running import sidecar
from testkit.patience import PATIENCE_S
from top.terminal import ESPER, Terminal

COLOURS = {str(number) for number in (*range(30, 38), *range(40, 48), *range(90, 98))}

RAISING = """
import sys
import esper_otel.top.screen as screen
from esper_otel.cli import main
drawn, draw = [], screen.picture
def picture(*arguments):
    drawn.append(1)
    if len(drawn) > 1:
        raise ZeroDivisionError("of ours")
    return draw(*arguments)
screen.picture = picture
sys.exit(main(["top", sys.argv[1]]))
"""


def loss(step):
    return 2.0 / (step + 1)


def curves(count, **more):
    return frames(count, loss=loss, gradient_norm=lambda step: 0.5, **more)


@pytest.fixture
def folder(tmp_path):
    recorded(tmp_path / "run-rank0.metrics.otlp", curves(50))
    recorded(tmp_path / "run-rank1.metrics.otlp", curves(50, rank=1))
    return tmp_path


def test_it_follows_a_recording_obeys_keys_and_a_new_size_and_ends(folder):
    with Terminal(folder) as terminal:
        terminal.until(
            lambda screen: "0 of 2  step 49" in screen.text and "quit" in screen.text
        )
        screen = terminal.screen
        assert screen.is_alternate
        assert not screen.cursor_is_shown
        assert screen.styles & COLOURS
        assert any("\u2801" <= char <= "\u28ff" for char in screen.text)
        more = otlp_of(*frames(5, first=50, loss=loss))
        with (folder / "run-rank0.metrics.otlp").open("ab") as file:
            file.write(framed(more.SerializeToString()))
        terminal.until(lambda screen: "rank 0 of 2  step 54" in screen.text)
        terminal.press("\x1b[B")
        terminal.until(lambda screen: "rank 1 of 2  step 49" in screen.text)
        terminal.press("l")
        terminal.until(lambda screen: "l log" in screen.text)
        terminal.press("a")
        terminal.until(lambda screen: "1 runs" in screen.text)
        terminal.press("a")
        for columns, rows in ((120, 40), (60, 16), (80, 24)):
            terminal.resize(columns, rows)
            terminal.until(lambda screen: "←→" in screen.lines[-1] and "rank 1" in screen.text)
        assert screen.unknown <= {"\x1b[K"}
        # Nobody is there who could stop it, so it goes on at once, with all of its picture.
        terminal.press("\x1a")
        terminal.until(lambda screen: screen.entered == 2 and "quit" in screen.text)
        assert "rank 1 of 2" in screen.lines[0]
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.is_as_before()


@pytest.mark.parametrize(
    ("ending", "status"), [("\x03", 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_whatever_ends_it_the_terminal_is_as_before_and_colours_may_be_unwanted(
    folder, ending, status
):
    with Terminal(folder, NO_COLOR="1") as terminal:
        terminal.until(lambda screen: "step 49" in screen.text and "quit" in screen.text)
        if isinstance(ending, str):
            terminal.press(ending)
        else:
            terminal.process.send_signal(ending)
        assert terminal.end() == status
        assert terminal.is_as_before()
        assert not terminal.screen.styles & COLOURS
        assert "Traceback" not in terminal.screen.text


@pytest.mark.parametrize(("used_s", "s"), [(0.001, 0.5), (0.025, 1.0), (1.0, 5.0)])
def test_what_takes_long_is_done_less_often(used_s, s):
    assert time_between(used_s) == s


def test_a_fault_of_ours_leaves_the_terminal_as_it_was(folder):
    command = [sys.executable, "-c", RAISING, str(folder)]
    with Terminal(command=command) as terminal:
        terminal.until(lambda screen: "step 49" in screen.text and "quit" in screen.text)
        terminal.press("l")
        assert terminal.end() == 1
        assert terminal.is_as_before()
        assert "ZeroDivisionError: of ours" in terminal.screen.text


def test_of_a_sidecar_it_shows_steps_and_decisions_as_they_come_and_that_it_is_gone(tmp_path):
    path = tmp_path / "t.sock"
    with sidecar(path, "--table", "prototype") as running, running.client() as client:
        client.hello(run="mine", mode="advise")
        client.ask(1, loss=2.0)
        with Terminal("mine", "--socket", path) as terminal:
            terminal.until(
                lambda screen: "mine  step 1  loss 2  advise  healthy" in screen.text
            )
            client.ask(2, loss=2.5, loss_delta=0.5, step_latency_ms=4.0, forward_ms=3.0)
            terminal.until(lambda screen: "2 PAUSE     loss_spike reported" in screen.text)
            assert "mine  step 2  loss 2.5  4 ms" in terminal.screen.lines[0]
            assert " forward" in terminal.screen.text
            running.process.terminate()
            running.process.wait()
            terminal.until(lambda screen: "no sidecar listens there" in screen.lines[-1])
            terminal.press("q")
            assert terminal.end() == 0


def test_in_a_pipe_it_prints_one_picture_and_ends(folder):
    done = subprocess.run(
        [*ESPER, "top", str(folder)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith(" run  rank 0 of 2  step 49")
    assert "⠀" in done.stdout
    assert "quit" not in done.stdout
    assert done.stderr == ""


def printed(capsys, *arguments):
    status = main(["top", *map(str, arguments)])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_once_prints_the_rank_and_the_run_that_are_meant(folder, capsys):
    recorded(folder / "old-rank0.metrics.otlp", frames(5, run="old", at_s=-99.0, loss=loss))
    assert " run  rank 1 of 2" in printed(capsys, folder, "--once", "--rank", 1)[1]
    status, out, _ = printed(capsys, folder, "--once", "--run", "old")
    assert (status, " old  step 4 " in out, "2 runs" in out) == (0, True, True)


def test_what_cannot_be_shown_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    socket = tmp_path / "none.sock"
    for arguments, said in (
        ([tmp_path / "nowhere"], f"{tmp_path}/nowhere: no such file or folder"),
        ([tmp_path], f"{tmp_path}: no step of a training run in it"),
        (
            ["--socket", socket],
            f"{socket}: no sidecar listens there; start one with `tamiyo serve`; or name a "
            "recording, or a run that `esper-otel runs` lists",
        ),
    ):
        status, out, err = printed(capsys, *arguments)
        assert (status, out, err) == (1, "", f"esper-otel: top: {said}\n")
    monkeypatch.setenv("ESPER_TAMIYO_SOCKET", str(socket))
    assert str(socket) in printed(capsys)[2]


def test_what_can_be_shown_of_a_damaged_recording_is_shown(folder, capsys):
    with (folder / "run-rank1.metrics.otlp").open("ab") as file:
        file.write(b"\xff\xff\xff\xff and more")
    status, out, err = printed(capsys, folder)
    assert (status, out.startswith(" run  rank 0 of 2")) == (1, True)
    assert err.startswith(f"esper-otel: top: {folder}/run-rank1.metrics.otlp: byte ")
    _, _, err = printed(capsys, folder, "--run", "other")
    assert "run other is not there, but run" in err.splitlines()[-1]


def test_without_the_library_one_line_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("TERM", raising=False)
    status, out, err = printed(capsys, folder)
    assert (status, out) == (1, "")
    assert err == (
        "esper-otel: top: needs rich to draw: pip install 'esper-otel[top]' "
        "(--once prints without it)\n"
    )
    assert printed(capsys, folder, "--once")[0] == 0
