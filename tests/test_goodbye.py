"""How a run ends, from the script to Tamiyo: real processes, a real sidecar, no torch."""

import os
import subprocess
import sys

import pytest

import esper_otel
from esper_otel.goodbye import leave_exits, watch_exits
from esper_otel.leyline.endings import HowEnded, RunEnd, end_by, end_by_status, run_end
from sidecar.running import sidecar, until
from sidecar.running import tamiyo as command
from testkit.patience import PATIENCE_S


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "done"),
        (ValueError("x"), "exception ValueError"),
        (subprocess.TimeoutExpired("x", 1), "exception subprocess.TimeoutExpired"),
        (KeyboardInterrupt(), "interrupted KeyboardInterrupt"),
        (SystemExit(), "done"),
        (SystemExit(0), "done"),
        (SystemExit(1), "exception SystemExit"),
        (SystemExit("no data"), "exception SystemExit"),
        (SystemExit(130), "interrupted SystemExit"),
        (SystemExit(143), "interrupted SystemExit"),
        (type("Told", (SystemExit,), {"__module__": "builtins"})(), "interrupted Told"),
        (GeneratorExit(), "interrupted GeneratorExit"),
    ],
)
def test_what_is_said_of_what_was_raised(error, words):
    assert str(end_by(error)) == words


def test_names_of_types_are_bounded_and_ways_to_end_are_those_known():
    assert len(end_by(type("X" * 1000, (Exception,), {})()).exception) == 256
    assert run_end("done", "x" * 1000) == RunEnd(HowEnded.DONE, "x" * 256)
    assert run_end("exploded") is None
    assert end_by_status(True).how is HowEnded.EXCEPTION


def test_sys_exit_is_left_as_it_was():
    leave_exits()  # of a run that another test left open
    before = sys.exit
    watch_exits()
    watch_exits()
    assert sys.exit is not before
    with pytest.raises(SystemExit) as raised:
        sys.exit(3)
    assert raised.value.code == 3
    with pytest.raises(SystemExit) as raised:
        sys.exit()
    assert raised.value.code is None
    leave_exits()
    leave_exits()
    assert sys.exit is before


def test_sys_exit_is_left_to_who_has_taken_it_since(monkeypatch):
    watch_exits()
    ours = sys.exit
    monkeypatch.setattr(sys, "exit", lambda *_: None)
    theirs = sys.exit
    leave_exits()
    assert sys.exit is theirs
    monkeypatch.setattr(sys, "exit", ours)
    leave_exits()
    assert sys.exit is not ours


HEAD = """
import os, signal, sys, esper_otel
run = esper_otel.start()
def train(steps=3):
    for _ in range(steps):
        run.report(loss=1.0)
        run.step()
train()
"""

SCRIPTS = {
    "closes its run": ("run.close()", "done"),
    "just ends": ("", "done"),
    "raises": ("raise ValueError", "exception ValueError"),
    "raises through a finally": (
        "try:\n    raise KeyError\nfinally:\n    run.close()",
        "exception KeyError",
    ),
    "says what it has caught": (
        "try:\n    raise KeyError\nexcept KeyError as error:\n    caught = error\n"
        "run.close(error=caught)",
        "exception KeyError",
    ),
    "has caught something": ("try:\n    raise KeyError\nexcept KeyError:\n    pass", "done"),
    "exits with a status": ("sys.exit(3)", "exception SystemExit"),
    "exits well": ("sys.exit()", "done"),
    "goes on after an exit that was caught": (
        "try:\n    sys.exit(3)\nexcept SystemExit:\n    train()",
        "done",
    ),
    "is interrupted": (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.raise_signal(signal.SIGINT)",
        "interrupted KeyboardInterrupt",
    ),
    "handles SIGTERM": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "os.kill(os.getpid(), signal.SIGTERM)",
        "interrupted SystemExit",
    ),
    "is in a with": ("with run:\n    train()\n    raise OSError", "exception OSError"),
    "ends in a child as well": (
        "if not os.fork():\n    run.close(error=ValueError())\n    sys.exit(1)\nos.wait()",
        "done",
    ),
}
SILENT = {
    "leaves by os._exit": "os._exit(0)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "is told to end": "os.kill(os.getpid(), signal.SIGTERM)",
    "ends in a child only": (
        "if not os.fork():\n    run.close()\n    sys.exit(0)\nos.wait()\nos._exit(0)"
    ),
}


