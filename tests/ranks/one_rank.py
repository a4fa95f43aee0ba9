"""Pairs of ranks of training runs under DistributedDataParallel, started by tests.

``python one_rank.py TOLD``: a JSON object with ``folder`` and ``pairs``, by name: scenarios
that follow one another in the same two processes. All pairs are forked from this process,
which has imported torch once for them, and leave in a folder of theirs what happened. Data,
initial weights and random state differ from rank to rank, as they do in life.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import esper_otel
from esper_otel.kasmina import GardenError, blueprint, isolation
from esper_otel.leyline import wire
from esper_otel.leyline.decisions import NOMINAL, Action, Decision, Severity
from tamiyo.fake_sidecar import FakeSidecar

QUICK = {
    "plateau_steps": 4,
    "plateau_improvement": 0.9,
    "training_steps": 4,
    "blending_steps": 4,
    "shadowing_steps": 2,
    "probation_steps": 2,
    "patience_steps": 50,
    "embargo_steps": 3,
    "loss_rise_max": 10.0,
    "kernel_budget_ms": 30_000.0,
    "step_rise_max": 1e6,
}


def grows(ask: wire.Ask) -> list[bytes]:
    """Do what is proposed."""
    proposal = ask.proposal
    if proposal is None:
        return answered(ask, Action.CONTINUE)
    return answered(
        ask,
        Action.SEED,
        target_seed=proposal.seed_id,
        seed_operation=proposal.operation,
    )


def slows(ask: wire.Ask) -> list[bytes]:
    """Lower the learning rate now and then."""
    scale = 0.5 if ask.step % 5 == 0 else 1.0
    return answered(ask, Action.OPTIMIZER, parameters={"lr_scale": scale})


def answered(ask: wire.Ask, action: Action, **more: Any) -> list[bytes]:
    asked = f"d/{ask.step}", "run", ask.step, ask.step
    decision = Decision(*asked, action, Severity.NORMAL, NOMINAL, **more)
    return [wire.encode(wire.Answer(ask.request_id, decision))]


def digest(tensors: Any) -> int:
    return zlib.crc32(b"".join(each.detach().numpy().tobytes() for each in tensors))


def main(folder: Path, pairs: dict[str, list[Any]]) -> None:
    torch.set_num_threads(1)
    both = {}
    for name, scenarios in pairs.items():
        (folder / name).mkdir()
        both[name] = [forked(rank, folder / name, scenarios) for rank in range(2)]
    for first, second in both.values():
        os.waitpid(first, 0)
        # It may stand still, and then nobody is to wait for it.
        with contextlib.suppress(ChildProcessError):
            os.kill(second, signal.SIGCONT)
            os.waitpid(second, 0)


def forked(rank: int, folder: Path, scenarios: list[Any]) -> int:
    """The process id of a rank that plays the scenarios."""
    pid = os.fork()
    if pid == 0:
        try:
            play(rank, folder, scenarios)
        except BaseException:
            traceback.print_exc()
        finally:
            # Whoever is left alone must not wait for the others at the end.
            os._exit(0)
    return pid


def play(rank: int, folder: Path, scenarios: list[Any]) -> None:
    said = os.open(folder / f"rank{rank}.err", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(said, sys.stderr.fileno())
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    out = []
    for number, scenario in enumerate(scenarios):
        torch.manual_seed(rank)
        socket = folder / f"s{number}"
        with ExitStack() as stack:
            sidecar = None
            if rank == 0:
                reply = grows if "slots" in scenario else slows
                sidecar = stack.enter_context(FakeSidecar(socket, reply))
            out.append(Rank(scenario, rank, sidecar).train(socket))
    (folder / f"rank{rank}.json").write_text(json.dumps(out))


class Probed(torch.optim.SGD):
    """Notes the rates that its updates use."""

    used: list[float]

    def step(self, closure: Any = None) -> Any:
        self.used.append(self.param_groups[0]["lr"])
        return super().step(closure)


class Rank:
    """One rank in one scenario."""

    def __init__(
        self, scenario: dict[str, Any], rank: int, sidecar: FakeSidecar | None
    ) -> None:
        self.scenario = scenario
        self.rank = rank
        self.sidecar = sidecar
        self.host = nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        )
        alone = scenario.get("without_ddp")
        self.model: Any = self.host if alone else DistributedDataParallel(self.host)
        self.optimizer = Probed(self.host.parameters(), lr=0.02, momentum=0.9)
        self.out: dict[str, Any] = {"steps": [], "decisions": [], "rates": [], "longest_s": 0.0}

    def train(self, socket: Path) -> dict[str, Any]:
        run = esper_otel.start(
            self.optimizer,
            mode=self.scenario.get("modes", ["enforce"] * 2)[self.rank],
            tamiyo_socket=str(socket),
            tamiyo_deadline_ms=1000.0,
            ranks_timeout_s=self.scenario.get("timeout_s", 60.0),
            spool_dir=str(socket.parent / "spool"),
            flush_timeout_s=0.0,
        )
        self.out["run"] = run.run_id
        self.optimizer.used = self.out["rates"]
        try:
            if "slots" in self.scenario and "planted_at" not in self.scenario:
                self.plant(run)
            elif not self.scenario.get("by_themselves"):
                run.agree()
            if self.scenario.get("absent") != self.rank:
                self.steps(run)
            if "hears_out" in self.scenario:
                run._sharing.rendezvous._thread.join(60.0)
        except GardenError as error:
            self.out["refused"] = str(error)
        finally:
            run.close()
        seeds = []
        if run.garden is not None:
            slots = [run.garden.slot(path) for path in run.garden.slots]
            seeds = [each for slot in slots for each in slot.hook.parameters()]
        return self.out | {"weights": digest(self.host.parameters()), "seeds": digest(seeds)}

    def plant(self, run: Any) -> None:
        scenario, rank = self.scenario, self.rank
        slots = scenario["slots"][rank]
        Slow.fetch_s = 0.05 if scenario.get("slow") == rank else 0.0
        run.plant(self.host, slots, blueprints=["slow_somewhere"], **QUICK)

    def steps(self, run: Any) -> None:
        scenario, out = self.scenario, self.out
        leak_rank, leak_from = scenario.get("leak", (None, 0))
        for step in range(1, scenario.get("steps", 20_000) + 1):
            for end in (signal.SIGKILL, signal.SIGSTOP):
                if scenario.get(end.name) == [self.rank, step]:
                    os.kill(os.getpid(), end)
            if self.sidecar is not None and scenario.get("deaf_from") == step:
                self.sidecar.close()
            leaks = leak_rank == self.rank and step >= leak_from
            isolation.cut = (lambda activation: activation) if leaks else CUT
            if scenario.get("agrees_at") == step:
                run.agree()
            if scenario.get("planted_at") == step:
                self.plant(run)
            began = time.monotonic()
            self.step(run)
            out["longest_s"] = max(out["longest_s"], time.monotonic() - began)
            slots = [] if run.garden is None else list(run.garden.slots.items())
            named = [[path, stage.name] for path, stage in slots]
            out["steps"].append([step, named, digest(self.host.parameters())])
            decision = run.decision
            out["decisions"].append([decision.action, decision.reason, decision.step])
            # As the stages and rates are the same on all ranks, so is the end.
            if any(name == scenario.get("until") for _, name in named):
                break
            if scenario.get("until_rate", 0) > out["rates"][-1]:
                break

    def step(self, run: Any) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(6, 4)
        loss = nn.functional.mse_loss(self.model(x), target(x))
        loss.backward()
        run.report(loss.detach())
        self.optimizer.step()


CUT = isolation.cut


class Slow:
    """How long a kernel takes to come on this rank."""

    fetch_s = 0.0


@blueprint("slow_somewhere", ranks=(2,))
def slow_somewhere(shape: torch.Size) -> nn.Module:
    time.sleep(Slow.fetch_s)
    return nn.Linear(shape[-1], shape[-1])


def target(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True).sin()


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    main(Path(told["folder"]), told["pairs"])
