"""What every way in owes, from real training loops of the frameworks themselves.

One table: each way in is run for a while, and has to deliver the same metrics and spans
for the same number of steps. A metric that goes dark in one of them fails here by name.
"""

import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel import loop  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.integrations.training import Training, require  # noqa: E402
from esper_otel.settings import SettingsError  # noqa: E402
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, answer  # noqa: E402
from testkit.framework_loops import (  # noqa: E402
    BATCH,
    FRAMEWORKS,
    ROWS,
    dataset,
    loader,
    network,
)
from testkit.loops import unaccounted  # noqa: E402

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

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another


@pytest.fixture
def way(captured, request, tmp_path, monkeypatch):
    """Runs a framework's loop in one of the two ways in; gives what it computed."""
    monkeypatch.setenv("ESPER_SPAN_EVERY", "1")
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")

    def run(framework, automatic, **options):
        pytest.importorskip("torch" if framework == "plain" else framework)
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
        assert abs(unaccounted(frame)) <= max(0.05 * frame["step_latency_ms"], 0.02)


@pytest.mark.parametrize(("framework", "automatic"), WAYS)
def test_every_way_in_says_once_that_the_training_is_done(captured, way, framework, automatic):
    way(framework, automatic)
    assert captured.ends == [(ROWS // BATCH, "done")]


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (ValueError, "exception ValueError"),
        (KeyboardInterrupt, "interrupted KeyboardInterrupt"),
    ],
)
def test_lightning_says_what_ended_a_training(captured, tmp_path, automatic, error, ended):
    pl = pytest.importorskip("lightning.pytorch")
    from esper_otel.integrations.lightning import EsperCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, index):
            if index == 2:
                raise error
            return self.network(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    if automatic:
        TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[] if automatic else [EsperCallback()],
        )
        with pytest.raises((error, SystemExit)):
            trainer.fit(Module(), loader())
        assert captured.ends == [(2, ended)]  # and not when the process is done
    finally:
        TorchInstrumentor().uninstrument()
    assert captured.ends == [(2, ended)]


HALVED = 3
"""The step whose answer halves the learning rate, once."""


def reply(ask):
    return answer(ask) if ask.step == HALVED else all_is_well(ask)


@pytest.mark.parametrize(("framework", "automatic"), WAYS)
def test_a_decision_is_applied_in_every_way_in(
    captured, way, framework, automatic, tmp_path, monkeypatch
):
    way(framework, automatic)
    rates = [frame["optimizer_lr"] for frame in captured.frames]
    captured.frames.clear()
    captured.timelines.clear()
    monkeypatch.setenv("ESPER_MODE", "enforce")
    monkeypatch.setenv("ESPER_TAMIYO_SOCKET", str(tmp_path / "s.sock"))
    monkeypatch.setenv("ESPER_TAMIYO_DEADLINE_MS", "5000")
    with FakeSidecar(tmp_path / "s.sock", reply) as sidecar:
        way(framework, automatic)
    steps = ROWS // BATCH
    assert [ask.step for ask in sidecar.asks] == list(range(1, steps + 1))
    assert [t.step for t in captured.timelines if t.applied] == [HALVED]
    for timeline in captured.timelines:
        names = {name for name, _, _ in timeline.phases}
        applied = set() if timeline.step == steps else {"kasmina.apply"}  # no step follows
        assert names >= {"tamiyo.decide"} | applied
    decisions = {timeline.step: timeline.decision for timeline in captured.timelines}
    assert [decisions[step].reason for step in (HALVED - 1, HALVED)] == ["nominal", "a_rule"]
    # A frame tells what asking about the step before it took.
    frames = captured.frames
    assert all(frame["tamiyo_latency_ms"] > 0 for frame in frames[1:])
    scales = [0.5 if i >= HALVED else 1.0 for i in range(steps)]
    assert [frame["lr_scale"] for frame in frames] == scales
    assert [frame["optimizer_lr"] for frame in frames] == pytest.approx(
        [rate * scale for rate, scale in zip(rates, scales, strict=True)]
    )


