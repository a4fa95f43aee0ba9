"""What a host feels of its slots: dormant, isolated, leaking, culled, and with bad seeds.

Needs torch and nothing of the run around it: slots are driven as a garden drives them.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import nan
from time import perf_counter

import torch
from torch import Tensor, nn

from bench.figures import Figure, alternate, median, run
from esper_otel.kasmina import isolation
from esper_otel.kasmina.blending import Convex
from esper_otel.kasmina.blueprints import Blueprint, lookup
from esper_otel.kasmina.hook import SlotHook
from esper_otel.kasmina.kernels import KernelFetcher

BENCH = "isolation"
SLOTS = 8
BLOCKS = 200
BLOCK_STEPS = 5
LEAKS = 20
BUDGET_MS = 10.0
STEPS = 60
GERMINATES_AT = 20
REPEATS = 3  # other work on the machine makes one run's longest step longer, not the median's


def host() -> nn.Sequential:
    """Eight convolutions of 16 channels, on 8×8 images in batches of 64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(SLOTS):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(inplace=True)]
        channels = 16
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 64, 10))


def images(seed: int = 0, samples: int = 64) -> Tensor:
    return torch.randn(
        (samples, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )


def step(model: nn.Module, given: Tensor) -> Tensor:
    """Forward and backward; gradients begin from nothing."""
    for parameter in model.parameters():
        parameter.grad = None
    output: Tensor = model(given)
    output.square().mean().backward()  # type: ignore[no-untyped-call]
    return output.detach()


@contextmanager
def planted(model: nn.Sequential) -> Iterator[list[SlotHook]]:
    """Hooks of slots at all convolutions."""
    hooks = [
        SlotHook(name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d
    ]
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.uproot()


def unequal(a: nn.Module, b: nn.Module, given: Tensor) -> int:
    """Tensors that are not equal to the last bit: the output, and all gradients."""
    outputs = step(a, given), step(b, given)
    count = int(outputs[0].numpy().tobytes() != outputs[1].numpy().tobytes())
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        count += p.grad.numpy().tobytes() != q.grad.numpy().tobytes()
    return count


def timed(model: nn.Module, given: Tensor) -> float:
    """Milliseconds of a step, the median of a few."""
    took = []
    for _ in range(BLOCK_STEPS):
        began = perf_counter()
        step(model, given)
        took.append((perf_counter() - began) * 1e3)
    return median(took)


def dormant() -> list[Figure]:
    model, given = host(), images()

    def with_slots() -> float:
        with planted(model):
            step(model, given)  # the first call is looked at
            return timed(model, given)

    def bare() -> float:
        step(model, given)
        return timed(model, given)

    took, alone = alternate(with_slots, bare, BLOCKS)
    with planted(model):
        differing = unequal(model, host(), given)
    pairs = median([a / b for a, b in zip(took, alone, strict=True)])
    name = f"dormant, {SLOTS} slots: forward and backward"
    return [
        Figure.report(BENCH, name, median(took), "ms", median(alone)),
        Figure.at_most(BENCH, f"{name}, median ratio of pairs", pairs, "times", bar=1.01),
        Figure.at_most(
            BENCH, "dormant: outputs and gradients that differ", differing, "tensors", bar=0
        ),
    ]


def isolated() -> list[Figure]:
    model, given = host(), images()
    with planted(model) as hooks:
        step(model, given)
        for number, hook in enumerate(hooks):
            assert hook.activation is not None
            seed = lookup("bottleneck_conv").build(hook.activation.shape, number)
            hook.attach(seed, Convex())
        differing = unequal(model, host(), given)
    return [
        Figure.at_most(
            BENCH,
            f"{SLOTS} isolated seeds: outputs and gradients that differ",
            differing,
            "tensors",
            bar=0,
        )
    ]


def leaky(activation: Tensor) -> Tensor:
    """The detach that somebody removed."""
    return activation


def leaks() -> list[Figure]:
    model, given = host(), images(samples=4)
    missed = false_alarms = 0
    detach = isolation.cut
    with planted(model) as hooks:
        step(model, given)
        hook = hooks[3]
        assert hook.activation is not None
        hook.attach(lookup("depthwise_conv").build(hook.activation.shape, 1), Convex())
        for leak_at in range(LEAKS):
            for number in range(LEAKS):
                hook.start_step(sample=False)
                isolation.cut = leaky if number == leak_at else detach
                try:
                    step(model, given)
                finally:
                    isolation.cut = detach
                missed += number == leak_at and not hook.leaked
                false_alarms += number != leak_at and hook.leaked
    return [
        Figure.at_most(
            BENCH, f"leaks not seen on their own step, of {LEAKS}", missed, "leaks", bar=0
        ),
        Figure.at_most(
            BENCH,
            f"steps called leaky that were not, of {LEAKS * (LEAKS - 1)}",
            false_alarms,
            "steps",
            bar=0,
        ),
    ]


def culled() -> list[Figure]:
    model, given = host(), images()
    with planted(model) as hooks:
        step(model, given)
        hook = hooks[3]
        assert hook.activation is not None
        hook.attach(lookup("bottleneck_conv").build(hook.activation.shape, 1), Convex())
        hook.set_alpha(0.5)
        optimizer = torch.optim.SGD(
            [*model.parameters(), *hook.parameters()], lr=0.01, momentum=0.9
        )
        for number in range(5):
            step(model, images(number))
            optimizer.step()
        kept = [weakref.ref(it) for it in (hook.seed, hook.blend, *hook.parameters())]
        hook.release()
        del optimizer
        alone = copy.deepcopy(model)
        differing = unequal(model, alone, given)
        gc.collect()
        left = sum(ref() is not None for ref in kept)
    return [
        Figure.at_most(
            BENCH,
            "culled at alpha 0.5: next outputs and gradients that differ from the host alone",
            differing,
            "tensors",
            bar=0,
        ),
        Figure.at_most(BENCH, "culled: of the seed still in memory", left, "objects", bar=0),
    ]


class Does(nn.Module):
    """A seed that does what it is told."""

    def __init__(self, does: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.does = does

    def forward(self, given: Tensor) -> Tensor:
        """What ``does`` makes of it."""
        return self.does(given * self.scale)


def sleeps(shape: torch.Size) -> nn.Module:
    time.sleep(5)
    return Does(lambda h: h)


def fails(shape: torch.Size) -> nn.Module:
    raise RuntimeError("no such weights")


BAD: dict[str, tuple[Callable[[torch.Size], nn.Module], str]] = {
    "that sleeps 5 s": (sleeps, "took longer than 10 ms"),
    "that raises": (fails, "raised RuntimeError: no such weights"),
    "of the wrong shape": (lambda shape: Does(lambda h: h[:, :1]), "returned shape"),
    "of NaN": (lambda shape: Does(lambda h: h * nan), "returned a value that is not finite"),
    # Passes its trial, which is on two samples.
    "of NaN once it is used": (
        lambda shape: Does(lambda h: h * (nan if len(h) > 2 else 1.0)),
        "returned a value that is not finite",
    ),
}


def bad_seed(
    factory: Callable[[torch.Size], nn.Module], fetcher: KernelFetcher
) -> tuple[list[float], str, int]:
    """Milliseconds of each step with such a seed, why it was left out, tensors changed."""
    model, given = host(), images()
    took: list[float] = []
    reasons: list[str] = []
    fetch = None
    with planted(model) as hooks:
        hook = hooks[3]
        step(model, given)
        for number in range(STEPS):
            began = perf_counter()
            step(model, given)
            if number == GERMINATES_AT:
                assert hook.activation is not None
                plan = Blueprint("bad", factory, frozenset({4}))
                fetch = fetcher.request(plan, hook.activation, 1)
            if fetch is not None and fetch.done():
                if fetch.module is not None:
                    hook.attach(fetch.module, Convex())
                    hook.set_alpha(0.5)
                reasons.append(fetch.reason)
                fetch = None
            reasons.append(hook.fallback)
            hook.start_step(sample=False)
            took.append((perf_counter() - began) * 1e3)
        differing = unequal(model, host(), given)
    return took, next((reason for reason in reasons if reason), ""), differing


def bad_seeds() -> list[Figure]:
    fetcher = KernelFetcher(BUDGET_MS)
    figures = []
    untold = changed = 0
    for name, (factory, expected) in BAD.items():
        added = []
        for _ in range(REPEATS):
            took, reason, differing = bad_seed(factory, fetcher)
            added.append(max(took[GERMINATES_AT:]) - median(took[:GERMINATES_AT]))
            untold += not reason.startswith(expected)
            changed += differing
        figures.append(
            Figure.at_most(
                BENCH,
                f"a blueprint {name}: longest step over the median before",
                median(added),
                "ms",
                bar=BUDGET_MS,
            )
        )
    fetcher.stop(timeout_s=6)
    return [
        *figures,
        Figure.at_most(BENCH, "bad blueprints whose reason was not told", untold, "", bar=0),
        Figure.at_most(
            BENCH, "outputs and gradients changed by bad blueprints", changed, "tensors", bar=0
        ),
    ]


def figures() -> list[Figure]:
    torch.set_num_threads(1)
    return [*dormant(), *isolated(), *leaks(), *culled(), *bad_seeds()]


if __name__ == "__main__":
    sys.exit(run(figures))
