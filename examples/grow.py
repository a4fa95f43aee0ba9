"""A CNN that is too small for its task grows until it is not.

An ordinary training script with one more line: a garden is planted in the host. The loss
stops falling, a seed germinates, learns beside the host without touching it, blends in and
becomes part of the network; then the next one.

    python -m examples.grow [--epochs 80] [--seed 0] [--asked]

The garden decides by itself here. With ``--asked``, which is what a garden does unless told
otherwise, every step of a seed needs Tamiyo's consent: start ``tamiyo serve`` beside it.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import esper_otel
from examples.digits import evaluate, load

SLOTS = ("features.2", "features.5")


class TooSmall(nn.Module):
    """Two convolutions of ``narrow`` and ``wide`` channels, for 8×8 grey images."""

    def __init__(self, narrow: int = 3, wide: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, narrow, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(narrow, wide, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
        )
        self.classify = nn.Linear(wide * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (batch, 10), of images, shape (batch, 1, 8, 8)."""
        logits: Tensor = self.classify(self.features(images).flatten(1))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asked", action="store_true", help="grow by consent only")
    options = parser.parse_args()

    torch.set_num_threads(1)  # the fastest for a network this small
    torch.manual_seed(options.seed)
    train, test = load(options.seed)
    loader = DataLoader(train, batch_size=64, shuffle=True)
    model = TooSmall()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    run = esper_otel.start(optimizer, **({"mode": "enforce"} if options.asked else {}))
    garden = run.plant(
        model,
        SLOTS,
        growth="asked" if options.asked else "autonomous",
        plateau_steps=60,
        kernel_budget_ms=1000,  # training keeps the processors busy, and so may others,
        step_rise_max=100,  # and what grows here should not depend on that
    )

    shown = garden.stages
    for epoch in range(options.epochs):
        for images, labels in run.batches(loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            run.report(loss=loss)
            optimizer.step()
        if garden.stages != shown or epoch == options.epochs - 1:
            shown = garden.stages
            seeds = ", ".join(f"{seed} {stage.name}" for seed, stage in shown.items())
            accuracy = evaluate(model, test)
            print(f"epoch {epoch:3}  test accuracy {accuracy:.4f}  {seeds or 'no seeds'}")
    run.close()


if __name__ == "__main__":
    main()
