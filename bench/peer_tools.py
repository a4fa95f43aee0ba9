"""Tools that record training, each put on a loop and taken off again, for ``bench.peers``.

``python -m bench.peer_tools TOOL NETWORK FILE`` trains the network in blocks, with the tool
and without in turn, and writes what was measured of both, as JSON, to the file.
"""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from bench.figures import alternate, median
from esper_otel.integrations.watch import Watch
from esper_otel.process import start
from examples import characters, digits

SECONDS = 25
STEPS = {"digits": 24, "characters": 8}
"""Of each block: about a tenth of a second, as the machine's speed drifts."""


class Measured(NamedTuple):
    """A block: wall time of its median step, and CPU time of the process per step, in ms.

    The median, as the machine is shared: whoever takes the processor for a while takes it
    from a few steps of one block.
    """

    wall: float
    cpu: float


def measured(training: Iterator[object]) -> Measured:
    """Have every step made that ``training`` makes when it is asked for it."""
    used = process_time()
    marks = [perf_counter()]
    marks += (perf_counter() for _ in training)
    return in_steps(marks, process_time() - used)


def in_steps(marks: list[float], cpu_s: float) -> Measured:
    walls = [(end - began) * 1e3 for began, end in pairwise(marks)]
    return Measured(median(walls), cpu_s * 1e3 / len(walls))


class Training:
    """A network that learns, one step at a time."""

    def __init__(self, network: str) -> None:
        torch.manual_seed(0)
        data: Any
        if network == "digits":
            data, _ = digits.load(0)
            self.model: nn.Module = digits.DigitsNet()
            batch = 64
        else:
            data = characters.load()
            self.model = characters.Writer(len(data.letters))
            batch = 8
        samples = STEPS[network] * batch
        sampler = RandomSampler(data, replacement=True, num_samples=samples)
        self.loader: DataLoader[Any] = DataLoader(data, batch, sampler=sampler)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def loss(self, batch: Any) -> Tensor:
        """Cross-entropy of a batch."""
        inputs, wanted = batch
        return nn.functional.cross_entropy(self.model(inputs).flatten(0, -2), wanted.flatten())

    def learn(self, batch: Any) -> tuple[Tensor, Tensor]:
        """One step; its loss and gradient norm."""
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        return loss, norm

    def bare(self) -> Measured:
        """A block with nothing added."""
        return measured(self.learn(batch) for batch in self.loader)


Block = Callable[[], Measured]
"""Trains for a block."""


@contextmanager
def esper(training: Training, mode: str = "off") -> Iterator[tuple[Block, Block]]:
    """By the hooks and wrappers that ``esper-otel run`` puts on."""
    with watching(training.bare, mode) as watched:
        yield watched, training.bare


@contextmanager
def watching(block: Block, mode: str) -> Iterator[Block]:
    """``block`` within one run that records all its calls."""
    run = start(mode=mode)

    def watched() -> Measured:
        watch = Watch(torch, run)
        try:
            return block()
        finally:
            watch.undo()

    yield watched
    report = run.close().metrics
    if not report.delivered or report.delivered != report.produced:
        raise AssertionError(f"not everything was delivered: {report}")


