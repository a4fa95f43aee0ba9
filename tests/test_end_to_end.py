"""A real training process, a real sidecar and real sockets between them."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from esper_otel.stream import read_frames
from sidecar.running import is_alive, sidecar, until
from testkit.fork_server import fork_server
from testkit.patience import PATIENCE_S
from testkit.receiver import HttpReceiver

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "examples" / "digits.py")
ESPER = str(Path(sys.executable).with_name("esper-otel"))

NAN_SCRIPT = """
import math, torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(40):
    loss = model(torch.ones(4, 2)).square().mean()
    (loss * math.nan if step == 25 else loss).backward()
    if step == 25:
        optimizer.zero_grad()
    else:
        optimizer.step()
    if step == 25:
        optimizer.step()
    optimizer.zero_grad()
"""

FORKING_SCRIPT = """
import torch
from torch.utils.data import DataLoader, TensorDataset
data = DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=8, num_workers=2)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
if __name__ == "__main__":  # Python 3.14 starts workers anew, and they import this
    for epoch in range(2):
        for (x,) in data:
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
"""


def environment(tmp_path, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    # More threads than free cores wait for one another, and a busy machine has none free.
    ours = {"ESPER_SPOOL_DIR": str(tmp_path / "spool"), "OMP_NUM_THREADS": "1"}
    # What is decided is looked at here, not how soon: a busy machine may be late.
    ours["ESPER_TAMIYO_DEADLINE_MS"] = "2000"
    ours["ESPER_SUMMARY"] = "off"
    return clean | ours | more


def run(command, env):
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done


def run_forked(command, env, **options):
    """For what is not about how the process starts: torch is there already."""
    done = fork_server().run(command, env=env, **options)
    assert done.returncode == 0, done.stderr
    return done


def test_the_whole_way(tmp_path):
    """Script → recorder → socket and stream → sidecar, and both copies are one frame."""
    with sidecar(tmp_path / "s.sock", ingest=True) as tamiyo:
        env = environment(
            tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{tamiyo.words['otlp_http']}"
        )
        command = [ESPER, "run", "--socket", str(tmp_path / "s.sock"), "--run-id", "whole"]
        command += ["--record", str(tmp_path), DIGITS, "--no-accident", "--epochs", "4"]
        done = run_forked(command, env)
        frames = list(read_frames(tmp_path / "whole-rank0.metrics.otlp"))
        steps = [frame.step for frame in frames]
        status = until(
            lambda: (s := tamiyo.status())["engine"]["frames"]["duplicate"] >= len(steps) and s
        )
    assert re.fullmatch(r"test accuracy 0\.\d+\n", done.stdout)
    assert done.stderr == ""
    assert steps == list(range(1, 4 * 22 + 1))
    counts = status["engine"]["frames"]
    assert counts["judged"] == counts["duplicate"] == len(steps)
    assert counts["late"] == counts["bad"] == 0
    last = frames[-1].values
    assert last.keys() >= {
        *("loss", "gradient_norm", "samples_per_s", "hook_latency_ms", "tamiyo_latency_ms"),
        *("step_latency_ms", "kasmina.apply_ms", "kasmina.finalize_ms", "loss_delta"),
        *("optimizer_lr", "forward_ms", "backward_ms", "optimizer_ms", "input_wait_ms"),
    }
    assert last["tamiyo_latency_ms"] > 0
    assert ("h2d_copy_ms" in last) == torch.cuda.is_available()


def test_training_is_bit_identical_with_everything_on(tmp_path):
    bare, watched = tmp_path / "bare.pt", tmp_path / "watched.pt"
    arguments = [DIGITS, "--no-accident", "--epochs", "3", "--save"]
    run_forked([sys.executable, *arguments, str(bare)], environment(tmp_path))
    with sidecar(tmp_path / "s.sock", ingest=True) as tamiyo:
        env = environment(
            tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{tamiyo.words['otlp_http']}"
        )
        socket = str(tmp_path / "s.sock")
        command = [ESPER, "run", "--enforce", "--socket", socket, *arguments, str(watched)]
        run_forked(command, env)
        assert tamiyo.status()["engine"]["frames"]["judged"] == 66
    one, other = torch.load(bare), torch.load(watched)
    assert one["losses"] == other["losses"]
    assert all(torch.equal(one["weights"][k], other["weights"][k]) for k in one["weights"])


def test_with_nobody_there_the_run_is_undisturbed_and_its_telemetry_can_be_sent_later(tmp_path):
    with HttpReceiver() as receiver:
        endpoint = receiver.url
    env = environment(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    command = [ESPER, "run", "--socket", str(tmp_path / "none.sock"), "--run-id", "alone"]
    done = run_forked([*command, DIGITS, "--no-accident", "--epochs", "2"], env)
    assert re.fullmatch(r"test accuracy 0\.\d+\n", done.stdout)
    warnings = done.stderr.splitlines()
    assert len(warnings) == 3, done.stderr
    assert sum("telemetry cannot be delivered" in line for line in warnings) == 1
    assert sum("Tamiyo is unreachable" in line for line in warnings) == 1
    left = sorted((tmp_path / "spool").iterdir())
    assert all(str(path) in done.stderr for path in left)
    metrics = next(path for path in left if path.name.endswith(".metrics.otlp"))
    assert [frame.step for frame in read_frames(metrics)] == list(range(1, 45))
    with HttpReceiver() as receiver:
        env["OTEL_EXPORTER_OTLP_ENDPOINT"] = receiver.url
        done = run([ESPER, "resend", *map(str, left)], env)
        assert receiver.inbox.steps() == Counter(range(1, 45))
    assert "0 kept" in done.stdout
    assert not any(path.exists() for path in left)


def test_nan_is_counted_and_reaches_tamiyo(tmp_path):
    script = tmp_path / "nan.py"
    script.write_text(NAN_SCRIPT)
    with sidecar(tmp_path / "s.sock") as tamiyo:
        env = environment(tmp_path, OTEL_METRICS_EXPORTER="none", OTEL_TRACES_EXPORTER="none")
        socket = ["--socket", str(tmp_path / "s.sock")]
        run_forked([ESPER, "run", *socket, "--record", str(tmp_path), str(script)], env)
        until(lambda: tamiyo.status()["engine"]["states"] == {"finished": 1})
        (told,) = tamiyo.status()["engine"]["runs"]
        actions = tamiyo.status()["answers"]
        with tamiyo.client() as client:
            newest = client.latest()
    (recording,) = tmp_path.glob("*.metrics.otlp")
    counts = {frame.step: frame.values["nonfinite"] for frame in read_frames(recording)}
    assert [step for step, count in counts.items() if count] == [26]
    assert actions["PAUSE"] == 1
    assert newest.conservative is True
    assert told["conservative"] is False  # the run is over


def test_workers_of_a_data_loader_emit_nothing(tmp_path):
    script = tmp_path / "forking.py"
    script.write_text(FORKING_SCRIPT)
    with HttpReceiver() as receiver:
        env = environment(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        command = [ESPER, "run", "--mode", "off", "--record", str(tmp_path), str(script)]
        run_forked(command, env)
        assert receiver.inbox.steps() == Counter(range(1, 17))
    (recording,) = tmp_path.glob("*.metrics.otlp")
    assert [frame.step for frame in read_frames(recording)] == list(range(1, 17))


def test_the_standard_command_instruments_too(tmp_path):
    script = tmp_path / "forking.py"
    script.write_text(FORKING_SCRIPT)
    with HttpReceiver() as receiver:
        env = environment(
            tmp_path,
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
            OTEL_TRACES_EXPORTER="none",
            OTEL_METRICS_EXPORTER="otlp",
            OTEL_LOGS_EXPORTER="none",
            OTEL_PYTHON_CONFIGURATOR="",
            ESPER_MODE="off",
        )
        instrument = str(Path(sys.executable).with_name("opentelemetry-instrument"))
        run_forked([instrument, sys.executable, str(script)], env)
        assert receiver.inbox.steps() == Counter(range(1, 17))


def test_the_growing_example_grows(tmp_path):
    env = environment(tmp_path, OTEL_METRICS_EXPORTER="none", OTEL_TRACES_EXPORTER="none")
    env |= {"OTEL_LOGS_EXPORTER": "none", "ESPER_MODE": "off"}
    env |= {"ESPER_RECORDING_DIR": str(tmp_path), "ESPER_RUN_ID": "grow"}
    command = [sys.executable, "-m", "examples.grow", "--epochs", "33"]
    done = run_forked(command, env, cwd=ROOT)
    assert "FOSSILIZED" in done.stdout
    frames = list(read_frames(tmp_path / "grow-rank0.metrics.otlp"))
    stages = [
        frame.seeds["features.2-1"]["kasmina.seed.stage"]
        for frame in frames
        if "features.2-1" in frame.seeds
    ]
    assert stages == sorted(stages), "a seed's life goes one way"
    assert set(stages) >= {3, 4, 5, 6, 7}
    assert {frame.values["kasmina.seeds_live"] for frame in frames} >= {0, 1}


def children_of(pid):
    """Processes below ``pid``, at any depth."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it may end meanwhile
            for child in map(int, children.read_text().split()):
                found += [child, *children_of(child)]
    return found


