"""What a framework evaluates, or is given to log, as custom values of its run."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from integrations.framework_trainers import (  # noqa: E402
    Losing,
    lightning_module,
    lightning_trainer,
    transformers_trainer,
)
from integrations.ways_in import instrumenting  # noqa: E402
from testkit.framework_loops import BATCH, ROWS, loader, network  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another


def evaluated(captured):
    """{step: custom values}, and those that no step followed."""
    customs = {
        int(frame["step"]): {k: v for k, v in frame.items() if k.startswith("custom.")}
        for frame in captured.frames
    }
    return {step: values for step, values in customs.items() if values}, captured.left


@pytest.mark.parametrize("automatic", [True, False])
def test_lightning_reports_what_a_validation_logs(captured, tmp_path, automatic):
    class Module(lightning_module()):
        def training_step(self, batch, index):
            self.log("train_kl", 1.0)
            return super().training_step(batch, index)

        def validation_step(self, batch, index):
            self.log("val_loss", float(self.global_step))
            self.log("f1", 0.5)

    with instrumenting(automatic):
        trainer = lightning_trainer(tmp_path, watched=not automatic, val_check_interval=4)
        trainer.fit(Module(), loader(), loader())
    # The sanity check before the training says nothing; the last one follows the last step.
    assert evaluated(captured) == (
        {5: {"custom.val_loss": 4.0, "custom.val_f1": 0.5}},
        {"custom.val_loss": 8.0, "custom.val_f1": 0.5},
    )


@pytest.mark.parametrize("automatic", [True, False])
def test_transformers_reports_its_evaluations(captured, tmp_path, automatic):
    with instrumenting(automatic):
        evaluates = {"eval_strategy": "steps", "eval_steps": 4}
        trainer = transformers_trainer(Losing(), tmp_path, watched=not automatic, **evaluates)
        trainer.train()
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
