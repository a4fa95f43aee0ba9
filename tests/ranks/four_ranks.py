"""A training script for torchrun that knows nothing of us: DDP, then FSDP2, on the CPU.

``four_ranks.py FOLDER STEPS [slow]``. Without torchrun it forks four ranks itself, which
import torch only once. With ``slow`` rank 2's data are slow for a while, and
rank 0 waits twice for the test: to have the sidecar killed, and to have another started.
What each rank saw is left in the folder: losses to the last bit, gradient norms, and the
rates that its updates used, as the optimizer's own step sees them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

SLOW_RANK = 2
SLOW_STEPS = range(20, 50)
SLOW_S = 0.02
KILLED, RESTARTED = 70, 100
"""Steps after which rank 0 waits for the test to have done so."""
ENOUGH = 4000
SHARDED_STEPS = 6


class Rows(Dataset[Tensor]):
    """Each rank's own random rows, one batch a step."""

    def __init__(self, rank: int, slow: bool) -> None:
        self.rank, self.slow = rank, slow

    def __len__(self) -> int:
        return 8 * ENOUGH

    def __getitem__(self, index: int) -> Tensor:
        if self.slow and self.rank == SLOW_RANK and index % 8 == 0:
            time.sleep(SLOW_S if index // 8 + 1 in SLOW_STEPS else 0.0)
        generator = torch.Generator().manual_seed(index * 4 + self.rank)
        return torch.randn(4, generator=generator)


def norm_of(gradients: list[Tensor]) -> float:
    return torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item()


def fork(folder: Path, steps: int) -> int:
    """Four ranks; returns the worst of their exit statuses."""
    import torch._dynamo  # noqa: F401  (as DDP does in each rank, which takes seconds)

    ranks = []
    for rank in range(4):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                where = f"file://{folder}/store"
                dist.init_process_group("gloo", init_method=where, rank=rank, world_size=4)
                train(folder, steps, slow=False)
                status = 0
            finally:
                os._exit(status)
        ranks.append(pid)
    return max(os.waitpid(pid, 0)[1] for pid in ranks)


def train(folder: Path, steps: int, slow: bool) -> None:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    told: dict[str, Any] = {"losses": [], "rates": [], "own_rates": [], "norms": []}
    ddp(folder, rank, steps, slow, told)
    if slow:
        sharded(rank, told)
    (folder / f"rank{rank}.json").write_text(json.dumps(told))


class Probed(torch.optim.SGD):
    """Notes the rates that its updates use."""

    used: list[float]

    def step(self, closure: Any = None) -> Any:
        self.used.append(self.param_groups[0]["lr"])
        return super().step(closure)


def ddp(folder: Path, rank: int, steps: int, slow: bool, told: dict[str, Any]) -> None:
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    )
    optimizer = Probed(model.parameters(), lr=0.05)
    rates = optimizer.used = told["rates"]
    rate_then = None
    for step, x in enumerate(DataLoader(Rows(rank, slow), batch_size=8), start=1):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin())
        loss.backward()
        told["losses"].append(loss.item().hex())
        told["norms"].append(norm_of([p.grad for p in model.parameters()]))
        optimizer.step()
        rate = rates[-1]
        told["own_rates"].append(optimizer.param_groups[0]["lr"])
        if slow and rank == 0 and step in (KILLED, RESTARTED):
            wait_for(folder, "killed" if step == KILLED else "restarted")
        if slow and step == RESTARTED:
            rate_then = rate
        # The rate is that of all ranks, and so is the end.
        if step >= steps and rate != rate_then:
            break


def wait_for(folder: Path, word: str) -> None:
    """Until the test has answered."""
    (folder / f"to be {word}").touch()
    while not (folder / word).exists():
        time.sleep(0.01)


def sharded(rank: int, told: dict[str, Any]) -> None:
    """Half of the steps clip; all tell the norm that a collective of the script's gives."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    for part in (model[0], model[2], model):
        fully_shard(part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(SHARDED_STEPS):
        optimizer.zero_grad()
        model(torch.randn(8, 4) + rank).square().mean().backward()
        told["norms"].append(norm_of([p.grad.full_tensor() for p in model.parameters()]))
        if step >= SHARDED_STEPS // 2:
            nn.utils.clip_grad_norm_(model.parameters(), 1e3)
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    if "RANK" not in os.environ:
        sys.exit(fork(folder, steps))
    dist.init_process_group("gloo")
    train(folder, steps, "slow" in sys.argv[3:])
    dist.destroy_process_group()
