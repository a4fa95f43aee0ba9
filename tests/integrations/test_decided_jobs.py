"""Decisions about one training change no other."""

import sys

import pytest

torch = pytest.importorskip("torch")

from msgspec import structs  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.leyline import wire  # noqa: E402
from integrations.trainings import Training, all_steps, whole  # noqa: E402
from sidecar.running import sidecar  # noqa: E402
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, answer, decision_about  # noqa: E402
from testkit.fork_server import fork_server  # noqa: E402


@pytest.fixture
def asked(tmp_path, streams, monkeypatch):
    """Instruments in enforce; yields the sidecar that is asked."""
    with FakeSidecar(tmp_path / "s.sock", all_is_well) as sidecar:
        monkeypatch.setenv("ESPER_MODE", "enforce")
        monkeypatch.setenv("ESPER_TAMIYO_SOCKET", str(tmp_path / "s.sock"))
        monkeypatch.setenv("ESPER_TAMIYO_DEADLINE_MS", "5000")
        monkeypatch.setenv("ESPER_RELEASE_STEPS", "100000")
        TorchInstrumentor().instrument(skip_dep_check=True)
        yield sidecar
        TorchInstrumentor().uninstrument()


def cut_job_at(step):
    """The first run is told to cut its rate at ``step``, no other is."""

    def reply(ask, hello):
        if hello.run != "job" or ask.step != step:
            return all_is_well(ask)
        cut = structs.replace(decision_about(ask), parameters={"lr_scale": 0.25})
        return [wire.encode(wire.Answer(ask.request_id, cut))]

    return reply


def test_each_training_asks_for_itself_about_every_step(asked, streams):
    trainings = [Training(), Training()]
    for _ in range(3):
        for training in trainings:
            training.train(20)
    told = all_steps(streams)
    assert told == {"job": whole(60), "job-2": whole(60)}
    assert [hello.run for hello in asked.hellos] == ["job", "job-2"]
    assert len({hello.instance for hello in asked.hellos}) == 2
    assert {name: [ask.step for ask in asks] for name, asks in asked.asks_of.items()} == told


def test_a_cut_of_one_training_never_scales_another(asked, streams):
    asked.reply_to_run = cut_job_at(5)
    trainings = [Training(), Training()]
    for _ in range(2):
        for training in trainings:
            training.train(20)
    all_steps(streams)
    assert [frame["lr_scale"] for frame in streams.frames("job")] == [1.0] * 5 + [0.25] * 35
    assert {frame["lr_scale"] for frame in streams.frames("job-2")} == {1.0}
    assert {frame["optimizer_lr"] for frame in streams.frames("job-2")} == {0.01}


def test_an_optimizer_of_a_closed_run_is_not_scaled_by_another_run(
    tmp_path, streams, monkeypatch
):
    first, second = Training(), Training()
    used = []

    class Seen(torch.optim.SGD):
        def step(self, closure=None):
            used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    first.optimizer = Seen(first.model.parameters(), lr=0.5)
    options = {
        "mode": "enforce",
        "tamiyo_socket": str(tmp_path / "s.sock"),
        "tamiyo_deadline_ms": 5000.0,
        "release_steps": 100_000,
    }
    with FakeSidecar(tmp_path / "s.sock", all_is_well) as fake:
        run = esper_otel.start(first.optimizer, **options)
        first.train(3)
        run.close()
        fake.reply = answer  # which cuts at every step
        other = esper_otel.start(second.optimizer, **options)
        second.train(3)
        first.train(3)
        other.close()
    assert used == [0.5] * 6


SWEEP = """
import sys, torch
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
data = torch.randn(256, 16)
labels = (data @ torch.randn(16, 4)).argmax(1)
for rate in (0.05, 0.1, 0.2):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for epoch in range(12):
        for i in torch.randperm(256).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[i]), labels[i]).backward()
            optimizer.step()
    print([p.double().sum().item().hex() for p in model.parameters()])
"""


def test_a_sweep_under_the_default_table_is_left_alone(tmp_path):
    from test_end_to_end import ESPER, environment

    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    bare = fork_server().run([sys.executable, script])
    env = environment(tmp_path, ESPER_SUMMARY="text", OTEL_SDK_DISABLED="false")
    env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    with sidecar(tmp_path / "s.sock") as tamiyo:
        command = [ESPER, "run", "--enforce", "--socket", str(tmp_path / "s.sock")]
        done = fork_server().run([*command, "--run-id", "sweep", str(script)], env=env)
        with tamiyo.client() as client:
            report = client.status()
    assert done.returncode == 0, done.stderr
    assert done.stdout == bare.stdout
    told = done.stderr
    assert "run sweep, 3 trainings, 576 steps" in told
    for name in ("sweep", "sweep-2", "sweep-3"):
        assert f"training  {name}: 192 steps, loss" in told
    assert "OPTIMIZER" not in told
    assert "PAUSE" not in told
    assert "sweep-3" in str(report)
