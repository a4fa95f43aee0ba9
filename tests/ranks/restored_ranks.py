"""Two ranks under DistributedDataParallel whose leader is answered once to go back.

``python restored_ranks.py FOLDER [lonely]``. With ``lonely`` each acts on its own. What each
rank's weights were after each step is left in the folder, and what became of its snapshots.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from msgspec import structs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper_otel
from esper_otel.leyline import wire
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, decision_about

ASKED, STEPS, EVERY = 30, 45, 10


def asks_once(request: wire.Ask) -> list[bytes]:
    if request.step != ASKED:
        return all_is_well(request)
    asked = {"restore": 1.0, "lr_scale": 0.5}
    decision = structs.replace(decision_about(request), parameters=asked)
    return [wire.encode(wire.Answer(request.request_id, decision))]


def train(rank: int, folder: Path, lonely: bool) -> None:
    torch.manual_seed(rank)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    socket = folder / f"{rank}.sock"
    after = []
    with FakeSidecar(socket, asks_once):
        run = esper_otel.start(
            optimizer,
            mode="enforce",
            tamiyo_socket=str(socket),
            tamiyo_deadline_ms=20_000,
            snapshot_every=EVERY,
            ranks_agree=not lonely,
            rank=rank,
            world_size=2,
            run_id="two",
            summary="off",
        )
        if not lonely:
            run.agree()
        for _ in range(STEPS):
            x = torch.randn(16, 4)  # each rank's own
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            loss.backward()
            run.report(loss=loss)
            optimizer.step()
            moments = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
            bits = [*model.parameters(), *moments]
            data = b"".join(each.detach().numpy().tobytes() for each in bits)
            after.append(zlib.crc32(data))
        report = run._responses.restoring.report
        run.close()
    told = {"after": after, "restored": report.restored, "refused": report.refused}
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def main(folder: Path, lonely: bool) -> int:
    import torch._dynamo  # noqa: F401  (as DDP does in each rank, which takes seconds)

    ranks = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                train(rank, folder, lonely)
                status = 0
            finally:
                os._exit(status)
        ranks.append(pid)
    return max(os.waitpid(pid, 0)[1] for pid in ranks)


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1]), "lonely" in sys.argv)))
