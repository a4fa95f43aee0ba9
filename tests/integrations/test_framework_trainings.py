"""What a framework's trainer begins, ends and fails at, as its run has it."""

import pytest

torch = pytest.importorskip("torch")

from esper_otel.integrations.training import Training  # noqa: E402
from integrations.framework_trainers import (  # noqa: E402
    Losing,
    lightning_module,
    lightning_trainer,
    transformers_trainer,
)
from integrations.ways_in import WITH_TRAINERS, instrumenting, train  # noqa: E402
from testkit.framework_loops import BATCH, FRAMEWORKS, ROWS, loader, network  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (ValueError, "exception ValueError"),
        (KeyboardInterrupt, "interrupted KeyboardInterrupt"),
    ],
)
def test_lightning_says_what_ended_a_training(captured, tmp_path, automatic, error, ended):
    class Module(lightning_module()):
        def training_step(self, batch, index):
            if index == 2:
                raise error
            return super().training_step(batch, index)

    with instrumenting(automatic):
        trainer = lightning_trainer(tmp_path, watched=not automatic)
        with pytest.raises((error, SystemExit)):
            trainer.fit(Module(), loader())
        assert captured.ends == [(2, ended)]  # and not when the process is done
    assert captured.ends == [(2, ended)]


def test_a_trainer_that_raises_under_zero_code_says_so_at_once(captured, tmp_path):
    class Model(Losing):
        calls = 0

        def forward(self, x=None, labels=None):
            self.calls += 1
            if self.calls == 3:
                raise ValueError
            return super().forward(x, labels)

    with instrumenting():
        trainer = transformers_trainer(Model(), tmp_path)
        with pytest.raises(ValueError):  # noqa: PT011  (it has no message)
            trainer.train()
        assert captured.ends == [(2, "exception ValueError")]
    assert len(captured.ends) == 1


def test_a_run_that_cannot_be_closed_does_not_reach_the_framework(captured, caplog):
    training = Training()
    training.start()
    captured.close = lambda timeout_s=None: 1 / 0
    training.stop()
    captured.close = lambda timeout_s=None: captured
    training.run.close()
    assert [record.message for record in caplog.records] == ["the run could not be closed"]


def test_a_plain_loop_after_a_frameworks_training_is_counted_too(captured):
    with instrumenting():
        model = network()
        optimizer = torch.optim.Adam(model.parameters())  # outlives its training
        training = Training()
        training.start(optimizer)
        train(model, optimizer)
        training.stop()
        other = network()
        train(other, torch.optim.Adam(other.parameters()))
    assert len(captured.frames) == 2 * ROWS // BATCH


@pytest.mark.parametrize("framework", WITH_TRAINERS)
def test_a_plain_loop_after_a_frameworks_training_has_its_mean_loss(captured, framework):
    pytest.importorskip(framework)
    with instrumenting():
        FRAMEWORKS[framework](accumulate=4)
        losses = FRAMEWORKS["plain"](accumulate=4)
    means = [sum(losses[i : i + 4]) / 4 for i in range(0, len(losses), 4)]
    assert [frame["loss"] for frame in captured.frames[-2:]] == pytest.approx(means)


def phases_of(captured):
    return [(frame["step"], frame["phase"]) for frame in captured.frames]


@pytest.mark.parametrize("again", [True, False], ids=["the same model", "another model"])
def test_a_framework_that_fits_again_begins_a_phase_or_another_training(
    captured, again, tmp_path
):
    make = lightning_module()

    def fit(module):
        trainer = lightning_trainer(tmp_path)
        trainer.fit(module, loader())
        return trainer  # and with it the optimizer

    with instrumenting():
        module = make()
        kept = [fit(module), fit(module if again else make())]
    assert len(kept) == 2
    steps = ROWS // BATCH
    first = [(step, 0.0) for step in range(1, steps + 1)]
    second = [(steps + step, 1.0) for step, _ in first] if again else first
    assert phases_of(captured) == [*first, *second]


def test_a_trainer_that_trains_again_begins_a_phase(captured, tmp_path):
    with instrumenting():
        trainer = transformers_trainer(Losing(), tmp_path)
        trainer.train()
        trainer.train()
    steps = ROWS // BATCH
    assert phases_of(captured) == [(i + 1, float(i >= steps)) for i in range(2 * steps)]