@pytest.mark.parametrize("framework", ["lightning", "transformers", "accelerate"])
def test_both_ways_in_at_once_count_a_step_once(captured, way, framework):
    way(framework, True, watch=True)
    assert len(captured.frames) == ROWS // BATCH


@pytest.mark.parametrize("framework", ["lightning", "transformers", "accelerate"])
def test_what_a_framework_computes_is_the_same_bits(captured, way, framework):
    pytest.importorskip(framework)
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


def test_a_plain_loop_after_a_frameworks_training_is_counted_too(captured):
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        model = network()
        optimizer = torch.optim.Adam(model.parameters())  # outlives its training
        training = Training()
        training.start(optimizer)
        train(model, optimizer)
        training.stop()
        other = network()
        train(other, torch.optim.Adam(other.parameters()))
    finally:
        TorchInstrumentor().uninstrument()
    assert len(captured.frames) == 2 * ROWS // BATCH


@pytest.mark.parametrize("framework", ["lightning", "transformers", "accelerate"])
def test_a_plain_loop_after_a_frameworks_training_has_its_mean_loss(captured, way, framework):
    pytest.importorskip(framework)
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        FRAMEWORKS[framework](accumulate=4)
        losses = FRAMEWORKS["plain"](accumulate=4)
    finally:
        TorchInstrumentor().uninstrument()
    means = [sum(losses[i : i + 4]) / 4 for i in range(0, len(losses), 4)]
    assert [frame["loss"] for frame in captured.frames[-2:]] == pytest.approx(means)


def test_a_run_that_cannot_be_closed_does_not_reach_the_framework(captured, caplog):
    training = Training()
    training.start()
    captured.close = lambda timeout_s=None: 1 / 0
    training.stop()
    captured.close = lambda timeout_s=None: captured
    training.run.close()
    assert [record.message for record in caplog.records] == ["the run could not be closed"]


def test_uninstrumenting_takes_the_frameworks_back_as_well(captured):
    trainer = pytest.importorskip("transformers.trainer")
    accelerator = pytest.importorskip("accelerate.accelerator")

    def of_frameworks():
        return [*trainer.DEFAULT_CALLBACKS, accelerator.Accelerator.__dict__["backward"]]

    before = of_frameworks()
    TorchInstrumentor().instrument(skip_dep_check=True)
    during = of_frameworks()
    TorchInstrumentor().uninstrument()
    assert len(during) == len(before) + 1
    assert during[-1] is not before[-1]
    assert of_frameworks() == before


def train(model, optimizer):
    for x, y in loader():
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_framework_that_is_too_old_is_named_with_what_is_expected():
    with pytest.raises(SettingsError, match=r"torch .* is too old .*: expected 999 or newer"):
        require("torch", "999")


TOO_OLD = {"lightning": "2.1.4", "transformers": "4.45.0", "accelerate": "0.34.0"}


@pytest.mark.parametrize("framework", TOO_OLD)
def test_one_that_is_too_old_trains_under_zero_code_as_any_loop(
    captured, way, framework, monkeypatch, caplog
):
    module = pytest.importorskip(framework)
    monkeypatch.setattr(loop, "_told", set())
    monkeypatch.setattr(module, "__version__", TOO_OLD[framework])
    for _ in range(2):
        way(framework, True)
    assert len(captured.frames) == 2 * ROWS // BATCH
    told = [r.message for r in caplog.records if "too old" in r.message]
    # Accelerate gets no callback, so there is nothing that its version would matter to.
    expected = [] if framework == "accelerate" else [f"{framework} {TOO_OLD[framework]} is"]
    assert [message.partition(" too old")[0] for message in told] == expected


@pytest.mark.parametrize("framework", TOO_OLD)
def test_a_callback_that_a_script_makes_refuses_one_that_is_too_old(framework, monkeypatch):
    module = pytest.importorskip(framework)
    monkeypatch.setattr(module, "__version__", TOO_OLD[framework])
    with pytest.raises(SettingsError, match=f"{framework} .* is too old .*: expected"):
        FRAMEWORKS[framework](watch=True)


def test_a_framework_of_unknown_version_is_not_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "unknown")
    require("torch", "999")


