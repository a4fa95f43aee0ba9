"""Runs that are cut, what a fresh process makes in their place, and all there is to see."""

import torch
from kasmina.driven import MLP, Driven, agreed, idle

from esper_otel.leyline.stages import Stage

NOT_OF_THE_RUN = "kasmina.seed.last_kernel_latency_ms"
"""Measured with a clock, so no two runs have the same."""

MADE = {"momentum": 0.9, "settings": {"blending_steps": 8, "isolation_every": 3}}


def settled_in(stage, slots=("1", "3"), **settings):
    """A run whose first seed came to ``stage`` and stayed for a step."""
    driven = Driven(slots, momentum=0.9, settings={**MADE["settings"], **settings})
    driven.step()
    driven.garden.germinate("1", MLP, "s")
    if stage is Stage.EMBARGOED:
        driven.until(lambda: driven.garden.stages.get("s") is Stage.TRAINING)
        driven.garden.cull("s")
    decide = idle if stage is Stage.GERMINATED else agreed
    driven.until(lambda: driven.garden.slots["1"] is stage, decide)
    driven.step(idle)
    return driven


def another(driven, **settings):
    """What a fresh process would make, before it goes on."""
    return Driven(
        tuple(driven.garden.slots), momentum=0.9, settings={**MADE["settings"], **settings}
    )


def lived(driven, steps, decide=agreed):
    """Everything that there is to see of the next ``steps`` steps."""
    seen = []
    for _ in range(steps):
        rows = driven.step(decide)
        for row in rows.values():
            row.pop(NOT_OF_THE_RUN, None)
        seen.append((driven.losses[-1], rows, driven.frame.proposal, driven.garden.slots))
    weights = [each.detach().clone() for each in driven.host.parameters()]
    weights += [
        each.detach().clone()
        for path in driven.garden.slots
        for each in driven.garden.slot(path).hook.parameters()
    ]
    return seen, weights


def assert_same_life(one, other):
    """What :func:`lived` saw of both is equal, to the bit."""
    (seen, weights), (seen_after, weights_after) = one, other
    assert seen == seen_after
    assert len(weights) == len(weights_after)
    for a, b in zip(weights, weights_after, strict=True):
        assert torch.equal(a, b)
