"""What decisions hold is part of a checkpoint: the run's own state, and the frameworks'."""

import io
import json
from pathlib import Path

import msgspec
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, answer  # noqa: E402
from testkit.quiet_trainers import lightning_trainer, transformers_arguments  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another

STEPS = 6
HALVED = 2
"""The step whose answer halves the learning rate."""


def halves_once(ask):
    return answer(ask) if ask.step == HALVED else all_is_well(ask)


@pytest.fixture
def sidecar(tmp_path, monkeypatch):
    """A sidecar that halves the rate once, and is asked by whoever is started."""
    path = tmp_path / "s.sock"
    monkeypatch.setenv("ESPER_TAMIYO_SOCKET", str(path))
    monkeypatch.setenv("ESPER_TAMIYO_DEADLINE_MS", "5000")
    monkeypatch.chdir(tmp_path)
    with FakeSidecar(path, halves_once) as sidecar:
        yield sidecar


def rows():
    torch.manual_seed(0)
    x = torch.randn(8 * STEPS, 4)
    return TensorDataset(x, x.sum(1, keepdim=True))


def train(run, optimizer, model, steps):
    x, y = torch.ones(8, 4), torch.ones(8, 1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        run.report(loss=loss)
        optimizer.step()


def begun(captured, **settings):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return esper_otel.start(optimizer, **settings), optimizer, model


def test_a_run_goes_on_with_the_factor_that_was_in_force(captured, sidecar):
    run, optimizer, model = begun(captured, mode="enforce")
    train(run, optimizer, model, 5)
    assert run._responses.lr_scale == 0.5
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    run.close()
    again, optimizer, model = begun(captured, mode="enforce")
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    captured.frames.clear()
    train(again, optimizer, model, 2)
    assert [frame["lr_scale"] for frame in captured.frames] == [0.5, 0.5]
    assert [frame["step"] for frame in captured.frames] == [6, 7]
    assert "loss_delta" in captured.frames[0], "statistics go on as well"
    assert optimizer.param_groups[0]["lr"] == 0.01
    again.close()


def test_in_advise_a_factor_of_before_is_not_in_force(captured, sidecar):
    run, optimizer, model = begun(captured, mode="enforce")
    train(run, optimizer, model, 5)
    state = run.state_dict()
    run.close()
    again, optimizer, model = begun(captured, mode="advise")
    again.load_state_dict(state)
    captured.frames.clear()
    train(again, optimizer, model, 2)
    assert [frame["lr_scale"] for frame in captured.frames] == [1.0, 1.0]
    again.close()


WRONG = {
    "empty": ({}, "version None, expected 1"),
    "of another version": ({"version": 7}, "version 7, expected 1"),
    "no mapping": (["x"], "version None"),
    "half": ({"version": 1, "rate": {}}, "missing required field"),
}


@pytest.mark.parametrize(("state", "words"), WRONG.values(), ids=WRONG)
def test_what_is_no_state_is_refused_and_changes_nothing(captured, state, words):
    run, _, _ = begun(captured, mode="off")
    before = run.state_dict()
    with pytest.raises(ValueError, match=words):
        run.load_state_dict(state)
    assert repr(run.state_dict()) == repr(before)
    run.close()


class Lit:
    """A Lightning module, made when Lightning is there."""

    def __new__(cls):
        lightning = pytest.importorskip("lightning")

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(4, 1)

            def training_step(self, batch, _):
                x, y = batch
                return nn.functional.mse_loss(self.net(x), y)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.01)

        return Module()


def fit_lightning(epochs, folder, resume=None):
    pytest.importorskip("lightning")
    trainer = lightning_trainer(max_epochs=epochs)
    trainer.fit(Lit(), DataLoader(rows(), 8), ckpt_path=resume)
    path = folder / "lightning.ckpt"
    trainer.save_checkpoint(path)
    return path


def train_transformers(epochs, folder, resume=None):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    data = [{"x": x, "labels": y} for x, y in rows()]
    arguments = transformers_arguments(
        folder / "out", 8, num_train_epochs=epochs, save_strategy="epoch"
    )
    trainer = transformers.Trainer(Model(), arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return str(folder / "out" / f"checkpoint-{epochs * STEPS}")


def train_accelerate(epochs, folder, resume=None):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), 8))
    if resume is not None:
        accelerator.load_state(resume)
        epochs -= 1
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
    return accelerator.save_state(str(folder / "saved"))


FRAMEWORKS = {
    "lightning": fit_lightning,
    "transformers": train_transformers,
    "accelerate": train_accelerate,
}


@pytest.fixture
def instrumented():
    """Runs something in a process that is instrumented from outside, as often as wanted."""

    def run(mode, work, *args):
        TorchInstrumentor().instrument(skip_dep_check=True, mode=mode)
        try:
            return work(*args)
        finally:
            TorchInstrumentor().uninstrument()

    return run


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_frameworks_checkpoint_brings_the_factor_back(
    captured, sidecar, instrumented, tmp_path, framework
):
    train = FRAMEWORKS[framework]
    saved = instrumented("enforce", train, 1, tmp_path)
    assert captured.frames[-1]["lr_scale"] == 0.5
    captured.frames.clear()
    instrumented("enforce", train, 2, tmp_path, saved)
    assert [frame["lr_scale"] for frame in captured.frames] == [0.5] * STEPS
    steps = [frame["step"] for frame in captured.frames]
    assert steps == list(range(STEPS + 1, 2 * STEPS + 1))


def left_in(framework, saved):
    """Whether a checkpoint has anything of ours."""
    if framework == "lightning":
        kept = torch.load(saved, weights_only=False)["callbacks"]
        return any("Esper" in name for name in kept)
    if framework == "transformers":
        state = json.loads((Path(saved) / "trainer_state.json").read_text())
        return "EsperCallback" in state["stateful_callbacks"]
    return any("esper" in path.name for path in Path(saved).iterdir())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_in_advise_checkpoints_are_the_frameworks_own(
    captured, sidecar, instrumented, tmp_path, framework
):
    saved = instrumented("advise", FRAMEWORKS[framework], 1, tmp_path)
    assert not left_in(framework, saved)


def test_a_damaged_file_beside_accelerates_is_reported_and_the_training_goes_on(
    captured, sidecar, instrumented, tmp_path, caplog
):
    saved = instrumented("enforce", train_accelerate, 1, tmp_path)
    (file,) = Path(saved).glob("esper_otel_*.msgpack")
    assert msgspec.msgpack.decode(file.read_bytes())["rate"]["factor"] == 0.5
    file.write_bytes(b"\xc1")
    captured.frames.clear()
    instrumented("enforce", train_accelerate, 2, tmp_path, saved)
    assert captured.frames[0]["lr_scale"] == 1.0
    assert "is not used" in caplog.text
