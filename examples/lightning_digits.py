"""The CNN of ``examples/digits.py`` as a Lightning module.

An ordinary training script: it knows nothing of esper-otel, and needs no callback under
``esper-otel run``.

    python -m examples.lightning_digits [--epochs 10] [--seed 0]
"""

import argparse

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.digits import DigitsNet, load
from examples.fingerprint import fingerprint


class Classifier(pl.LightningModule):
    """Learns to tell digits; keeps the loss of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = DigitsNet()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Cross-entropy of one batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Share of one batch that is told right."""
        images, labels = batch
        right = self.network(images).argmax(1) == labels
        self.log("accuracy", right.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on everything."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, test = load(options.seed)
    model = Classifier()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        gradient_clip_val=5.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=450)
    )
    print(f"test accuracy {trainer.callback_metrics['accuracy']:.4f}")
    print(fingerprint(model, model.losses))


if __name__ == "__main__":
    main()
