"""Zero code: an unchanged PyTorch loop is recorded, and computes as it would alone."""

import contextlib
import logging
import math
import random

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from esper_otel import loop  # noqa: E402
from esper_otel.integrations import watch as watching  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.tolaria.ordinary_steps import OrdinarySteps  # noqa: E402
from integrations.plain_loops import data, plain_loop  # noqa: E402
from integrations.ways_in import METRICS  # noqa: E402


def test_every_optimizer_step_is_one_frame_with_what_a_step_has(instrumented):
    losses, _ = plain_loop()
    assert [frame["step"] for frame in instrumented.frames] == list(range(1, 7))
    assert [frame["loss"] for frame in instrumented.frames] == losses
    later = instrumented.frames[-1]
    assert later.keys() >= METRICS
    assert later["optimizer_lr"] == pytest.approx(0.05)
    assert later["optimizer_momentum"] == pytest.approx(0.9)
    assert ("h2d_copy_ms" in later) == torch.cuda.is_available()


@pytest.mark.parametrize("clips", [True, False])
def test_steps_of_a_plain_loop_are_made_of_notes_at_once(instrumented, monkeypatch, clips):
    """Few are not: the first ones, and those at the end of an epoch."""
    record, ordinary = OrdinarySteps.record, []

    def counted(*what):
        row = record(*what)
        ordinary.append(row is not None)
        return row

    monkeypatch.setattr(OrdinarySteps, "record", counted)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for inputs, targets in data(n=4 * 100, batch_size=4):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert len(instrumented.frames) == 100
    assert sum(ordinary) > 80


def test_phases_add_up_to_the_step(instrumented):
    plain_loop(epochs=4)
    parts = ("input_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "hook_latency_ms")
    for frame in instrumented.frames[1:]:
        assert sum(frame[part] for part in parts) <= frame["step_latency_ms"] + 1e-6


def test_losses_weights_and_random_states_are_bit_identical(captured):
    def observed():
        random.seed(3)
        losses, weights = plain_loop(clip=1.0, loader=data(shuffle=True))
        return losses, weights, random.random(), torch.rand(1).item()

    bare = observed()
    instrumentor = TorchInstrumentor()
    instrumentor.instrument(skip_dep_check=True)
    try:
        watched = observed()
    finally:
        instrumentor.uninstrument()
    assert watched[0] == bare[0]
    assert all(torch.equal(a, b) for a, b in zip(watched[1], bare[1], strict=True))
    assert watched[2:] == bare[2:]
    assert len(captured.frames) == 6


def test_validation_is_not_counted_as_training(instrumented):
    plain_loop(epochs=2, evaluate=True)
    assert len(instrumented.frames) == 6
    for frame in instrumented.frames[1:]:
        assert frame["samples_per_s"] * frame["step_latency_ms"] / 1e3 == pytest.approx(32)


def test_nan_is_counted_and_left_out(instrumented):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(torch.ones(1, 2)) * math.nan).sum().backward()
    optimizer.step()
    (frame,) = instrumented.frames
    assert frame["nonfinite"] == 2, "loss and gradient norm"
    assert not frame.keys() & {"loss", "gradient_norm"}


def test_the_loss_under_a_gradient_scaler_is_the_users(instrumented):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = model(torch.ones(1, 2)).square().sum()
    scaler.scale(loss).backward()
    gradient = model.weight.grad.norm().item(), model.bias.grad.norm().item()
    scaler.step(optimizer)
    scaler.update()
    (frame,) = instrumented.frames
    assert frame["loss"] == pytest.approx(loss.item())
    assert frame["gradient_norm"] == pytest.approx(math.hypot(*gradient) / 1024)


def test_workers_of_a_loader_report_nothing(instrumented):
    plain_loop(epochs=1, loader=data(num_workers=2))
    assert [frame["step"] for frame in instrumented.frames] == [1, 2, 3]


def test_a_second_optimizer_does_not_make_steps_of_its_own(instrumented):
    first = torch.optim.SGD([a := torch.ones(1, requires_grad=True)], lr=0.1)
    second = torch.optim.SGD([b := torch.ones(1, requires_grad=True)], lr=0.1)
    for _ in range(3):
        (a * b).sum().backward()
        first.step()
        second.step()
    assert len(instrumented.frames) == 3


def test_a_failure_of_ours_does_not_reach_the_loop(instrumented, monkeypatch, caplog):
    monkeypatch.setattr(loop, "gradient_norm", lambda _: 1 / 0)
    monkeypatch.setattr(loop, "_told", set())
    with caplog.at_level(logging.WARNING):
        losses, _ = plain_loop(epochs=1)
    assert len(losses) == 3
    assert [("gradient_norm" in f, "loss" in f) for f in instrumented.frames] == [
        (False, True)
    ] * 3
    assert len([r for r in caplog.records if "gradient norm" in r.message]) == 1


def test_a_users_error_passes_through_unchanged(instrumented):
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar"):
        (x * 2).backward()
    with pytest.raises(StopIteration):
        next(iter(data(n=0)))


class OnCuda:
    """A tensor that says it lies on a CUDA device."""

    device = torch.device("cuda", 0)


class Copies:
    """Stands where the timer of copies stands: every timed copy takes 2.5 ms."""

    def __init__(self):
        self.timed = 0
        self.reading = None

    @contextlib.contextmanager
    def copying(self, device=None):
        self.timed += 1
        yield
        self.reading = 2.5

    def first_copy(self):
        reading, self.reading = self.reading, None
        return reading


def test_with_cuda_the_first_copy_of_a_step_is_timed(captured, monkeypatch):
    copies = Copies()
    real_to = torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(watching, "CopyTimer", lambda: copies)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *a: OnCuda() if a == ("cuda",) else real_to(t, *a)
    )
    instrumentor = TorchInstrumentor()
    instrumentor.instrument(skip_dep_check=True)
    try:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            x = torch.ones(2, 4).to(torch.float32)
            if step != 1:
                torch.ones(2, 4).to("cuda")
                torch.ones(2, 4).to("cuda")
            model(x).sum().backward()
            optimizer.step()
    finally:
        instrumentor.uninstrument()
    assert [frame.get("h2d_copy_ms") for frame in captured.frames] == [2.5, None, 2.5]
    assert copies.timed == 5, "three casts and one copy in each of two steps"