@pytest.fixture(scope="module")
def tamiyo(tmp_path_factory):
    """One sidecar for all: each script is a run of its own."""
    with sidecar(tmp_path_factory.mktemp("t") / "t.sock", ingest=True) as running:
        yield running


def play(tamiyo, tmp_path, name, script, way):
    """Run a script that reaches Tamiyo by its socket alone, or by the stream alone."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    env |= {
        "ESPER_RUN_ID": f"{name}, {way}",
        "ESPER_SPOOL_DIR": str(tmp_path),
        "ESPER_SUMMARY": "off",
        "ESPER_TAMIYO_DEADLINE_MS": "5000",
        "ESPER_TAMIYO_SOCKET": str(tamiyo.socket),
    }
    if way == "socket":
        env |= {f"OTEL_{signal}_EXPORTER": "none" for signal in ("METRICS", "TRACES", "LOGS")}
    else:
        env |= {
            "ESPER_MODE": "off",
            "OTEL_TRACES_EXPORTER": "none",  # of a slow step: nobody takes them
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": (
                f"http://{tamiyo.words['otlp_http']}/v1/metrics"
            ),
        }
    path = tmp_path / "script.py"
    path.write_text(HEAD + script)
    return subprocess.run(
        [sys.executable, str(path)], env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )


def seen(tamiyo, name, way):
    """What Tamiyo says of a run; None when it does not name it."""
    runs = tamiyo.status()["engine"]["runs"]
    return next((run for run in runs if run["run"] == f"{name}, {way}"), None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_tamiyo_knows_how_a_script_ended(tamiyo, tmp_path, name):
    script, ended = SCRIPTS[name]
    # One end after the other, as Tamiyo has details of the newest only.
    for way in ("socket", "stream") if name in ("just ends", "raises") else ("stream",):
        done = play(tamiyo, tmp_path, name, script, way)
        found = until(
            lambda way=way: (run := seen(tamiyo, name, way)) and "ended" in run and run
        )
        assert found["ended"] == ended, done.stderr
        assert found["newest_step"] in (3, 6)
        assert "esper-otel: " not in done.stderr


@pytest.mark.parametrize("name", SILENT)
def test_what_could_not_say_it_is_not_taken_to_have_ended(tamiyo, tmp_path, name):
    before = dict(tamiyo.status()["ends"])
    play(tamiyo, tmp_path, name, SILENT[name], "socket")
    found = seen(tamiyo, name, "socket")
    assert (found["newest_step"], found["state"]) == (3, "healthy")
    assert tamiyo.status()["ends"] == before


def test_people_are_shown_who_has_ended(tamiyo, tmp_path):
    play(tamiyo, tmp_path, "shown", "raise ValueError", "socket")
    until(lambda: (run := seen(tamiyo, "shown", "socket")) and "ended" in run)
    at = ("--socket", tamiyo.socket)
    status = command("status", *at).stdout
    assert (
        "shown, socket/0: step 3, CONTINUE (warming_up); failed: exception ValueError" in status
    )
    assert "failed " in next(line for line in status.splitlines() if "ranks: " in line)
    written = until(lambda: command("journal", "--run", "shown, socket", *at).stdout)
    assert "/0/3  run ended: exception ValueError; 3 steps seen, 0 decisions" in written


def test_a_run_without_a_step_says_nothing(tmp_path):
    run = esper_otel.start(mode="off", recording_dir=str(tmp_path), summary="off")
    run.close()
    assert list(tmp_path.glob("*.metrics.otlp")) == []
