"""Small runs, recorded by one tool each in the way that its documentation shows, for
``bench.looking``.

``python bench/looking_runs.py TOOL FOLDER NAME`` trains a small network for :data:`STEPS`
steps and records them into the folder; ``--pause S`` waits so long in each step, ``--killed``
ends the process by SIGKILL behind the last one. It runs in the environment that the tool is
installed in, and imports nothing of this repository.

What a script tells a tool is the same for all: loss, gradient norm and rate of each step, an
evaluation every :data:`EVALUATED_EVERY`, and one loss that is NaN. What a tool sees beyond
that it sees by itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 400
EVALUATED_EVERY = 50
NAN_AT = 200
TAG = "vision"

Report = Callable[[int, dict[str, float]], None]


class Recorder(NamedTuple):
    """How a tool is told of values, and what goes around a step, where it wants that."""

    report: Report
    around: Callable[[Any], AbstractContextManager[object]] = lambda model: nullcontext()


@contextmanager
def esper(folder: Path, name: str, config: dict[str, float]) -> Iterator[Recorder]:
    """By ``esper-otel run``: the script says nothing but the evaluation."""
    import esper_otel

    run = esper_otel.start()

    def report(step: int, values: dict[str, float]) -> None:
        if "val_loss" in values:
            run.report(val_loss=values["val_loss"])

    yield Recorder(report)


@contextmanager
def traceml(folder: Path, name: str, config: dict[str, float]) -> Iterator[Recorder]:
    """By ``traceml run``; it takes no values of a script's own."""
    tool = import_module("traceml_ai")
    tool.init(mode="auto")
    yield Recorder(lambda step, values: None, tool.trace_step)


@contextmanager
def wandb(folder: Path, name: str, config: dict[str, float]) -> Iterator[Recorder]:
    """Offline."""
    tool = import_module("wandb")
    options = {"project": "looking", "dir": str(folder), "mode": "offline", "tags": [TAG]}
    run = tool.init(name=name, config=config, **options)
    yield Recorder(lambda step, values: run.log(values, step=step))
    run.finish()


@contextmanager
def tensorboard(folder: Path, name: str, config: dict[str, float]) -> Iterator[Recorder]:
    """By torch's own writer."""
    tool = import_module("torch.utils.tensorboard")
    writer = tool.SummaryWriter(str(folder / name))

    def report(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    yield Recorder(report)
    writer.add_hparams(config, {"hparam/loss": 0.1}, run_name=".")
    writer.close()


@contextmanager
def aim(folder: Path, name: str, config: dict[str, float]) -> Iterator[Recorder]:
    tool = import_module("aim")
    run = tool.Run(repo=str(folder), experiment="looking")
    run.name = name
    run["hparams"] = config
    run.add_tag(TAG)

    def report(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            run.track(value, name=key, step=step)

    yield Recorder(report)
    run.close()


@contextmanager
def mlflow(folder: Path, name: str, config: dict[str, float]) -> Iterator[Recorder]:
    """Into a database of its own, without a server."""
    tool = import_module("mlflow")
    tool.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    tool.set_experiment("looking")
    with tool.start_run(run_name=name, tags={"team": TAG}):
        tool.log_params(config)
        yield Recorder(lambda step, values: tool.log_metrics(values, step=step))


TOOLS = (esper, traceml, wandb, tensorboard, aim, mlflow)


def train(recorder: Recorder, rate: float, pause_s: float) -> None:
    """Learn the sum of four numbers."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    x = torch.randn(STEPS * 8, 4)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step, (some, wanted) in enumerate(
        DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    ):
        with recorder.around(model):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(some), wanted)
            if step == NAN_AT:
                loss = loss * nan
            loss.backward()  # type: ignore[no-untyped-call]
            if step == NAN_AT:  # the update does nothing
                optimizer.zero_grad(set_to_none=False)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        values = {"loss": loss.item(), "gradient_norm": norm.item(), "lr": rate}
        if step % EVALUATED_EVERY == 0:
            values["val_loss"] = 2.0 / (1 + step)
        recorder.report(step, values)
        time.sleep(pause_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=[tool.__name__ for tool in TOOLS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--killed", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (tool,) = (tool for tool in TOOLS if tool.__name__ == options.tool)
    with tool(options.folder.resolve(), options.name, {"rate": options.rate}) as recorder:
        train(recorder, options.rate, options.pause)
        if options.killed:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
