"""What every way in owes, from real training loops of the frameworks themselves.

One table: each way in is run for a while, and has to deliver the same metrics and spans
for the same number of steps. A metric that goes dark in one of them fails here by name.
"""

import logging
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.integrations.training import require  # noqa: E402
from esper_otel.settings import SettingsError  # noqa: E402

METRICS = {
    "step",
    "loss",
    "gradient_norm",
    "samples_per_s",
    "hook_latency_ms",
    "tamiyo_latency_ms",
    "step_latency_ms",
    "forward_ms",
    "backward_ms",
    "optimizer_ms",
    "input_wait_ms",
    "kasmina.apply_ms",
    "kasmina.finalize_ms",
    "loss_delta",
    "loss_ewma",
    "loss_volatility",
    "grad_norm_ewma",
    "grad_var",
    "optimizer_lr",
    "optimizer_momentum",
    "nonfinite",
}
SPANS = {
    "train.input_wait",
    "train.forward",
    "train.backward",
    "train.optimizer",
}
PHASES = ("input_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "hook_latency_ms")
ROWS, BATCH = 64, 8

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another


def dataset():
    x = torch.linspace(-1, 1, ROWS * 4).reshape(ROWS, 4)
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader():
    return DataLoader(dataset(), batch_size=BATCH)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))


def plain(accumulate=1, watch=None):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for i, (x, y) in enumerate(loader()):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def lightning(accumulate=1, watch=None):
    pl = pytest.importorskip("lightning.pytorch")
    losses = []

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, index):
            x, y = batch
            loss = nn.functional.mse_loss(self.network(x), y)
            losses.append(loss.item())
            return loss

        def validation_step(self, batch, index):
            pass

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    callbacks = []
    if watch:
        from esper_otel.integrations.lightning import EsperCallback

        callbacks = [EsperCallback()]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        val_check_interval=4,
        callbacks=callbacks,
    )
    trainer.fit(Module(), loader(), loader())
    return losses


def transformers(accumulate=1, watch=None, tmp_path="."):
    hf = pytest.importorskip("transformers")
    losses = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x=None, labels=None):
            loss = nn.functional.mse_loss(self.network(x), labels)
            losses.append(loss.item())
            return {"loss": loss}

    callbacks = []
    if watch:
        from esper_otel.integrations.transformers import EsperCallback

        callbacks = [EsperCallback()]
    data = [{"x": x, "labels": y} for x, y in dataset()]
    trainer = hf.Trainer(
        model=Model(),
        args=hf.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            learning_rate=1e-3,
            max_grad_norm=0,
        ),
        train_dataset=data,
        callbacks=callbacks,
    )
    trainer.train()
    return losses


def accelerate(accumulate=1, watch=None):
    hf = pytest.importorskip("accelerate")
    trackers = []
    if watch:
        from esper_otel.integrations.accelerate import EsperTracker

        trackers = [EsperTracker()]
    accelerator = hf.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, log_with=trackers
    )
    accelerator.init_trackers("test")
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    losses = []
    for x, y in batches:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    return losses


FRAMEWORKS = {
    "plain": plain,
    "lightning": lightning,
    "transformers": transformers,
    "accelerate": accelerate,
}


@pytest.fixture
def way(captured, request, tmp_path, monkeypatch):
    """Runs a framework's loop in one of the two ways in; gives what it computed."""
    monkeypatch.setenv("ESPER_SPAN_EVERY", "1")
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")

    def run(framework, automatic, **options):
        if not automatic:
            return FRAMEWORKS[framework](watch=True, **options)
        TorchInstrumentor().instrument(skip_dep_check=True)
        try:
            return FRAMEWORKS[framework](**options)
        finally:
            TorchInstrumentor().uninstrument()

    return run


WAYS = [(name, True) for name in FRAMEWORKS] + [
    (name, False) for name in FRAMEWORKS if name != "plain"
]


@pytest.mark.parametrize(("framework", "automatic"), WAYS)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_way_in_delivers_what_it_owes(captured, way, framework, automatic, accumulate):
    losses = way(framework, automatic, accumulate=accumulate)
    steps = ROWS // BATCH // accumulate
    frames = captured.frames
    assert [frame["step"] for frame in frames] == list(range(1, steps + 1))
    # A loader that is a batch ahead has nothing left to fetch in the last step.
    assert METRICS - frames[-2 if accumulate == 1 else -1].keys() == set()
    for timeline in captured.timelines[1 : -1 if accumulate == 1 else None]:
        assert SPANS - {name for name, _, _ in timeline.phases} == set()
    means = [
        sum(losses[i : i + accumulate]) / accumulate for i in range(0, len(losses), accumulate)
    ]
    assert [frame["loss"] for frame in frames] == pytest.approx(means)
    for frame in frames[1:]:
        parts = sum(frame[phase] for phase in PHASES)
        assert parts == pytest.approx(frame["step_latency_ms"], rel=0.05, abs=0.02)


@pytest.mark.parametrize("framework", ["lightning", "transformers", "accelerate"])
def test_both_ways_in_at_once_count_a_step_once(captured, way, framework):
    way(framework, True, watch=True)
    assert len(captured.frames) == ROWS // BATCH


@pytest.mark.parametrize("framework", ["lightning", "transformers", "accelerate"])
def test_what_a_framework_computes_is_the_same_bits(captured, way, framework):
    bare = FRAMEWORKS[framework]()
    assert captured.frames == []
    assert way(framework, False) == bare
    assert way(framework, True) == bare


def test_explicit_and_automatic_count_the_same_step_once(captured):
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        model = network()
        optimizer = torch.optim.Adam(model.parameters())
        run = esper_otel.start(optimizer)
        for x, y in run.batches(loader()):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            run.report(loss=loss)
            optimizer.step()
    finally:
        TorchInstrumentor().uninstrument()
    assert len(captured.frames) == ROWS // BATCH


def test_a_framework_that_is_too_old_is_named_with_what_is_expected():
    with pytest.raises(SettingsError, match=r"torch .* is too old .*: expected 999 or newer"):
        require("torch", "999")
