"""Loops as people really write them: steps counted as taken, and time that adds up.

Each loop of ``testkit/loops.py`` returns how many steps its optimizer really took. What is
common to all of them is held once for each; what is special about one follows below.
"""

import math
import threading
from statistics import median

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from esper_otel import process  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from testkit.loops import (  # noqa: E402
    AWKWARD,
    data,
    from_a_thread,
    fused_skipping_scaler,
    generator_and_critic,
    in_backward,
    network,
    plain,
    skipping_scaler,
    unaccounted,
    validation_between,
    validation_between_tensors,
)
from testkit.stopwatch import STOPWATCH  # noqa: E402


@pytest.fixture
def instrumented(captured):
    STOPWATCH.clear()
    TorchInstrumentor().instrument(skip_dep_check=True)
    yield captured
    TorchInstrumentor().uninstrument()


TRAININGS = {"one model after the other": [6, 6], "notebook": [6, 21]}
"""Steps of each training, of the loops that hold several."""


@pytest.mark.parametrize("name", AWKWARD)
def test_steps_are_counted_as_taken_and_their_time_adds_up(instrumented, name):
    loop = AWKWARD[name]
    taken = loop()
    TorchInstrumentor().uninstrument()
    frames = instrumented.frames
    steps = TRAININGS.get(name, [taken])
    assert sum(steps) == taken
    assert [frame["step"] for frame in frames] == [i + 1 for n in steps for i in range(n)]
    for frame in frames:
        if frame["step"] == 1:
            continue
        assert abs(unaccounted(frame)) <= max(0.05 * frame["step_latency_ms"], 0.02)
    assert all("loss" in frame for frame in frames)
    if loop is not in_backward:  # where the gradients are gone by the end of the step
        assert all("gradient_norm" in frame for frame in frames)


def test_a_critic_that_steps_more_often_gives_way_to_its_generator(instrumented):
    cycles = generator_and_critic(critic_steps=5)
    # The critic's five steps before the generator's first are all that anyone knew of then.
    assert len(instrumented.frames) == 5 + cycles


def test_the_primary_optimizer_can_be_named(captured, monkeypatch):
    monkeypatch.setenv("ESPER_PRIMARY_OPTIMIZER", "1")
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        cycles = generator_and_critic(critic_steps=5)
    finally:
        TorchInstrumentor().uninstrument()
    assert len(captured.frames) == cycles


@pytest.mark.parametrize("loop", [skipping_scaler, fused_skipping_scaler])
def test_a_skipped_step_leaves_nothing_in_the_next(instrumented, loop):
    loop()
    assert [frame["nonfinite"] for frame in instrumented.frames] == [0.0] * 4
    assert all(math.isfinite(frame["loss"]) for frame in instrumented.frames)


