"""Console: steps as readable lines, for ``OTEL_METRICS_EXPORTER=console``.

One line a step on standard output, as the specification's console exporter, but with the step's
own words and not with JSON of all its points.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from math import isfinite

from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS, STEP_SLOT
from esper_otel.leyline.stages import Stage
from esper_otel.leyline.terminal import say
from esper_otel.stream.ring import Frames

COLUMNS = (
    "loss",
    "accuracy",
    "gradient_norm",
    "step_latency_ms",
    "samples_per_s",
    "optimizer_lr",
)
"""What is shown of a step where it is known."""

ODD = {"lr_scale": 1.0, "update_skipped": 0.0, "restored": 0.0, "nonfinite": 0.0}
"""What is shown only where it is not this."""

_STAGE, _ALPHA = SEED_KEYS.index("kasmina.seed.stage"), SEED_KEYS.index("kasmina.seed.alpha")

_STAGES = {float(stage): stage.name for stage in Stage}

Printer = Callable[[Frames], None]


def printer(rank: int) -> Printer | None:
    """What prints frames of a rank, None where the environment does not ask for it."""
    value = os.environ.get("OTEL_METRICS_EXPORTER", "")
    if "console" not in {name.strip().lower() for name in value.split(",")}:
        return None
    several = rank > 0 or os.environ.get("WORLD_SIZE", "1") != "1"
    whose = f"rank={rank} " if several else ""
    return lambda frames: say(*(whose + line for line in lines(frames)), flush=True)


def lines(frames: Frames) -> Iterator[str]:
    """A line for each step."""
    first = 0
    for tag, row in zip(frames.steps.tags.tolist(), frames.steps.values.tolist(), strict=True):
        words = [f"step={row[STEP_SLOT['step']]:.0f}", *_words(row)]
        for place in range(first, tag):
            seed = frames.seed_ids[int(frames.seeds.tags[place])]
            words.append(_seed(seed, frames.seeds.values[place].tolist()))
        first = tag
        yield " ".join(words)


def _words(row: Sequence[float]) -> Iterator[str]:
    values = dict(zip(STEP_KEYS, row, strict=True))
    for key in COLUMNS:
        if isfinite(values[key]):
            yield f"{key}={values[key]:.6g}"
    for key, ordinary in ODD.items():
        if isfinite(values[key]) and values[key] != ordinary:
            yield f"{key}={values[key]:.6g}"


def _seed(seed: str, row: Sequence[float]) -> str:
    stage, alpha = row[_STAGE], row[_ALPHA]
    told = [_STAGES[stage]] if stage in _STAGES else []
    if isfinite(alpha) and alpha > 0.0:
        told.append(f"alpha={alpha:.3g}")
    return " ".join([f"{seed}:", *told])
