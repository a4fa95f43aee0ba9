"""A recorder whose sidecar has sent guards, and steps that cross them."""

import pytest
from tolaria.loops import Optimizer, make
from tolaria.sidecars import Sidecar

from esper_otel.leyline.decisions import TIMEOUT, unanswered
from esper_otel.leyline.guards import Guards
from esper_otel.leyline.wire import Guard

INSIDE, OUTSIDE = 1.0, 20.0

EVERYTHING = [
    Guard("loss", above=10.0, below=0.0),
    Guard("gradient_norm", above=10.0),
    Guard("optimizer_lr", above=1.0),
    Guard("nonfinite", above=0.0),
]


def guarded(clock, update=None, guards=EVERYTHING, enforce=True, **options):
    """A recorder whose sidecar has told guards, and answers checks with ``update``."""
    sidecar = Sidecar(clock, checks_ms=options.pop("checks_ms", 0.0))
    sidecar.guards = Guards(guards)
    sidecar.update = update
    recorder, frames = make(enforce, client=sidecar, **options)
    return recorder, frames, sidecar


class Parameter:
    grad = None


class Trained(Optimizer):
    """Of one parameter."""

    def __init__(self):
        self.parameter = Parameter()
        super().__init__({"lr": 0.1, "momentum": 0.9, "params": [self.parameter]})


def train(recorder, clock, losses, *, norm=2.0):
    """Steps with these losses; what the update of each saw: its rate and its gradient."""
    torch = pytest.importorskip("torch")  # alone of its gradients
    optimizer = recorder.optimizer = Trained()
    seen = []
    for loss in losses:
        optimizer.parameter.grad = own = torch.tensor([norm])
        clock.pass_ms(5)
        recorder.backward_begins()
        recorder.backward_ends(loss)
        recorder.optimizer_begins(clock(), norm, optimizer)
        left = optimizer.parameter.grad
        seen.append((optimizer.param_groups[0]["lr"], None if left is None else left.item()))
        recorder.optimizer_ends(optimizer)
        recorder.end_step()
        assert optimizer.parameter.grad is own
        assert optimizer.param_groups[0]["lr"] == 0.1
    return seen


HELD = [
    Guard("loss", above=10.0),
    Guard("gradient_norm", above=10.0, held_above=100.0, held_to=4.0),
    Guard("optimizer_lr", above=0.2, held_above=0.8, held_to=0.1),
]


def nobody(step, _):
    return unanswered("r", step, TIMEOUT)
