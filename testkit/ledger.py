"""A ledger: what a training loop counts by itself, and the pieces that such loops are made of.

Nothing here knows of us: the norm of all gradients before anything is done to them, and the
rate that the script set and that the update used, as a probe within the optimizer's own
``step`` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

STEPS = 12
BATCH = 8
Parameters = Iterable[Tensor]


class Ledger:
    """What a loop counted by itself.

    Of several optimizers ``used`` and ``own`` have the rates of the one that sets the steps,
    and ``others`` pairs of those that the others used and were set.
    """

    def __init__(self) -> None:
        self.losses: list[float | None] = []
        self.norms: list[float | None] = []
        self.own: list[float | None] = []
        self.used: list[float | None] = []
        self.others: list[tuple[float | None, float | None]] = []
        self.weights: list[Tensor] = []
        self._set: dict[int, float | None] = {}

    def probed(self, kind: Any, *, primary: bool = True) -> Any:
        """A class like ``kind`` whose updates are noted, below all hooks of ``step``."""
        own_step = kind.step
        while getattr(own_step, "hooked", False):
            own_step = own_step.__wrapped__
        ledger = self

        class Probed(kind):  # type: ignore[misc]
            def step(self, *args: Any, **kwargs: Any) -> Any:
                used, own = rate_of(self), ledger._set.pop(id(self), None)
                if primary:
                    ledger.used.append(used)
                else:
                    ledger.others.append((used, own))
                return own_step(self, *args, **kwargs)

        Probed.__name__ = Probed.__qualname__ = kind.__name__
        return Probed

    def step(
        self, optimizer: Any, loss: Any, norm: float | None, *, primary: bool = True
    ) -> None:
        """``optimizer`` is about to step, the rates being those of the script."""
        own = rate_of(optimizer)
        self._set[id(optimizer)] = own
        if primary:
            self.own.append(own)
            self.norms.append(norm)
            self.losses.append(loss.item() if isinstance(loss, Tensor) else loss)

    def end(self, *modules: nn.Module) -> None:
        """All steps have been made."""
        self.weights = [p.detach().clone() for m in modules for p in m.parameters()]


def rate_of(optimizer: Any) -> float | None:
    """Mean rate of its groups, None where one has none."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return None if None in rates else sum(map(float, rates)) / len(rates)


def norm_of(parameters: Parameters) -> float:
    """Of all their gradients, in double precision."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def network(inputs: int = 4, outputs: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def samples(n: int = STEPS * BATCH) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return x, x.sum(1, keepdim=True) * 3


def loader(n: int = STEPS * BATCH, batch: int = BATCH) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(n)), batch_size=batch)


def drawn() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches that no loader gives, as nanoGPT's ``get_batch``."""
    x, y = samples(4 * STEPS * BATCH)
    for i in range(0, len(x), BATCH):
        yield x[i : i + BATCH], y[i : i + BATCH]


def train(
    ledger: Ledger,
    model: nn.Module,
    optimizer: Any,
    before_step: Callable[[], Any] = lambda: None,
    *,
    after_step: Callable[[], Any] = lambda: None,
    batches: Iterable[Any] | None = None,
) -> None:
    """The plainest loop; ``before_step`` is done to the gradients."""
    for x, y in loader() if batches is None else batches:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = norm_of(model.parameters())
        before_step()
        ledger.step(optimizer, loss, norm)
        optimizer.step()
        after_step()
    ledger.end(model)