@contextmanager
def traceml(training: Training) -> Iterator[tuple[Block, Block]]:
    """With ``traceml serve`` beside it, and what it patches put back for bare blocks."""
    tool = import_module("traceml_ai")
    hooks = import_module("traceml_ai.instrumentation.hooks.optimizer_hooks")
    patched: tuple[tuple[Any, str], ...] = (
        (DataLoader, "__iter__"),
        (nn.Module, "__call__"),
        (torch.Tensor, "backward"),
        (torch.autograd, "backward"),
        (torch.Tensor, "to"),
    )
    port = free_port()
    options = ["--aggregator-port", str(port), "--session-id", "bench", "--logs-dir", "logs"]
    with subprocess.Popen(
        [str(Path(sys.executable).with_name("traceml")), "serve", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as aggregator:
        originals = [getattr(owner, name) for owner, name in patched]
        tool.init(
            mode="auto",
            aggregator_port=port,
            session_id="bench",
            logs_dir="logs",
            connect_timeout_sec=30.0,
        )
        theirs = [getattr(owner, name) for owner, name in patched]
        if theirs == originals:
            raise AssertionError("TraceML has patched nothing")

        def put(wrappers: list[Any]) -> None:
            for (owner, name), wrapper in zip(patched, wrappers, strict=True):
                setattr(owner, name, wrapper)

        def steps() -> Iterator[None]:
            for batch in training.loader:
                with tool.trace_step(training.model):
                    training.learn(batch)
                yield

        def traced() -> Measured:
            put(theirs)
            return measured(steps())

        def bare() -> Measured:
            put(originals)
            hooks.reset_optimizer_timing()
            return training.bare()

        try:
            yield traced, bare
        finally:
            aggregator.kill()  # it would wait for this process to end, and it for that


@contextmanager
def torchtel(training: Training) -> Iterator[tuple[Block, Block]]:
    """From outside, with its own set-up of the OTel SDK."""
    tool = import_module("torchtel")
    tracers, meters = tool.setup_opentelemetry()
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # of the full queue of spans

    def traced() -> Measured:
        instrumentor = tool.PyTorchInstrumentor().instrument(model=training.model)
        try:
            return training.bare()
        finally:
            instrumentor.uninstrument()

    yield traced, training.bare
    meters.shutdown()
    tracers.shutdown()


@contextmanager
def wandb(training: Training) -> Iterator[tuple[Block, Block]]:
    """Offline; it hears of loss, gradient norm and learning rate at every step."""
    tool = import_module("wandb")
    run = tool.init(project="bench", dir=".", mode="offline")

    def steps() -> Iterator[None]:
        for batch in training.loader:
            loss, norm = training.learn(batch)
            rate = training.optimizer.param_groups[0]["lr"]
            run.log({"loss": loss.item(), "gradient_norm": norm.item(), "lr": rate})
            yield

    yield lambda: measured(steps()), training.bare
    run.finish()


def under_lightning(training: Training, every: int, monitored: bool) -> Measured:
    """A block that is one epoch of Lightning's Trainer."""
    pl: Any = import_module("lightning.pytorch")
    loggers = import_module("lightning.pytorch.loggers")
    monitors = import_module("lightning.pytorch.callbacks")
    marks: list[float] = []
    used: list[float] = []

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = training.model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return training.loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return training.optimizer

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            used.append(process_time())
            marks.append(perf_counter())

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=5.0,
        log_every_n_steps=every,
        logger=loggers.CSVLogger("lightning"),
        callbacks=[monitors.DeviceStatsMonitor()] if monitored else [],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Module(), training.loader)
    return in_steps(marks, used[-1] - used[0])


@contextmanager
def device_stats(training: Training, every: int = 1) -> Iterator[tuple[Block, Block]]:
    """Lightning's own callback, against Lightning without it."""
    block = partial(under_lightning, training, every)
    yield partial(block, monitored=True), partial(block, monitored=False)


@contextmanager
def esper_lightning(training: Training) -> Iterator[tuple[Block, Block]]:
    """From outside, against Lightning without."""
    block = partial(under_lightning, training, every=1, monitored=False)
    with watching(block, "off") as watched:
        yield watched, block


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


TOOLS: dict[str, Any] = {
    "esper": esper,
    "esper_asking": partial(esper, mode="advise"),
    "traceml": traceml,
    "torchtel": torchtel,
    "wandb": wandb,
    "esper_lightning": esper_lightning,
    "device_stats": device_stats,
    "device_stats_default": partial(device_stats, every=50),
}


def main() -> None:
    tool, network, result = sys.argv[1:]
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with TOOLS[tool](Training(network)) as (with_tool, bare):
        with_tool(), bare()
        pairs: list[tuple[Measured, Measured]] = []
        until = perf_counter() + SECONDS
        while perf_counter() < until:
            pairs += zip(*alternate(with_tool, bare, 2), strict=True)
        Path(result).write_text(json.dumps(pairs))


if __name__ == "__main__":
    main()
