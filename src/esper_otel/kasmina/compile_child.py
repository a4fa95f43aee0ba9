"""Compile a seed in a process of its own: ``python -m esper_otel.kasmina.compile_child DIR``.

Reads ``module.pt`` in DIR, a module and an input, and leaves there ``forward.pt2`` and
``backward.pt2``, machine code that needs no compiler to be called, and ``plan.json``, which
says what goes in where. The last line on stderr is the cause when it fails.

The tracing follows what AOTAutograd does: one graph of forward and backward, cut in two.
Compilers save and restore the process's random state and patch what torch looks like from
Python; here that is nobody's but this process's.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODULE, FORWARD, BACKWARD, PLAN = "module.pt", "forward.pt2", "backward.pt2", "plan.json"


def compile_in(folder: Path) -> None:
    """Compile the module in ``folder``; raises whatever keeps it from being compiled."""
    module, given = torch.load(folder / MODULE, weights_only=False)
    names = [name for name, _ in module.named_parameters()]
    primals = [each.detach().requires_grad_() for each in module.parameters()]
    primals.append(given.detach().requires_grad_())
    with torch.random.fork_rng(devices=[]):
        made = module(given)
    forward, backward = _cut(module, names, primals, torch.zeros_like(made))
    kept, wanted = _plan(forward, backward)
    _keep_only(forward, kept)
    _package(forward, folder / FORWARD)
    _package(backward, folder / BACKWARD)
    (folder / PLAN).write_text(json.dumps({"backward": wanted}))


def _cut(
    module: nn.Module, names: list[str], primals: list[Tensor], tangent: Tensor
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """The graphs of forward and backward, from parameters and input as arguments."""
    from torch._functorch.partitioners import default_partition
    from torch.func import functional_call
    from torch.fx.experimental.proxy_tensor import make_fx

    # The partitioner knows inputs and gradients by these two names.
    def joint(primals: list[Tensor], tangents: Tensor) -> list[Tensor]:
        *parameters, given = primals
        made = functional_call(module, dict(zip(names, parameters, strict=True)), (given,))
        return [made, *torch.autograd.grad(made, primals, tangents, allow_unused=False)]

    graph = make_fx(joint)(primals, tangent)
    forward, backward = default_partition(graph, [*primals, tangent], num_fwd_outputs=1)
    return forward, backward


def _plan(
    forward: torch.fx.GraphModule, backward: torch.fx.GraphModule
) -> tuple[list[int], list[list[Any]]]:
    """Which outputs of ``forward`` it must give back, and what ``backward`` is called with.

    The latter as ``["primal", n]``, ``["saved", n]`` and ``["tangent", 0]`` in the order of
    its arguments; a primal is at hand and needs no way through the machine code.
    """
    primals = [node.name for node in forward.graph.nodes if node.op == "placeholder"]
    outputs = [node.name for node in _outputs(forward)]
    kept = [0]
    wanted: list[list[Any]] = []
    for node in backward.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name.startswith("tangents"):
            wanted.append(["tangent", 0])
        elif node.name in primals:
            wanted.append(["primal", primals.index(node.name)])
        else:
            kept.append(outputs.index(node.name, 1))
            wanted.append(["saved", len(kept) - 2])
    return kept, wanted


def _outputs(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    last = next(node for node in graph.graph.nodes if node.op == "output")
    return list(last.args[0])


def _keep_only(graph: torch.fx.GraphModule, kept: list[int]) -> None:
    last = next(node for node in graph.graph.nodes if node.op == "output")
    last.args = (tuple(last.args[0][each] for each in kept),)
    graph.recompile()


def _package(graph: torch.fx.GraphModule, path: Path) -> None:
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    arguments = tuple(torch.zeros(each.shape, dtype=each.dtype) for each in values)
    with torch.no_grad():
        exported = torch.export.export(graph, arguments)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))


def die_with_parent() -> None:
    """End when the process that started this one does."""
    # Its end of the pipe closes when the trainer ends, however it ends. Not sys.stdin,
    # whose lock this thread would hold when the interpreter closes it.
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Compile in the folder that is named, out of everybody's way."""
    os.nice(19)
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        compile_in(Path(sys.argv[1]))
    except Exception as error:
        words = " ".join(str(error).split())
        sys.exit(f"{type(error).__name__}: {words[:300]}")


if __name__ == "__main__":
    main()
