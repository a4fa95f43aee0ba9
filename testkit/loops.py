"""Training loops as people really write them, small; for benches and tests.

Each loop of :data:`AWKWARD` trains for a while, knows nothing of us, and returns how many
steps its optimizer really took (with several optimizers: how many cycles). The
:data:`~testkit.stopwatch.STOPWATCH` is on the optimizer whose steps these are.
``python -m testkit.loops NAME`` runs one and prints that number, and what the stopwatch said,
as JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from testkit.stopwatch import STOPWATCH

Batches = Iterable[Any]

PHASES = ("input_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "hook_latency_ms")
"""What the time of a step consists of."""


def unaccounted(values: dict[str, float]) -> float:
    """Milliseconds of a step that are in none of its phases, or in two (then negative)."""
    return values["step_latency_ms"] - sum(values.get(phase, 0.0) for phase in PHASES)


def data(n: int = 96, batch_size: int = 16, **options: Any) -> DataLoader[Any]:
    x = torch.linspace(-1, 1, n * 4).reshape(n, 4)
    return DataLoader(
        TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size, **options
    )


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = backward(model, x, y)
    optimizer.step()
    return loss.item()


def plain(
    loader: Batches | None = None,
    make: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    epochs: int = 2,
) -> int:
    model = network()
    optimizer = STOPWATCH.on(make(model))
    taken = 0
    for _ in range(epochs):
        for x, y in data() if loader is None else loader:
            learn(model, optimizer, x, y)
            taken += 1
    return taken


def accumulation() -> int:
    model = network()
    optimizer = STOPWATCH.on(sgd(model))
    taken = 0
    for i, (x, y) in enumerate(data(batch_size=8)):
        (nn.functional.mse_loss(model(x), y) / 4).backward()  # type: ignore[no-untyped-call]
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
            taken += 1
    return taken


def skipping_scaler(make: Callable[[nn.Module], torch.optim.Optimizer] = sgd) -> int:
    """Two of six losses overflow, so that the scaler skips their steps."""
    model = network()
    optimizer = STOPWATCH.on(make(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    taken = 0
    for i, (x, y) in enumerate(data()):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        scaler.scale(loss * math.inf if i in (0, 3) else loss).backward()  # type: ignore[no-untyped-call]
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        taken += any(
            not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
        )
    if taken != 4:
        raise AssertionError(f"the scaler let {taken} of 6 steps be taken, not 4")
    return taken


def closure() -> int:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    STOPWATCH.on(optimizer)
    taken = 0
    for x, y in data():

        def evaluate(x: Tensor = x, y: Tensor = y) -> float:
            optimizer.zero_grad()
            return backward(model, x, y)  # type: ignore[return-value]

        optimizer.step(evaluate)  # type: ignore[no-untyped-call]
        taken += 1
    return taken


def generator_and_critic(critic_steps: int = 1) -> int:
    generator, critic = network(), nn.Linear(1, 1)
    of_critic, of_generator = STOPWATCH.on(adam(critic)), adam(generator)
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


def generator_first() -> int:
    """A primary that rests for five steps of another in each cycle."""
    generator, critic = network(), nn.Linear(1, 1)
    of_critic, of_generator = adam(critic), STOPWATCH.on(adam(generator))
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


def one_model_after_the_other() -> int:
    models = network(), network()
    optimizers = [STOPWATCH.on(sgd(model)) for model in models]
    taken = 0
    for model, optimizer in zip(models, optimizers, strict=True):
        for x, y in data():
            learn(model, optimizer, x, y)
            taken += 1
    return taken


def compiled_model() -> int:
    model = network()
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = STOPWATCH.on(sgd(model))
    taken = 0
    for x, y in data():
        learn(compiled, optimizer, x, y)
        taken += 1
    return taken


def compiled_step(make: Callable[[nn.Module], torch.optim.Optimizer] = sgd) -> int:
    model = network()
    optimizer = STOPWATCH.on(make(model))

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    taken = 0
    for x, y in data():
        optimizer.zero_grad()
        backward(model, x, y)
        step()
        taken += 1
    return taken


def clipping() -> int:
    model = network()
    optimizer = STOPWATCH.on(sgd(model))
    taken = 0
    for x, y in data():
        optimizer.zero_grad()
        backward(model, x, y)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        taken += 1
    return taken


def validation_between() -> int:
    """An evaluation of 15 ms after every step, of 3 ms."""
    model = network()
    optimizer = STOPWATCH.on(sgd(model))
    taken = 0
    for x, y in data():
        time.sleep(0.003)
        learn(model, optimizer, x, y)
        taken += 1
        evaluate(model)
    return taken


def validation_between_tensors() -> int:
    """The same where training itself has no loader."""
    model = network()
    optimizer = STOPWATCH.on(sgd(model))
    x = torch.ones(16, 4)
    taken = 0
    for _ in range(6):
        time.sleep(0.003)
        learn(model, optimizer, x, x.sum(1, keepdim=True))
        taken += 1
        evaluate(model)
    return taken


def evaluate(model: nn.Module) -> None:
    with STOPWATCH.evaluation(), torch.no_grad():
        for seen, _ in data(batch_size=32):
            model(seen)
            time.sleep(0.005)


def notebook() -> int:
    """Two cells: all is run twice, then training again, interrupted and once more."""
    making = "model = network()\noptimizer = STOPWATCH.on(sgd(model))"
    training = """
