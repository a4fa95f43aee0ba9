"""A small CNN learns scikit-learn's digits: 1,797 real scans of handwritten digits.

An ordinary training script, without esper-otel in it. Its learning-rate schedule has a
realistic mistake, ``gamma=50`` in place of a lower rate; ``--no-accident`` removes it.

    python examples/digits.py [--epochs 40] [--seed 0] [--no-accident]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class DigitsNet(nn.Module):
    """Two convolutions and a linear layer, for 8×8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
        )
        self.classify = nn.Linear(32 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (batch, 10), of images, shape (batch, 1, 8, 8)."""
        logits: Tensor = self.classify(self.features(images).flatten(1))
        return logits


def load(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Train and test split, stratified, pixels scaled to [0, 1]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, random_state=seed, stratify=digits.target
    )
    return (
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
    )


def evaluate(model: nn.Module, data: TensorDataset) -> float:
    """Share of ``data`` that ``model`` gets right."""
    images, labels = data.tensors
    with torch.no_grad():
        right: Tensor = model(images).argmax(1) == labels
    return float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-accident", dest="accident", action="store_false")
    parser.add_argument("--save", metavar="FILE", help="write losses and weights here")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, test = load(options.seed)
    loader = DataLoader(train, batch_size=64, shuffle=True)
    model = DigitsNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = options.epochs * len(loader)
    accident = [steps // 3] if options.accident else []
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, accident, gamma=50)

    losses = []
    for _ in range(options.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())

    print(f"test accuracy {evaluate(model, test):.4f}")
    if options.save:
        torch.save({"losses": losses, "weights": model.state_dict()}, options.save)


if __name__ == "__main__":
    main()
