"""Recorded scenarios made by hand."""

from math import nan

import numpy as np

from bench.scenarios.recordings import Recorded, ordered
from bench.scenarios.suite import Scenario

HEALTHY = Scenario("digits", "plain", 0)
MS = 1_000_000


def recorded(scenario=HEALTHY, *, steps, seeds=(), wishes=(), at=None, rank=0, world_size=1):
    """One rank: ``steps`` are columns, ``seeds`` are (place of the frame, seed id, values)."""
    count = len(next(iter(steps.values())))
    columns = {"step": range(1, count + 1), **steps}
    ids = list(dict.fromkeys(seed_id for _, seed_id, _ in seeds))
    keys = {key for _, _, values in seeds for key in values}
    return Recorded(
        scenario=scenario,
        rank=rank,
        world_size=world_size,
        at=at,
        load=(0.0, 0.0),
        times=np.arange(1, count + 1, dtype=np.int64) * MS,
        steps=ordered({key: np.array(list(c), np.float64) for key, c in columns.items()}),
        seed_ids=ids,
        seed_frames=np.array([place for place, _, _ in seeds], np.int64),
        seed_numbers=np.array([ids.index(seed_id) for _, seed_id, _ in seeds], np.int64),
        seeds=ordered(
            {key: np.array([values.get(key, nan) for _, _, values in seeds]) for key in keys}
        ),
        wishes=list(wishes),
    )