# What a framework evaluates, and what a script tells it.


def evaluated(captured):
    """{step: custom values}, and those that no step followed."""
    customs = {
        int(frame["step"]): {k: v for k, v in frame.items() if k.startswith("custom.")}
        for frame in captured.frames
    }
    return {step: values for step, values in customs.items() if values}, captured.left


@pytest.mark.parametrize("automatic", [True, False])
def test_lightning_reports_what_a_validation_logs(captured, tmp_path, automatic):
    pl = pytest.importorskip("lightning.pytorch")
    from esper_otel.integrations.lightning import EsperCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, index):
            self.log("train_kl", 1.0)
            return self.network(batch[0]).square().mean()

        def validation_step(self, batch, index):
            self.log("val_loss", float(self.global_step))
            self.log("f1", 0.5)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    if automatic:
        TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            val_check_interval=4,
            default_root_dir=tmp_path,
            callbacks=[] if automatic else [EsperCallback()],
        )
        trainer.fit(Module(), loader(), loader())
    finally:
        TorchInstrumentor().uninstrument()
    # The sanity check before the training says nothing; the last one follows the last step.
    assert evaluated(captured) == (
        {5: {"custom.val_loss": 4.0, "custom.val_f1": 0.5}},
        {"custom.val_loss": 8.0, "custom.val_f1": 0.5},
    )


@pytest.mark.parametrize("automatic", [True, False])
def test_transformers_reports_its_evaluations(captured, tmp_path, automatic):
    hf = pytest.importorskip("transformers")
    from esper_otel.integrations.transformers import EsperCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x=None, labels=None):
            return {"loss": nn.functional.mse_loss(self.network(x), labels)}

    data = [{"x": x, "labels": y} for x, y in zip(*dataset().tensors, strict=True)]
    if automatic:
        TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        trainer = hf.Trainer(
            model=Model(),
            args=hf.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                eval_strategy="steps",
                eval_steps=4,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=data,
            eval_dataset=data,
            callbacks=[] if automatic else [EsperCallback()],
        )
        trainer.train()
    finally:
        TorchInstrumentor().uninstrument()
    logged = {
        entry["step"]: entry["eval_loss"]
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    }
    steps, left = evaluated(captured)
    assert {step - 1: values["custom.eval_loss"] for step, values in steps.items()} == (
        pytest.approx({4: logged[4]})
    )
    assert left == pytest.approx({"custom.eval_loss": logged[8]})


