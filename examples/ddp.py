"""The CNN of ``examples/digits.py`` on several processes, with DistributedDataParallel.

An ordinary training script: it knows nothing of esper-otel.

    torchrun --nproc-per-node 2 -m examples.ddp [--epochs 10] [--seed 0]
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from examples.digits import DigitsNet, evaluate, load
from examples.fingerprint import fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)  # as many processes as there are share the processors
    torch.manual_seed(options.seed)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    train, test = load(options.seed)
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
        train, seed=options.seed
    )
    loader = DataLoader(train, batch_size=64, sampler=sampler)
    model = DigitsNet()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=2e-3)

    losses = []
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(parallel(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())

    dist.destroy_process_group()
    # In one call, so that the lines of several ranks do not mix.
    told = f"rank {rank}: test accuracy {evaluate(model, test):.4f}\n"
    print(f"{told}rank {rank}: {fingerprint(model, losses)}\n", end="", flush=True)


if __name__ == "__main__":
    main()
