"""Workloads: what one is, and three real trainings on data that comes with packages.

============  ===========  ==========================================================
name          a step       what is trained
============  ===========  ==========================================================
``digits``    about 1 ms   a perceptron tells scanned digits apart; SGD with momentum
``prose``     about 20 ms  a transformer guesses the next letter of Python's own help
                           texts; AdamW, a linear warm-up, clipped gradients
``restore``   about 300 ms a convolutional network takes noise out of enlarged scans;
                           Adam
============  ===========  ==========================================================

Their losses begin at about 2.3, 4.5 and 0.1 and come down to about 0.05, 2.5 and 0.01.
All randomness is torch's global generator, seeded once per training: this is a user's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from math import nan
from pydoc_data.topics import topics
from typing import Any, Protocol, cast

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""


class Workload(Protocol):
    """A training, before it begins: what its loop needs, and how its data can go wrong."""

    model: nn.Module
    optimizer: Optimizer
    slots: tuple[str, ...]
    """Submodules in which seeds can grow."""
    clip: float
    """Gradients are clipped to this norm; 0: they are not."""
    warmup: int
    """Steps over which the learning rate rises to its own."""

    batch_size: int
    watched: bool
    """Whether the loop fetches its batches from a loader, which the run then watches."""

    def loader(self, batch_size: int) -> Iterable[Batch]:
        """Batches of one epoch."""

    def loss(self, batch: Batch) -> Tensor:
        """Loss of a batch."""

    def evaluate(self) -> float:
        """Loss on data that is not trained on."""

    def poisoned(self, batch: Batch) -> Batch:
        """The batch as one bad sample makes it: its loss is NaN."""

    def corrupted(self, batch: Batch) -> Batch:
        """The batch when the preprocessing of its inputs is no longer what it was."""


def epochs(work: Workload, batch_size: int) -> Iterator[Batch]:
    """Batches, epoch after epoch, without end."""
    while True:
        yield from work.loader(batch_size)


def mislabelled(batch: Batch, share: float = 1.0) -> Batch:
    """The batch with that share of its targets dealt out anew among themselves."""
    inputs, targets = batch
    count = round(share * len(targets))
    dealt = targets.clone()
    flat = dealt[:count].flatten(0, min(1, dealt.dim() - 1))
    # By sample, and within a text by letter: a text keeps its letters otherwise.
    dealt[:count] = flat[torch.randperm(len(flat))].view_as(dealt[:count])
    return inputs, dealt


@cache
def scans() -> tuple[Tensor, Tensor]:
    """Digits (1797, 1, 8, 8) with pixels from 0 to 1, and which digits they are."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target)


@cache
def _text() -> tuple[Tensor, int]:
    """Python's help texts as numbers of letters, and how many letters there are."""
    text = "".join(topics[name] for name in sorted(topics))
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    return torch.tensor([letters[letter] for letter in text]), len(letters)


