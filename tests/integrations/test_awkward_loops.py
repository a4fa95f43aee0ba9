"""Loops as people really write them: steps counted as taken, and time that adds up.

Each loop returns how many steps its optimizer really took. What is common to all of them
is held once for each; what is special about one follows below.
"""

import math
import queue
import threading
import time

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # noqa: E402

from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402

PHASES = ("input_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "hook_latency_ms")


@pytest.fixture
def instrumented(captured):
    TorchInstrumentor().instrument(skip_dep_check=True)
    yield captured
    TorchInstrumentor().uninstrument()


def data(n=96, batch_size=16, **options):
    x = torch.linspace(-1, 1, n * 4).reshape(n, 4)
    return DataLoader(
        TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size, **options
    )


def network():
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))


def learn(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def plain(loader=None, make=lambda p: torch.optim.SGD(p, lr=0.01), epochs=2):
    model = network()
    optimizer = make(model.parameters())
    taken = 0
    for _ in range(epochs):
        for x, y in data() if loader is None else loader:
            learn(model, optimizer, x, y)
            taken += 1
    return taken


def accumulation():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    taken = 0
    for i, (x, y) in enumerate(data(batch_size=8)):
        (nn.functional.mse_loss(model(x), y) / 4).backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
            taken += 1
    return taken


def skipping_scaler():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    taken = 0
    for i, (x, y) in enumerate(data()):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        scaler.scale(loss * math.inf if i in (0, 3) else loss).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        taken += any(
            not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
        )
    assert taken == 4
    return taken


def closure():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    taken = 0
    for x, y in data():

        def evaluate(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(evaluate)
        taken += 1
    return taken


def generator_and_critic(critic_steps=1):
    generator, critic = network(), nn.Linear(1, 1)
    of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3)
    cycles = 0
    for x, y in data():
        for _ in range(critic_steps):
            of_critic.zero_grad()
            (critic(generator(x).detach()) - critic(y)).mean().backward()
            of_critic.step()
        of_generator.zero_grad()
        (-critic(generator(x)).mean()).backward()
        of_generator.step()
        cycles += 1
    return cycles


def generator_first():
    """A primary that rests for five steps of another in each cycle."""
    generator, critic = network(), nn.Linear(1, 1)
    of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3)
    cycles = 0
    for x, y in data():
        of_generator.zero_grad()
        (-critic(generator(x)).mean()).backward()
        of_generator.step()
        for _ in range(5):
            of_critic.zero_grad()
            (critic(generator(x).detach()) - critic(y)).mean().backward()
            of_critic.step()
        cycles += 1
    return cycles


def one_model_after_the_other():
    models = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in models]
    taken = 0
    for model, optimizer in zip(models, optimizers, strict=True):
        for x, y in data():
            learn(model, optimizer, x, y)
            taken += 1
    return taken


def compiled_model():
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return sum(learn(compiled, optimizer, x, y) is not None for x, y in data())


def compiled_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    taken = 0
    for x, y in data():
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        step()
        taken += 1
    return taken


def clipping():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    taken = 0
    for x, y in data():
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        taken += 1
    return taken


def validation_between():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    taken = 0
    for x, y in data():
        learn(model, optimizer, x, y)
        taken += 1
        with torch.no_grad():
            for x, _ in data(batch_size=32):
                model(x)
                time.sleep(0.005)
    return taken


class Numbers(IterableDataset):
    def __iter__(self):
        for i in range(64):
            yield torch.full((4,), i / 64), torch.full((1,), i / 16)


def ahead(loader):
    """A prefetcher that is one batch ahead, as Accelerate's loaders are."""
    batches = iter(loader)
    held = next(batches)
    for batch in batches:
        yield held
        held = batch
    yield held


def from_a_thread(loader):
    """A prefetcher that fetches on a thread of its own."""
    waiting = queue.Queue(2)

    def fetch():
        for batch in loader:
            waiting.put(batch)
        waiting.put(None)

    thread = threading.Thread(target=fetch)
    thread.start()
    while (batch := waiting.get()) is not None:
        yield batch
    thread.join()


def in_a_thread():
    taken = []
    thread = threading.Thread(target=lambda: taken.append(plain()))
    thread.start()
    thread.join()
    return taken[0]


def in_backward():
    """One optimizer per parameter, each stepping as soon as its gradient is there."""
    model = network()
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    taken = 0
    for x, y in data():
        nn.functional.mse_loss(model(x), y).backward()
        taken += 1
    return taken


def by_autograd():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    taken = 0
    for x, y in data():
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        taken += 1
    return taken


LOOPS = {
    "plain": plain,
    "accumulation": accumulation,
    "skipping scaler": skipping_scaler,
    "closure": closure,
    "generator and critic": generator_and_critic,
    "generator first": generator_first,
    "one model after the other": one_model_after_the_other,
    "compiled model": compiled_model,
    "compiled step": compiled_step,
    "clipping": clipping,
    "validation": validation_between,
    "iterable dataset": lambda: plain(DataLoader(Numbers(), batch_size=8)),
    "workers": lambda: plain(data(num_workers=2)),
    "prefetcher": lambda: plain(ahead(data()), epochs=1),
    "prefetching thread": lambda: plain(from_a_thread(data()), epochs=1),
    "training thread": in_a_thread,
    "optimizers in backward": in_backward,
    "autograd.backward": by_autograd,
    "fused": lambda: plain(make=lambda p: torch.optim.AdamW(p, fused=True)),
    "foreach": lambda: plain(make=lambda p: torch.optim.AdamW(p, foreach=True)),
    "schedule-free tensors": lambda: plain(
        make=lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01))
    ),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_steps_are_counted_as_taken_and_their_time_adds_up(instrumented, loop):
    taken = loop()
    frames = instrumented.frames
    assert [frame["step"] for frame in frames] == list(range(1, taken + 1))
    for frame in frames[1:]:
        parts = sum(frame.get(phase, 0.0) for phase in PHASES)
        assert parts == pytest.approx(frame["step_latency_ms"], rel=0.05, abs=0.02)
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


def test_an_evaluation_between_steps_is_in_no_time_of_the_next(instrumented):
    validation_between()
    for frame in instrumented.frames[1:]:
        assert frame["samples_per_s"] * frame["step_latency_ms"] / 1e3 == pytest.approx(16)
    # Each evaluation slept for 15 ms.
    latencies = sorted(frame["step_latency_ms"] for frame in instrumented.frames[1:])
    assert latencies[0] < 15


def test_fetches_on_another_thread_are_not_the_loops_wait(instrumented):
    plain(from_a_thread(data()), epochs=1)
    assert not any("input_wait_ms" in frame for frame in instrumented.frames[2:])


def test_a_script_that_never_trains_records_nothing(instrumented):
    model = network()
    with torch.no_grad():
        for x, _ in data():
            model(x)
    assert instrumented.frames == []