for i, (x, y) in enumerate(data()):
    if i == stop:
        raise KeyboardInterrupt
    learn(model, optimizer, x, y)
    taken += 1
"""
    names = globals() | {"taken": 0, "stop": None}
    for cell in (making, training, making, training, training):
        exec(cell, names)
    with contextlib.suppress(KeyboardInterrupt):
        names["stop"] = 3
        exec(training, names)
    names["stop"] = None
    exec(training, names)
    return int(names["taken"])


class Numbers(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(64):
            yield torch.full((4,), i / 64), torch.full((1,), i / 16)


def ahead(loader: Batches) -> Iterator[Any]:
    """A prefetcher that is one batch ahead, as Accelerate's loaders are."""
    batches = iter(loader)
    held = next(batches)
    for batch in batches:
        yield held
        held = batch
    yield held


def from_a_thread(loader: Batches) -> Iterator[Any]:
    """A prefetcher that fetches on a thread of its own."""
    waiting: queue.Queue[Any] = queue.Queue(2)

    def fetch() -> None:
        for batch in loader:
            waiting.put(batch)
        waiting.put(None)

    thread = threading.Thread(target=fetch)
    thread.start()
    while (batch := waiting.get()) is not None:
        yield batch
    thread.join()


def in_a_thread() -> int:
    taken: list[int] = []
    thread = threading.Thread(target=lambda: taken.append(plain()))
    thread.start()
    thread.join()
    return taken[0]


def in_backward() -> int:
    """One optimizer per parameter, each stepping as soon as its gradient is there.

    A step takes 3 ms, for what ``backward`` does behind the last of them is not timed.
    """
    model = network()
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}
    ended = 0

    def step(parameter: Tensor) -> None:
        nonlocal ended
        optimizer = optimizers[parameter]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
        ended = time.perf_counter_ns()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    taken = 0
    for x, y in data():
        time.sleep(0.003)
        backward(model, x, y)
        STOPWATCH.ends.append(ended)
        taken += 1
    return taken


def by_autograd() -> int:
    model = network()
    optimizer = STOPWATCH.on(sgd(model))
    taken = 0
    for x, y in data():
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        taken += 1
    return taken


def fused_skipping_scaler() -> int:
    """A fused optimizer is called at every step, and skips two of them in its kernel."""
    return skipping_scaler(lambda model: torch.optim.AdamW(model.parameters(), fused=True))


def by_adamw(**options: Any) -> int:
    return plain(make=lambda model: torch.optim.AdamW(model.parameters(), **options))


AWKWARD: dict[str, Callable[[], int]] = {
    "plain": plain,
    "accumulation": accumulation,
    "skipping scaler": skipping_scaler,
    "closure": closure,
    "generator and critic": generator_and_critic,
    "generator first": generator_first,
    "one model after the other": one_model_after_the_other,  # two trainings, as in a notebook
    "notebook": notebook,
    "compiled model": compiled_model,
    "compiled step": compiled_step,
    "clipping": clipping,
    "capturable": lambda: compiled_step(
        # No CPU has graphs to capture; what is compiled may say so all the same.
        lambda model: torch.optim.Adam(model.parameters(), capturable=True)
    ),
    "validation": validation_between,
    "validation, training on tensors": validation_between_tensors,
    "iterable dataset": lambda: plain(DataLoader(Numbers(), batch_size=8)),
    "workers": lambda: plain(data(num_workers=2)),
    "prefetcher": lambda: plain(ahead(data()), epochs=1),
    "prefetching thread": lambda: plain(from_a_thread(data()), epochs=1),
    "training thread": in_a_thread,
    "optimizers in backward": in_backward,
    "autograd.backward": by_autograd,
    "fused": lambda: by_adamw(fused=True),
    "fused, skipping scaler": fused_skipping_scaler,
    "foreach": lambda: by_adamw(foreach=True),
    "learning rate in a tensor": lambda: by_adamw(lr=torch.tensor(0.01)),
}
"""Loops by what is awkward about them."""


if __name__ == "__main__":
    taken = AWKWARD[sys.argv[1]]()
    print(json.dumps({"taken": taken, "took": STOPWATCH.steps()}))
