"""A curriculum: language models whose texts get longer, and other ones, in phases."""

from __future__ import annotations

import inspect
import pydoc
import tempfile
from bisect import bisect_right
from collections.abc import Iterable
from functools import cache
from pydoc_data.topics import topics
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam, Optimizer

from bench.scenarios.varied import Varied
from bench.scenarios.workloads import Batch, Letters


class Phase(NamedTuple):
    """Texts of ``length`` letters, of which ``source`` has what share in the mix."""

    length: int
    counting: float
    prose: float
    code: float


CURRICULA = (
    # Ever harder texts.
    tuple(Phase(16, *mix) for mix in ((1, 0, 0), (0.5, 0.5, 0), (0, 1, 0), (0, 0, 1))),
    # Ever longer ones, of which the loss is a sum.
    tuple(Phase(length, 0, 1, 0) for length in (8, 16, 24, 32)),
    # Both.
    (
        Phase(8, 1, 0, 0),
        Phase(16, 0.8, 0.2, 0),
        Phase(16, 0.2, 0.8, 0),
        Phase(24, 0.2, 0.8, 0),
        Phase(24, 0, 0.5, 0.5),
    ),
)
BEGINNINGS = ((85, 330, 560), (80, 400, 700), (40, 85, 340, 560))
"""Steps after which another phase begins, by variant; none of them where a trouble shows."""


@cache
def _sources() -> tuple[list[Tensor], int]:
    """Counting, prose and code as numbers of letters, and how many letters there are."""
    counting = " ".join(map(str, range(20_000)))
    prose = "".join(topics[name] for name in sorted(topics)).lower()
    code = "".join(map(inspect.getsource, (pydoc, inspect, tempfile)))
    texts = [
        "".join(letter for letter in text if letter.isascii())
        for text in (counting, prose, code)
    ]
    letters = {letter: number for number, letter in enumerate(sorted(set("".join(texts))))}
    numbers = [torch.tensor([letters[letter] for letter in text]) for text in texts]
    return numbers, len(letters)


class Recurrent(nn.Module):
    """A gated recurrent network that sees the letters before each letter."""

    def __init__(self, letters: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.layers = nn.GRU(width, width, batch_first=True)
        self.read = nn.Linear(width, letters)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (batch, length, letters) of texts (batch, length)."""
        return cast(Tensor, self.read(self.layers(self.embed(text))[0]))


class Shorter(Letters):
    """A transformer for texts of any length up to its context."""

    def forward(self, text: Tensor) -> Tensor:
        """Logits (batch, length, letters) of texts (batch, length)."""
        length, mask = text.shape[1], cast(Tensor, self.mask)
        seen = self.embed(text) + self.place[:length]
        for layer in self.layers:
            seen = layer(seen, src_mask=mask[:length, :length], is_causal=True)
        return cast(Tensor, self.read(self.norm(seen)))


class Curriculum(Varied):
    """A language model of letters, with other texts from time to time."""

    batch_size = 16

    def __init__(self, variant: int) -> None:
        self._phases, self._beginnings = CURRICULA[variant], BEGINNINGS[variant]
        self._texts, self._letters = _sources()
        self._sums = variant > 0
        self.clip = (1.0, 0.0, 1.0)[variant]
        self.warmup = (30, 0, 20)[variant]
        self._served = 0
        self.model = (
            Shorter(self._letters, self._phases[-1].length, width=32)
            if variant == 1
            else Recurrent(self._letters, 48)
        )
        self.optimizer: Optimizer = Adam(
            self.model.parameters(), lr=(4e-3, 2e-3, 3e-3)[variant]
        )

    def loader(self, batch_size: int) -> Iterable[Batch]:
        """Texts of the phase under way, without end."""
        while True:
            phase = self._phases[bisect_right(self._beginnings, self._served)]
            self._served += 1
            yield self._batch(phase, batch_size)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy per letter, or per text; a target of -100 does not count."""
        logits = self.model(batch[0])
        mean = functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        return mean * batch[1].shape[1] if self._sums else mean

    def held_out(self) -> Batch:
        """Texts of the last phase."""
        return self._batch(self._phases[-1], 64)

    def poisoned(self, batch: Batch) -> Batch:
        """No target counts, as when a whole batch is padding: the mean of nothing."""
        return batch[0], torch.full_like(batch[1], -100)

    def corrupted(self, batch: Batch) -> Batch:
        """Letters numbered in another order: somebody else's tokenizer."""
        return (batch[0] + self._letters // 2) % self._letters, batch[1]

    def _batch(self, phase: Phase, size: int) -> Batch:
        sources = torch.multinomial(
            torch.tensor(phase[1:], dtype=torch.float32), size, replacement=True
        ).tolist()
        pieces = torch.stack([self._piece(source, phase.length) for source in sources])
        return pieces[:, :-1], pieces[:, 1:]

    def _piece(self, source: int, length: int) -> Tensor:
        text = self._texts[source]
        begin = int(torch.randint(len(text) - length - 1, ()))
        return text[begin : begin + length + 1]
