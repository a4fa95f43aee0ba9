"""Loops of public kinds, recorded and enforced, against the account they keep themselves.

A part of :mod:`bench.awkward`. Each loop of :mod:`testkit.public_loops` and
:mod:`testkit.public_frameworks` trains three times from one seed: bare, recorded, and
enforced by a sidecar whose table scales the learning rate once. Counted is what is not as the
loop says: steps, losses, gradient norms, rates, weights, and what its optimizers used.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from esper_otel.integrations.torch import TorchInstrumentor
from esper_otel.stream import read_frames
from testkit.ledger import Ledger
from testkit.public_frameworks import PUBLIC_FRAMEWORKS
from testkit.public_loops import PUBLIC

CUT, FACTOR = 4, 0.25
"""The step about which the rate is scaled, and by what."""
TABLE = f"""version: scaled-once
rules:
  - id: scaled_once
    metric: step
    at_least: {CUT}
    cooldown: 2147483647
    severity: HIGH
    action: OPTIMIZER
    parameters: {{lr_scale: {FACTOR}}}
    text: fires once
"""
SAME = 1e-5
"""Relative difference of two numbers that are the same, one of them in single precision."""

Loop = Callable[[Ledger], None]
Values = Sequence[float | None]
Frames = list[dict[str, float]]


def every_loop() -> Iterator[tuple[str, Loop]]:
    """Those whose framework is installed."""
    yield from PUBLIC.items()
    for name, (module, loop) in PUBLIC_FRAMEWORKS.items():
        if find_spec(module) is None:
            print(f"{module} is not installed: {name} is left out")
        else:
            yield name, loop


def account(folder: Path) -> tuple[int, Counter[str]]:
    """How many loops there are, and how often something was not as they say, by kind.

    Each that was is printed.
    """
    wrong: Counter[str] = Counter()
    loops = list(every_loop())
    with sidecar(folder) as socket:
        for number, (name, loop) in enumerate(loops):
            found = differences(loop, folder / str(number), socket)
            for kind, times in found.items():
                print(f"{name}: {kind}: {times} not as the loop says")
            wrong += found
    return len(loops), wrong


def differences(loop: Loop, folder: Path, socket: str) -> Counter[str]:
    """What of ``loop`` is not as it says, by kind."""
    bare = kept(loop)
    with environment(ESPER_RECORDING_DIR=str(folder)):
        watched = instrumented(loop, mode="off")
    frames = frames_of(folder)
    enforced = instrumented(
        loop,
        mode="enforce",
        tamiyo_socket=socket,
        tamiyo_deadline_ms=5000,
        release_steps=10**6,
        run_id=f"loop-{folder.name}",
    )
    found: Counter[str] = Counter()
    found["steps"] = abs(len(frames) - len(watched.losses))
    for kind, key, values in (
        ("losses", "loss", watched.losses),
        ("norms", "gradient_norm", watched.norms),
        ("rates", "optimizer_lr", watched.used),
    ):
        told = [frame.get(key) for frame in frames]
        found[kind] = sum(not same(a, b) for a, b in zip(told, values, strict=False))
    pairs = zip(bare.weights, watched.weights, strict=True)
    found["weights"] = sum(not torch.equal(a, b) for a, b in pairs)
    found["factors"] = unscaled(enforced)
    return +found


def unscaled(ledger: Ledger) -> int:
    """Updates that were made with another rate than the script's times the factor in force."""
    wrong = sum(
        not same(used, scaled(own, FACTOR if step > CUT else 1.0))
        for step, (used, own) in enumerate(zip(ledger.used, ledger.own, strict=False), 1)
    )
    cycles = len(ledger.own)
    for place, (used, own) in enumerate(ledger.others):
        cycle = place * cycles // len(ledger.others) + 1
        if cycle != CUT:  # there it is a matter of which backward it follows
            wrong += not same(used, scaled(own, FACTOR if cycle > CUT else 1.0))
    return wrong


def scaled(rate: float | None, factor: float) -> float | None:
    return None if rate is None else rate * factor


def same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=SAME, abs_tol=1e-12)


def kept(loop: Loop) -> Ledger:
    torch.manual_seed(0)
    ledger = Ledger()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of frameworks, about one another
        loop(ledger)
    return ledger


def instrumented(loop: Loop, **settings: object) -> Ledger:
    TorchInstrumentor().instrument(skip_dep_check=True, **settings)
    try:
        return kept(loop)
    finally:
        TorchInstrumentor().uninstrument()


def frames_of(folder: Path) -> Frames:
    files = sorted(folder.glob("*.metrics.otlp"), key=lambda file: (len(file.name), file.name))
    return [frame.values for file in files for frame in read_frames(file)]


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


@contextlib.contextmanager
def sidecar(folder: Path) -> Iterator[str]:
    """Yields the socket of one that scales every run's rate once."""
    table, socket = folder / "table.yaml", folder / "own" / "tamiyo.sock"
    table.write_text(TABLE)
    command = [str(Path(sys.executable).parent / "tamiyo"), "serve", "--no-ingest"]
    command += ["--table", str(table), "--socket", str(socket)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield str(socket)
        finally:
            process.terminate()
