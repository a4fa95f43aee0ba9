"""Notebooks: cells that share their names, are run again, and are interrupted half-way."""

import pytest

torch = pytest.importorskip("torch")

from testkit.framework_loops import BATCH, ROWS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another

STEPS = ROWS // BATCH
SETUP = """
import torch
from torch import nn
import esper_otel
from testkit.framework_loops import dataset, loader, network
from esper_otel.integrations.torch import TorchInstrumentor

interrupt_at = None

def train(model, optimizer):
    for step, (x, y) in enumerate(loader()):
        if step == interrupt_at:
            raise KeyboardInterrupt
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
"""
MODEL = """
model = network()
optimizer = torch.optim.Adam(model.parameters())
"""
PLAIN = """
train(model, optimizer)
"""
NO_OPTIMIZER = """
run = esper_otel.start()
for _ in range(3):
    run.report(loss=1.0)
    run.step()
"""
STARTED = """
run = esper_otel.start(optimizer)
train(model, optimizer)
"""
INSTRUMENT = """
TorchInstrumentor().instrument(skip_dep_check=True)
"""
UNINSTRUMENT = """
TorchInstrumentor().uninstrument()
"""
TRAINER = """
import tempfile, transformers

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()
        self.calls = 0

    def forward(self, x=None, labels=None):
        self.calls += 1
        if self.calls - 1 == interrupt_at:
            raise KeyboardInterrupt
        return {"loss": nn.functional.mse_loss(self.network(x), labels)}

def trainer_with(*callbacks):
    return transformers.Trainer(
        model=Model(),
        args=transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(dir="."),
            per_device_train_batch_size=8,
            num_train_epochs=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(*dataset().tensors)],
        callbacks=list(callbacks),
    )
"""


class Notebook:
    """Runs cells in one namespace, as a kernel does."""

    def __init__(self):
        self.names = {"__name__": "__main__"}
        self.run(SETUP)

    def run(self, *cells):
        for cell in cells:
            exec(compile(cell, "<cell>", "exec"), self.names)

    def interrupt(self, cell, step):
        """Run ``cell`` and press Stop before ``step`` (from 0)."""
        self.run(f"interrupt_at = {step}")
        with pytest.raises(KeyboardInterrupt):
            self.run(cell)
        self.run("interrupt_at = None")


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Notebook()


def steps(streams):
    return [[frame["step"] for frame in stream.frames] for stream in streams]


def whole(n=STEPS):
    return list(range(1, n + 1))


def is_open(streams):
    return [not stream.closed for stream in streams]


@pytest.mark.parametrize(
    ("cell", "each"),
    [(NO_OPTIMIZER, 3), (MODEL + STARTED, STEPS), (STARTED, STEPS)],
    ids=["without an optimizer", "with a new optimizer", "with the optimizer of before"],
)
def test_a_cell_that_is_run_again_ends_its_run_of_before(captured_runs, notebook, cell, each):
    notebook.run(MODEL, cell, cell, cell)
    assert steps(captured_runs) == [whole(each)] * 3
    assert is_open(captured_runs) == [False, False, True]


def test_a_cell_that_was_interrupted_is_run_again_as_a_run_of_its_own(captured_runs, notebook):
    notebook.run(MODEL)
    notebook.interrupt(STARTED, step=3)
    notebook.run(STARTED)
    assert steps(captured_runs) == [whole(3), whole()]
    assert is_open(captured_runs) == [False, True]


def test_runs_of_two_optimizers_leave_one_another_alone(captured_runs, notebook):
    notebook.run(MODEL, STARTED)
    notebook.run("first = model, optimizer", MODEL, STARTED, NO_OPTIMIZER)
    notebook.run("train(*first)")
    assert steps(captured_runs) == [whole(2 * STEPS), whole(), whole(3)]
    assert is_open(captured_runs) == [True] * 3


def test_a_mistake_in_a_setting_ends_nothing(captured_runs, notebook):
    notebook.run(MODEL, STARTED)
    with pytest.raises(ValueError, match="no such setting"):
        notebook.run("run = esper_otel.start(optimizer, moode='off')")
    assert is_open(captured_runs) == [True]


def test_a_first_cell_that_instruments_records_all_that_follow(captured_runs, notebook):
    notebook.run(INSTRUMENT, MODEL, PLAIN, INSTRUMENT, MODEL)
    notebook.interrupt(PLAIN, step=3)
    notebook.run(PLAIN, STARTED, "run.close()", MODEL + STARTED, UNINSTRUMENT, PLAIN)
    # Each model that is made anew is trained in a run of its own.
    assert steps(captured_runs) == [whole(), whole(3 + 2 * STEPS), whole()]
    assert is_open(captured_runs) == [False] * 3


@pytest.fixture
def with_trainer(notebook):
    pytest.importorskip("transformers")
    notebook.run(TRAINER)
    return notebook


def test_a_trainer_that_was_interrupted_does_not_record_the_next(captured_runs, with_trainer):
    with_trainer.run("from esper_otel.integrations.transformers import EsperCallback")
    make = "trainer = trainer_with(EsperCallback())"
    with_trainer.run(make)
    with_trainer.interrupt("trainer.train()", step=3)
    with_trainer.run("trainer.train()", make, "trainer.train()")
    assert steps(captured_runs) == [whole(3), whole(), whole()]
    assert is_open(captured_runs) == [False] * 3


def test_a_plain_loop_after_a_trainer_that_was_interrupted_is_recorded(
    captured_runs, with_trainer
):
    with_trainer.run(INSTRUMENT, "trainer = trainer_with()")
    with_trainer.interrupt("trainer.train()", step=3)
    with_trainer.run(MODEL, PLAIN, UNINSTRUMENT)
    assert steps(captured_runs) == [whole(3), whole()]
