"""Both ways in, and what each of them owes."""

from __future__ import annotations

from contextlib import contextmanager

from torch import nn

from esper_otel.integrations.torch import TorchInstrumentor
from testkit.framework_loops import FRAMEWORKS, loader

WITH_TRAINERS = [name for name in FRAMEWORKS if name != "plain"]
WAYS = [(name, True) for name in FRAMEWORKS] + [(name, False) for name in WITH_TRAINERS]

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
"""What each step of every loop has."""


@contextmanager
def instrumenting(automatic=True):
    """Zero code for as long as the block lasts, unless it is the script that asks for us."""
    if not automatic:
        yield
        return
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        yield
    finally:
        TorchInstrumentor().uninstrument()


def train(model, optimizer):
    """A plain loop over the data of the frameworks' loops."""
    for x, y in loader():
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
