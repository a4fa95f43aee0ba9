"""What torchrun gives the processes that it starts: a place in the world, and a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta


@contextmanager
def torchrun_ranks(count: int) -> Iterator[list[dict[str, str]]]:
    """The variables of each of ``count`` ranks of one host, and for so long their store."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=300)
    )
    size = str(count)
    shared = {
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": size,
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": size,
    }
    yield [
        {**shared, **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank))}
        for rank in range(count)
    ]
    del store