def test_accelerate_reports_what_it_is_given_to_log(captured):
    accelerate = pytest.importorskip("accelerate")
    from esper_otel.integrations.accelerate import EsperTracker

    accelerator = accelerate.Accelerator(cpu=True, log_with=[EsperTracker()])
    accelerator.init_trackers("x", config={"lr": 0.1, "hf_token": "abc"})
    model, optimizer = accelerator.prepare(
        made := network(), torch.optim.Adam(made.parameters())
    )
    for step, (x, y) in enumerate(loader()):
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        accelerator.log({"kl": float(step), "text": "x"}, step=step)
        optimizer.step()
    accelerator.end_training()
    steps, left = evaluated(captured)
    assert steps == {step + 1: {"custom.kl": float(step)} for step in range(ROWS // BATCH)}
    assert left == {}
    assert captured.config["lr"] == 0.1
    assert captured.config["hf_token"] == "(not recorded)"


# Two ways in at once.


def test_a_framework_under_zero_code_tells_nothing_of_settings(
    captured, way, monkeypatch, caplog
):
    monkeypatch.setattr(loop, "_told", set())
    monkeypatch.delenv("ESPER_MODE")  # so that it is not the one that a line in code means
    for watch in (False, True):
        way("transformers", True, watch=watch)
    assert len(captured.frames) == 2 * ROWS // BATCH
    assert "already instrumented" not in caplog.text


def test_settings_that_zero_code_does_not_have_are_told_once(captured, monkeypatch, caplog):
    monkeypatch.setattr(loop, "_told", set())
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        for _ in range(2):
            esper_otel.start(mode="enforce", recording_dir="/nowhere", summary="text")
        training = Training(mode="enforce", span_every=7)
        training.start()
        training.stop()
        with pytest.raises(SettingsError, match="moode='off': there is no such setting"):
            esper_otel.start(moode="off")
    finally:
        TorchInstrumentor().uninstrument()
    told = [r.message for r in caplog.records if "already instrumented" in r.message]
    assert [message.partition("; ignoring ")[2] for message in told] == [
        "mode='enforce' (active: 'off'), recording_dir='/nowhere' (active: '')",
        "mode='enforce' (active: 'off'), span_every='7' (active: '50')",
    ]


def test_decisions_are_applied_only_where_that_is_asked_for(captured, monkeypatch):
    monkeypatch.delenv("ESPER_MODE")
    run = esper_otel.start()
    assert run.settings.mode == "advise"
    run.close()
    run = esper_otel.start(mode="enforce")
    assert run.settings.mode == "enforce"
    run.close()


def test_a_script_that_closes_its_run_twice_is_recorded_to_the_end(captured):
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        for _ in range(2):
            model = network()
            optimizer = torch.optim.Adam(model.parameters())
            run = esper_otel.start(optimizer)
            garden = run.plant(model, ["1"])
            train(model, optimizer)
            run.close()
            assert garden.closed
        model = network()
        train(model, torch.optim.Adam(model.parameters()))  # of which the script tells nothing
    finally:
        TorchInstrumentor().uninstrument()
    steps = ROWS // BATCH  # of each: another model is another training
    assert [frame["step"] for frame in captured.frames] == 3 * list(range(1, steps + 1))
    grew = [frame.get("kasmina.seeds_live") for frame in captured.frames]
    assert grew == [0.0] * (2 * steps) + [None] * steps


def phases_of(captured):
    return [(frame["step"], frame["phase"]) for frame in captured.frames]


@pytest.mark.parametrize("again", [True, False], ids=["the same model", "another model"])
def test_a_framework_that_fits_again_begins_a_phase_or_another_training(
    captured, again, tmp_path, monkeypatch
):
    pl = pytest.importorskip("lightning.pytorch")
    monkeypatch.chdir(tmp_path)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, index):
            x, y = batch
            return nn.functional.mse_loss(self.network(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    def fit(module):
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader())
        return trainer  # and with it the optimizer

    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        module = Module()
        kept = [fit(module), fit(module if again else Module())]
    finally:
        TorchInstrumentor().uninstrument()
    assert len(kept) == 2
    steps = ROWS // BATCH
    first = [(step, 0.0) for step in range(1, steps + 1)]
    second = [(steps + step, 1.0) for step, _ in first] if again else first
    assert phases_of(captured) == [*first, *second]


def test_a_trainer_that_trains_again_begins_a_phase(captured, tmp_path, monkeypatch):
    hf = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x=None, labels=None):
            return {"loss": nn.functional.mse_loss(self.network(x), labels)}

    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        trainer = hf.Trainer(
            model=Model(),
            args=hf.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=[
                {"x": x, "labels": y} for x, y in zip(*loader().dataset.tensors, strict=True)
            ],
        )
        trainer.train()
        trainer.train()
    finally:
        TorchInstrumentor().uninstrument()
    steps = ROWS // BATCH
    assert phases_of(captured) == [(i + 1, float(i >= steps)) for i in range(2 * steps)]


def test_a_trainer_that_raises_under_zero_code_says_so_at_once(captured, tmp_path, monkeypatch):
    hf = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()
            self.calls = 0

        def forward(self, x=None, labels=None):
            self.calls += 1
            if self.calls == 3:
                raise ValueError
            return {"loss": nn.functional.mse_loss(self.network(x), labels)}

    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        trainer = hf.Trainer(
            model=Model(),
            args=hf.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=BATCH,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=[
                {"x": x, "labels": y} for x, y in zip(*loader().dataset.tensors, strict=True)
            ],
        )
        with pytest.raises(ValueError):  # noqa: PT011  (it has no message)
            trainer.train()
        assert captured.ends == [(2, "exception ValueError")]
    finally:
        TorchInstrumentor().uninstrument()
    assert len(captured.ends) == 1