def fused_steps(run, optimizer, losses):
    """One step of a fused ``optimizer`` with a scaler for each of ``losses``."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for loss in losses:
        optimizer.zero_grad()
        run.report(loss=loss)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def fused_model():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    losses = [model(torch.ones(1, 2)).sum() * factor for factor in (1.0, math.inf, 1.0)]
    return optimizer, losses


def test_a_loop_that_is_told_of_us_counts_no_step_that_a_fused_optimizer_skips(captured):
    optimizer, losses = fused_model()
    run = process.start(optimizer)
    fused_steps(run, optimizer, losses)
    run.close()
    assert [(f["step"], f["nonfinite"]) for f in captured.frames] == [(1, 0.0), (2, 0.0)]


class OnDevice:
    """A number that a device delivers a little later."""

    def __init__(self, tensor):
        self.number = tensor.item()
        self.asked = 0

    def ready(self):
        self.asked += 1
        return self.asked > 2

    def value(self):
        return self.number


def test_on_a_device_a_fused_step_counts_but_what_it_skipped_is_not_told(captured, monkeypatch):
    optimizer, losses = fused_model()
    run = process.start(optimizer)
    monkeypatch.setattr(run._loop.scalars, "read_async", OnDevice)
    fused_steps(run, optimizer, losses)
    run.close()
    assert [f["step"] for f in captured.frames] == [1, 2, 3]
    assert [f["nonfinite"] for f in captured.frames] == [0.0] * 3
    for key in ("loss", "gradient_norm"):
        assert [key in f for f in captured.frames] == [True, False, True]


def test_each_step_has_the_loss_of_its_own_optimizer(instrumented):
    ours, others = network(), network()
    of_ours, of_others = (torch.optim.SGD(m.parameters(), lr=0.0) for m in (ours, others))
    x = torch.ones(2, 4)
    for _ in range(3):
        for (factor,) in DataLoader(TensorDataset(torch.tensor([1.0, 3.0]))):
            (ours(x).sum() * 0 + factor).backward()  # two micro-batches, whose mean it is
        of_ours.step()
        (others(x).sum() * 0 + 100).backward()
        of_others.step()
    assert [frame["loss"] for frame in instrumented.frames] == [2.0] * 3


def test_a_loss_of_another_optimizer_that_overflows_is_not_the_steps(instrumented):
    ours, others = network(), network()
    of_ours, of_others = (torch.optim.SGD(m.parameters(), lr=0.0) for m in (ours, others))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x = torch.ones(2, 4)
    for _ in range(3):
        scaler.scale(ours(x).sum() * 0 + 1).backward()
        scaler.step(of_ours)
        scaler.scale(others(x).sum() * math.inf).backward()
        scaler.step(of_others)
        scaler.update()
    assert [frame["loss"] for frame in instrumented.frames] == [1.0] * 3
    assert [frame["nonfinite"] for frame in instrumented.frames] == [0.0] * 3


def test_one_loss_that_two_optimizers_step_by_is_the_steps(instrumented):
    model = network()
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model[::2])
    for i in range(3):
        (model(torch.ones(2, 4)).sum() * 0 + 5).backward()
        if i:
            second.step()  # and then that which sets the steps
        first.step()
    assert [frame["loss"] for frame in instrumented.frames] == [5.0] * 3


@pytest.mark.parametrize(("shares", "loss"), [("false", 2.0), ("true", 8.0)])
def test_losses_are_shares_where_that_is_said(captured, monkeypatch, shares, loss):
    monkeypatch.setenv("ESPER_LOSSES_PRESCALED", shares)
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(4):
            (model(torch.ones(2, 4)).sum() * 0 + 8.0 * torch.tensor(0.25)).backward()
        optimizer.step()
    finally:
        TorchInstrumentor().uninstrument()
    assert [frame["loss"] for frame in captured.frames] == [loss]


def test_optimizers_that_step_on_a_thread_of_autograd_leave_the_loop_its_own(instrumented):
    model = network()
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}

    def step(parameter):
        # As on CUDA, where backward runs on a thread of its device.
        thread = threading.Thread(target=optimizers[parameter].step)
        thread.start()
        thread.join()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    losses = []
    for x, y in data():
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
    assert [frame["loss"] for frame in instrumented.frames] == losses
    assert all("input_wait_ms" in frame for frame in instrumented.frames)


@pytest.mark.parametrize("mode", ["advise", "enforce"])
def test_the_rate_is_that_of_the_step_where_a_schedule_steps_within_backward_too(
    captured, monkeypatch, mode
):
    monkeypatch.setenv("ESPER_MODE", mode)
    TorchInstrumentor().instrument(skip_dep_check=True)
    model = nn.Linear(4, 1)
    optimizers, schedules, used = {}, {}, []
    for parameter in model.parameters():
        optimizer = optimizers[parameter] = torch.optim.SGD([parameter], lr=0.1, momentum=0.5)
        schedules[parameter] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()
        schedules[parameter].step()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    try:
        for _ in range(4):
            used.append(schedules[model.bias].get_last_lr()[0])
            model(torch.ones(2, 4)).square().mean().backward()
    finally:
        TorchInstrumentor().uninstrument()
    assert [frame["optimizer_lr"] for frame in captured.frames] == pytest.approx(used)


def test_a_backward_that_fails_after_an_optimizer_stepped_in_it_hides_no_later_step(
    instrumented,
):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def fails(_):
        optimizer.step()
        raise RuntimeError("the user's own")

    handle = model.weight.register_post_accumulate_grad_hook(fails)
    with pytest.raises(RuntimeError, match="the user's own"):
        model(torch.ones(2, 4)).sum().backward()
    handle.remove()
    for _ in range(2):
        optimizer.step()
    assert [frame["step"] for frame in instrumented.frames] == [1, 2]


def test_the_loss_of_a_closure_is_that_which_step_returns(instrumented):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x = torch.ones(8, 4)

    def evaluate():
        optimizer.zero_grad()
        loss = (model(x) - 3).square().mean()
        loss.backward()
        return loss

    returned = [optimizer.step(evaluate).item() for _ in range(3)]
    assert [frame["loss"] for frame in instrumented.frames] == returned


def test_gradients_that_a_fused_optimizer_gets_scaled_are_told_unscaled(instrumented):
    def norms(scale):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for x, y in data(n=16):
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return instrumented.frames[-1]["gradient_norm"]

    assert norms(1024.0) == pytest.approx(norms(1.0))


@pytest.mark.parametrize("loop", [validation_between, validation_between_tensors])
def test_an_evaluation_between_steps_is_in_no_time_of_the_next(instrumented, loop):
    loop()
    latencies = [frame["step_latency_ms"] for frame in instrumented.frames[1:]]
    beyond = [ms - took.ms for ms, took in zip(latencies, STOPWATCH.steps(), strict=True)]
    # Each evaluation slept for 15 ms. Where another process gets the processor between the
    # readings of both clocks, one step seems longer and the next one shorter by that.
    assert median(beyond) == pytest.approx(0, abs=5)


def test_samples_of_an_evaluation_are_not_counted(instrumented):
    validation_between()
    for frame in instrumented.frames[1:]:
        assert frame["samples_per_s"] * frame["step_latency_ms"] / 1e3 == pytest.approx(16)


def test_a_step_without_a_loader_has_nothing_of_the_evaluations(instrumented):
    validation_between_tensors()
    for frame in instrumented.frames:
        assert not frame.keys() & {"input_wait_ms", "samples_per_s"}


def test_fetches_on_another_thread_are_not_the_loops_wait(instrumented):
    plain(from_a_thread(data()), epochs=1)
    assert not any("input_wait_ms" in frame for frame in instrumented.frames[2:])


def test_a_script_that_never_trains_records_nothing(instrumented):
    model = network()
    with torch.no_grad():
        for x, _ in data():
            model(x)
    assert instrumented.frames == []


def test_what_is_given_by_name_is_passed_on_as_it_is(instrumented):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model(torch.ones(2, 4)).sum()
    torch.autograd.backward(tensors=loss)
    nn.utils.clip_grad_norm_(parameters=model.parameters(), max_norm=1.0)
    optimizer.step()
    (frame,) = instrumented.frames
    assert frame["loss"] == loss.item()
