"""A small transformer learns to write like Python's language reference, letter by letter.

An ordinary training script: it knows nothing of esper-otel. The text is the one behind
``help("topics")``, so nothing is fetched.

    python -m examples.characters [--steps 400] [--seed 0]
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from examples.fingerprint import fingerprint

CONTEXT = 48
BATCH = 16


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Every stretch of ``CONTEXT`` letters, and the same one letter later."""

    def __init__(self, text: str) -> None:
        self.letters = sorted(set(text))
        number = {letter: i for i, letter in enumerate(self.letters)}
        self._text = torch.tensor([number[letter] for letter in text])

    def __len__(self) -> int:
        return len(self._text) - CONTEXT

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        window = self._text[start : start + CONTEXT + 1]
        return window[:-1], window[1:]


class Writer(nn.Module):
    """A transformer that sees what came before, of two layers unless told otherwise."""

    def __init__(self, letters: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.letter = nn.Embedding(letters, width)
        self.place = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=4 * width, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.next = nn.Linear(width, letters)

    def forward(self, text: Tensor) -> Tensor:
        """Logits, shape (batch, length, letters), of numbered letters, (batch, length)."""
        length = text.shape[1]
        seen = nn.Transformer.generate_square_subsequent_mask(length)
        embedded = self.letter(text) + self.place(torch.arange(length))
        logits: Tensor = self.next(self.layers(embedded, mask=seen, is_causal=True))
        return logits


def load() -> Windows:
    """The topics of ``help()``, as far as they are ASCII."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return Windows(text.encode("ascii", "ignore").decode())


@torch.no_grad()
def written(model: Writer, letters: list[str], length: int, seed: int) -> str:
    """What ``model`` writes of its own accord."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor([[letters.index("\n")]])
    for _ in range(length):
        chances = model(text[:, -CONTEXT:])[:, -1].softmax(-1)
        text = torch.cat([text, torch.multinomial(chances, 1, generator=generator)], 1)
    return "".join(letters[i] for i in text[0].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    text = load()
    sampler = RandomSampler(text, replacement=True, num_samples=options.steps * BATCH)
    model = Writer(len(text.letters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=options.steps
    )

    losses = []
    for letters, following in DataLoader(text, BATCH, sampler=sampler):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(letters).flatten(0, 1), following.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    print(written(model, text.letters, 200, options.seed))
    print(fingerprint(model, losses))


if __name__ == "__main__":
    main()
