"""World: which rank of which run this process is, known before anything is recorded.

torchrun tells its workers their rank in the environment and keeps a store for them; DeepSpeed's
launcher only the first. A script that calls ``esper_otel.start`` after ``init_process_group``
has both from ``torch.distributed``. In that store the ranks agree on a name for the run: the
first to come writes one down, and all take what stands there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from typing import Any, cast

from esper_otel.finalization import FinalizingError, no_shutdown_inside
from esper_otel.leyline.frames import MAX_NAME
from esper_otel.settings import EsperSettings

log = logging.getLogger("esper_otel")

STORE_TIMEOUT_S = 5.0
"""Longest that a run's name is waited for. The store is there before its workers are, and
nobody waits for another rank."""

_LAUNCHER = "deepspeed.launcher.launch"
"""The module that starts the ranks of a host, with ``LOCAL_SIZE`` and ``CROSS_SIZE``."""

_named = 0
"""Runs of this process so far; the ranks begin them in the same order."""


def new_run_id() -> str:
    """A name for a run: readable, sortable, and not from the global random state."""
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)


def usable_run_id(name: str) -> str:
    """``name`` as all of its run's telemetry and requests bear it, the same on every rank.

    A name that has more than :data:`MAX_NAME` characters, which the sidecar refuses, is cut.
    What cannot be printed, or is no text at all, becomes _. Either ends in a hash of the whole
    name then, so that two runs stay two.
    """
    printable = "".join(sign if sign.isprintable() else "_" for sign in name)
    if printable == name and len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{printable[: MAX_NAME - len(digest) - 1]}-{digest}"


def is_shared() -> bool:
    """Whether this process is one of several ranks of ``torch.distributed``, by now."""
    dist = _initialised()
    return dist is not None and dist.get_world_size() > 1


def attempt() -> str:
    """How often torchrun has started these workers again; part of every key in a store."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def with_identity(settings: EsperSettings) -> EsperSettings:
    """``settings`` with rank, size and name of the run; never raises.

    Without several ranks, or where they cannot agree on a name, it is this process's own;
    the second is told. A worker that torchrun started again belongs to another run than
    before: its steps begin anew.
    """
    global _named
    dist = _initialised()
    if settings.world_size == 1 and dist is not None:
        settings = settings.changed(rank=dist.get_rank(), world_size=dist.get_world_size())
    if settings.run_id:
        usable = usable_run_id(settings.run_id)
        if usable != settings.run_id and settings.local_rank <= 0:
            log.warning(
                "run_id=%.60r: expected at most %d printable characters; the run is called %s",
                settings.run_id,
                MAX_NAME,
                usable,
            )
        return settings.changed(run_id=usable)
    name = new_run_id()
    if settings.world_size > 1:
        _named += 1
        try:
            shared = _of_launcher(_named) if dist is None else None
            name = shared or _agreed(f"esper-otel/{attempt()}/run/{_named}", name, dist)
        except (OSError, RuntimeError, ValueError) as error:
            log.warning(
                "rank %d could not agree with the others on a name for their run (%s) and "
                "uses %s: set the same ESPER_RUN_ID on all ranks",
                settings.rank,
                str(error).partition("\n")[0],
                name,
            )
    return settings.changed(run_id=name)


def _initialised() -> Any:
    """``torch.distributed`` where there is a process group, else None; imports nothing."""
    dist: Any = sys.modules.get("torch.distributed")
    # While torch itself is being imported the module is there, and has nothing in it yet.
    if not hasattr(dist, "is_initialized") or not dist.is_initialized():
        return None
    return dist


def _agreed(key: str, name: str, dist: Any) -> str:
    """What stands under ``key``, which is ``name`` if this rank is the first."""
    held: list[bytes | Exception] = []

    def answer() -> bytes | Exception:
        try:
            store = _agents_store() if dist is None else _users_store(dist)
            return cast("bytes", store.compare_set(key, "", name))
        except Exception as error:
            return error

    def write_down() -> None:
        with suppress(FinalizingError), no_shutdown_inside():
            held.append(answer())

    if dist is None:
        # Here and not on the thread: this may be within the import of torch, whose lock
        # the thread would wait for.
        import torch.distributed  # noqa: F401
    # A store that hangs does so in C++, for as long as the user allows it to.
    thread = Thread(target=write_down, name="esper-name", daemon=True)
    thread.start()
    thread.join(STORE_TIMEOUT_S)
    if not held:
        raise TimeoutError(f"their store has not answered within {STORE_TIMEOUT_S:g} s")
    if isinstance(held[0], Exception):
        raise held[0]
    return held[0].decode()


def _of_launcher(number: int) -> str | None:
    """The name of the ``number``-th run of the ranks that DeepSpeed's launcher started here.

    It keeps no store, but starts all ranks of its one training: they have the same name from
    its process id and from when it began. None for ranks of other launchers, or of several
    hosts.
    """
    one_host = os.environ.get("CROSS_SIZE") == "1"
    if not one_host or os.environ.get("LOCAL_SIZE") != os.environ.get("WORLD_SIZE"):
        return None
    import psutil

    with suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            if _LAUNCHER in process.cmdline():
                began = process.create_time()
                key = f"{process.pid} {began:.0f} {attempt()} {number}"
                digest = hashlib.sha256(key.encode()).hexdigest()
                return time.strftime("%Y%m%d-%H%M%S-", time.localtime(began)) + digest[:6]
    return None


def _users_store(dist: Any) -> Any:
    return dist.distributed_c10d._get_default_store()


def _agents_store() -> Any:
    """The store that torchrun's agent keeps for its workers; raises ``ValueError``."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError("they were not started by torchrun, and have no store in common yet")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # TCPStore tells of a connection that fails with a page of C++ frames on stderr.
    socket.create_connection((host, port), STORE_TIMEOUT_S).close()
    return sys.modules["torch.distributed"].TCPStore(
        host,
        port,
        is_master=False,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
        wait_for_workers=False,
    )
