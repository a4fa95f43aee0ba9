"""Loops as people really write them: steps counted as taken, and time that adds up.

Each loop of ``bench/loops.py`` returns how many steps its optimizer really took. What is
common to all of them is held once for each; what is special about one follows below.
"""

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bench.loops import (  # noqa: E402
    AWKWARD,
    data,
    from_a_thread,
    generator_and_critic,
    in_backward,
    network,
    plain,
    skipping_scaler,
    unaccounted,
    validation_between,
    validation_between_tensors,
)
from bench.stopwatch import STOPWATCH  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402


@pytest.fixture
def instrumented(captured):
    STOPWATCH.clear()
    TorchInstrumentor().instrument(skip_dep_check=True)
    yield captured
    TorchInstrumentor().uninstrument()


@pytest.mark.parametrize("loop", AWKWARD.values(), ids=AWKWARD)
def test_steps_are_counted_as_taken_and_their_time_adds_up(instrumented, loop):
    taken = loop()
    frames = instrumented.frames
    assert [frame["step"] for frame in frames] == list(range(1, taken + 1))
    for frame in frames[1:]:
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


def test_a_skipped_step_leaves_nothing_in_the_next(instrumented):
    skipping_scaler()
    assert [frame["nonfinite"] for frame in instrumented.frames] == [0.0] * 4
    assert all(math.isfinite(frame["loss"]) for frame in instrumented.frames)


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
    # Each evaluation slept for 15 ms.
    assert latencies == pytest.approx([took.ms for took in STOPWATCH.steps()], abs=5)


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