class Digits:
    """A perceptron of two hidden layers that classifies scans of digits."""

    slots: tuple[str, ...] = ("2",)
    batch_size = 64
    clip = 0.0
    warmup = 0
    watched = True

    def __init__(self) -> None:
        images, labels = scans()
        order = torch.randperm(len(labels))
        images, labels = images.flatten(1)[order], labels[order]
        self._train = TensorDataset(images[:1350], labels[:1350])
        self._held_out = images[1350:], labels[1350:]
        self.model: nn.Module = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        self.optimizer: Optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.02, momentum=0.9
        )

    def loader(self, batch_size: int) -> DataLoader[Any]:
        """Shuffled scans."""
        return DataLoader(self._train, batch_size, shuffle=True, drop_last=True)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy."""
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def evaluate(self) -> float:
        """Cross entropy of 447 scans."""
        with torch.no_grad():
            return float(self.loss(self._held_out))

    def poisoned(self, batch: Batch) -> Batch:
        """One pixel is NaN."""
        inputs = batch[0].clone()
        inputs[0, 0] = nan
        return inputs, batch[1]

    def corrupted(self, batch: Batch) -> Batch:
        """White on black where it was black on white."""
        return 1 - batch[0], batch[1]


class Letters(nn.Module):
    """A transformer of two layers that sees the letters before each letter."""

    def __init__(self, letters: int, context: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, letters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, text: Tensor) -> Tensor:
        """Logits (batch, context, letters) of texts (batch, context)."""
        seen = self.embed(text) + self.place
        for layer in self.layers:
            seen = layer(seen, src_mask=self.mask, is_causal=True)
        return cast(Tensor, self.read(self.norm(seen)))


class Prose:
    """A language model of letters."""

    context = 48
    slots: tuple[str, ...] = ("layers.0",)
    batch_size = 24
    clip = 1.0
    warmup = 30
    watched = True

    def __init__(self) -> None:
        text, self._letters = _text()
        pieces = text[: len(text) // (self.context + 1) * (self.context + 1)]
        pieces = pieces.view(-1, self.context + 1)
        pieces = pieces[torch.randperm(len(pieces))]
        held_out = pieces[:32]
        self._train = TensorDataset(pieces[32:, :-1], pieces[32:, 1:])
        self._held_out = held_out[:, :-1], held_out[:, 1:]
        self.model: nn.Module = Letters(self._letters, self.context)
        self.optimizer: Optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)

    def loader(self, batch_size: int) -> DataLoader[Any]:
        """Shuffled texts."""
        return DataLoader(self._train, batch_size, shuffle=True, drop_last=True)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy per letter; a target of -100 does not count."""
        logits = self.model(batch[0])
        return functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    def evaluate(self) -> float:
        """Cross entropy of 32 texts."""
        with torch.no_grad():
            return float(self.loss(self._held_out))

    def poisoned(self, batch: Batch) -> Batch:
        """No target counts, as when a whole batch is padding: the mean of nothing."""
        return batch[0], torch.full_like(batch[1], -100)

    def corrupted(self, batch: Batch) -> Batch:
        """Letters numbered in another order: somebody else's tokenizer."""
        return (batch[0] + self._letters // 2) % self._letters, batch[1]


class Restorer(nn.Module):
    """Takes noise out of images: convolutions around a shortcut."""

    def __init__(self, width: int = 60) -> None:
        super().__init__()
        self.open = nn.Conv2d(1, width, 3, padding=1)
        self.layers = nn.Sequential(
            *(
                layer
                for _ in range(4)
                for layer in (nn.Conv2d(width, width, 3, padding=1), nn.GELU())
            )
        )
        self.close = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images of the same shape, (batch, 1, height, width)."""
        return cast(Tensor, images + self.close(self.layers(self.open(images))))


class Restore:
    """An image restorer."""

    slots: tuple[str, ...] = ("layers.3",)
    batch_size = 32
    clip = 0.0
    warmup = 0
    watched = True

    def __init__(self) -> None:
        images, _ = scans()
        images = images[torch.randperm(len(images))]
        large = functional.interpolate(images, size=(32, 32), mode="bilinear")
        self._train = TensorDataset(large[64:], large[64:])
        self._held_out = large[:16]
        self.model: nn.Module = Restorer()
        self.optimizer: Optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def loader(self, batch_size: int) -> DataLoader[Any]:
        """Shuffled clean scans, which are inputs and targets."""
        return DataLoader(self._train, batch_size, shuffle=True, drop_last=True)

    def loss(self, batch: Batch) -> Tensor:
        """Mean square error of what was made of noisy inputs."""
        noisy = batch[0] + 0.3 * torch.randn_like(batch[0])
        return functional.mse_loss(self.model(noisy), batch[1])

    def evaluate(self) -> float:
        """Mean square error on 16 scans."""
        with torch.no_grad():
            return float(self.loss((self._held_out, self._held_out)))

    def poisoned(self, batch: Batch) -> Batch:
        """One pixel is NaN."""
        inputs = batch[0].clone()
        inputs[0, 0, 0, 0] = nan
        return inputs, batch[1]

    def corrupted(self, batch: Batch) -> Batch:
        """Pixels from 0 to 255: nobody divided them."""
        return batch[0] * 255, batch[1]


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "digits": Digits,
    "prose": Prose,
    "restore": Restore,
}