def kill(*pids):
    for pid in filter(is_alive, pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


FORKS = """
import subprocess
PREFIX = {prefix}
class Forked(subprocess.Popen):
    def __init__(self, args, *more, **options):
        super().__init__([*PREFIX, *args] if "run" in args else args, *more, **options)
subprocess.Popen = Forked
"""
"""A ``sitecustomize`` by which the trainings that a process starts are forks."""


@contextmanager
def demo(tmp_path, *arguments, path=(), **options):
    """The demo. However a test of it goes, nothing that it started is left behind."""
    with subprocess.Popen(
        [sys.executable, "-m", "examples.demo", *arguments],
        cwd=tmp_path,
        env=environment(tmp_path, PYTHONPATH=os.pathsep.join(map(str, [*path, ROOT]))),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                kill(process.pid, *children_of(process.pid))


@pytest.mark.timeout(1000)  # it trains for a minute of two processors that it has to itself
def test_the_demo_runs_and_tells_what_was_decided(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FORKS.format(prefix=fork_server().prefix))
    epochs = "--epochs", "6", "--growing-epochs", "40"
    with demo(tmp_path, *epochs, path=[site]) as process:
        output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert "multiplied the learning rate by 50 at step 45" in output
    assert "learning_rate_leap" in output
    recordings = [path.name for path in (tmp_path / "recordings").glob("*/*.metrics.otlp")]
    assert sorted(recordings) == [
        "digits-advise-rank0.metrics.otlp",
        "digits-enforce-rank0.metrics.otlp",
        "grow-rank0.metrics.otlp",
    ]
    assert re.search(r"became part of it: [1-9]", output), output


def test_ctrl_c_ends_the_demo_and_all_it_started(tmp_path):
    with demo(tmp_path, "--epochs", "600", start_new_session=True) as process:
        until(lambda: list((tmp_path / "recordings").glob("*/*.metrics.otlp")))
        started = children_of(process.pid)
        try:
            assert len(started) >= 3, "sidecar, its receiver and the trainer"
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 130
            assert "Traceback" not in output
            until(lambda: not any(map(is_alive, started)))
        finally:
            kill(*started)
