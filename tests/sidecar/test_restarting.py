"""A real sidecar that is killed and started again: it goes on as if it had not been."""

import json
import os
import random
import signal
import subprocess
from contextlib import contextmanager

import psutil

from esper_otel.leyline.wire import SilenceRequest
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import load
from sidecar.frames_made import frame
from sidecar.running import PATIENCE_S, TAMIYO, is_alive, sidecar, tamiyo, until

TABLE = """
version: t
baseline: {window: 8, warmup: 4}
record: {window: 8, warmup: 8, false_alarm_steps: 100}
conservative: {clean_steps: 12}
rules:
  - {id: spike, metric: loss, above_baseline: 2, for: 2, cooldown: 4, severity: HIGH,
     action: PAUSE, conservative: true}
  - {id: far, metric: gradient_norm, above_record: 1, severity: HIGH, action: OPTIMIZER,
     parameters: {usual_norm: true}}
  - {id: same, metric: optimizer_lr, unchanged_for: 9, severity: WARNING, action: OPTIMIZER}
"""


def script(steps=60):
    """Values of a run that falls into one trouble after the other."""
    chance = random.Random(7)
    for step in range(steps):
        trouble = step % 20 > 15
        yield (
            step,
            {
                "loss": 1.0 + chance.random() / 10 + 3.0 * trouble,
                "gradient_norm": chance.random() + 20.0 * (step % 17 == 0),
                "optimizer_lr": 0.1 + step // 15 / 100,
            },
        )


def kept_so_far(running):
    """How state is kept, when all that was judged has been handed over."""
    state = running.status()["state"]
    return state if state.get("waiting", 0) == 0 else None


def kill(running):
    until(lambda: kept_so_far(running) is not None)
    running.process.kill()
    running.process.wait(PATIENCE_S)


def killed_at(path, places, *options):
    """The decisions of a run whose sidecar is killed at ``places``, and the last report."""
    values, decided = list(script()), []
    for begin, end in zip([0, *places], [*places, len(values)], strict=True):
        with sidecar(path, *options) as running:
            with running.client() as client:
                client.hello(mode="enforce")
                decided += [client.ask(step, **given) for step, given in values[begin:end]]
            report = running.status()
            if end < len(values):
                kill(running)
    return decided, report


def test_decisions_are_those_of_a_run_left_alone(tmp_path):
    (tmp_path / "t.yaml").write_text(TABLE)
    options = ("--table", tmp_path / "t.yaml", "--journal", tmp_path / "j")
    decided, report = killed_at(tmp_path / "t.sock", [17, 39], *options)
    engine = Engine(load(str(tmp_path / "t.yaml")))
    expected = [engine.observe(frame(step, nonfinite=0.0, **given)) for step, given in script()]
    assert {decision.reason for decision in expected} >= {"spike", "far", "same", "nominal"}
    assert decided == expected
    restored = report["state"]["restored"]
    assert (restored["ranks"], restored["problem"]) == (1, "")
    assert report["engine"]["frames"]["judged"] == 60 - 39
    lines = tamiyo("journal", "--journal", tmp_path / "j", "--json").stdout.splitlines()
    told = [entry for entry in map(json.loads, lines) if entry["kind"] == "restored"]
    assert [entry["ranks"] for entry in told] == [1, 1]
    shown = tamiyo("journal", "--journal", tmp_path / "j").stdout
    assert "1 ranks continue from a step" in shown


def test_silences_outlive_a_restart_and_status_says_what_was_restored(tmp_path):
    (tmp_path / "t.yaml").write_text(TABLE)
    table = ("--table", tmp_path / "t.yaml")
    with sidecar(tmp_path / "t.sock", *table) as running:
        with running.client() as client:
            client.hello()
            client.ask(0, loss=1.0)
            client.call(SilenceRequest("run", "spike"))
        kill(running)
    with sidecar(tmp_path / "t.sock", *table) as running:
        shown = tamiyo("status", "--socket", running.socket).stdout
        silences = running.status()["engine"]["silences"]
    assert silences == [{"run": "run", "rule": "spike", "until_step": None}]
    assert "restored 1 ranks" in shown


def test_without_state_a_restart_forgets(tmp_path):
    with sidecar(tmp_path / "t.sock", "--no-state", "--no-journal") as running:
        with running.client() as client:
            client.hello()
            client.ask(0, loss=1.0)
        assert running.status()["state"] == {}
    assert [path.name for path in tmp_path.iterdir()] == []


def test_the_writer_is_started_again_and_saves_all_ranks_anew(tmp_path):
    with sidecar(tmp_path / "t.sock", is_forked=False) as running:
        with running.client() as client:
            client.hello()
            client.ask(0, loss=1.0)
        state = until(lambda: kept_so_far(running))
        writer = next(
            child.pid
            for child in psutil.Process(running.process.pid).children()
            if "esper_tamiyo.keeping.writer" in child.cmdline()
        )
        os.kill(writer, signal.SIGKILL)
        until(lambda: running.status()["state"]["restarts"] == 1)
        until(lambda: running.status()["state"]["error"] == "")
        until(lambda: running.status()["state"]["written_at"])
        assert not is_alive(writer)
        kill(running)
    with sidecar(tmp_path / "t.sock") as running:
        assert running.status()["state"]["restored"]["ranks"] == 1
        assert state["folder"] == str(tmp_path / "t.state")


@contextmanager
def broken(path):
    text = path.read_text()
    path.write_text("rules: nonsense\n")
    yield
    path.write_text(text)


def test_a_broken_table_at_a_restart_leaves_the_last_good_one(tmp_path):
    table = tmp_path / "t.yaml"
    table.write_text(TABLE)
    with sidecar(tmp_path / "t.sock", "--table", table) as running:
        good = running.words["table"]
        with running.client() as client:
            client.hello()
            client.ask(0, loss=1.0)
        kill(running)
    with broken(table), sidecar(tmp_path / "t.sock", "--table", table) as running:
        assert running.words["table"] == good
        assert "rules" in running.status()["table"]["last_error"]
        status = tamiyo("status", "--socket", running.socket)
        assert status.returncode == 3
        assert running.status()["state"]["restored"]["ranks"] == 1
    shown = tamiyo("journal", "--socket", tmp_path / "t.sock").stdout
    assert "the table in use stays, its file cannot be used" in shown


def test_a_broken_table_at_a_first_start_ends_it(tmp_path):
    (tmp_path / "t.yaml").write_text("rules: nonsense\n")
    done = subprocess.run(
        [
            *(TAMIYO, "serve", "--no-ingest", "--socket", tmp_path / "t.sock"),
            *("--table", tmp_path / "t.yaml"),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert "the table cannot be used" in done.stderr


def test_damaged_state_is_told_and_left_aside(tmp_path):
    segment = tmp_path / "t.state" / "state-000001.log"
    segment.parent.mkdir()
    segment.write_bytes(b"x" * 50)
    with sidecar(tmp_path / "t.sock") as running:
        problem = running.status()["state"]["restored"]["problem"]
        assert "set aside as" in problem
        shown = tamiyo("status", "--socket", running.socket).stdout
        assert "nothing restored" in shown
        with running.client() as client:
            client.hello()
            assert client.ask(0, loss=1.0).findings == []
    assert segment.with_name(segment.name + ".unusable").read_bytes() == b"x" * 50
