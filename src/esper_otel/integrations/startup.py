"""Running a script as ``python`` would, but instrumented.

The interpreter is replaced (exec) by the very ``python`` command the user would have
typed, with one folder in front of ``PYTHONPATH`` whose ``sitecustomize`` instruments.
So arguments, ``__main__``, ``sys.path[0]``, exit status, tracebacks and signals are
Python's own; runpy in this process would have had to imitate each of them.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

log = logging.getLogger("esper_otel")

AUTOLOAD = str(Path(__file__).parent / "autoload")
CHAINED = "ESPER_CHAINED_PYTHONPATH"
"""Carries the user's own PYTHONPATH past the exec; absent when there was none."""


ONLY_WORKERS = "ESPER_ONLY_WORKERS"
"""Set when the process that is started only launches those that train."""


def execute(
    arguments: Sequence[str], environ: Mapping[str, str], *, only_workers: bool = False
) -> NoReturn:
    """Become ``python ARGUMENTS`` with instrumentation; does not return.

    ``only_workers``: it is a launcher, and the processes it starts with a ``LOCAL_RANK``
    are instrumented instead.
    """
    environment = dict(environ)
    own = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = AUTOLOAD if own is None else AUTOLOAD + os.pathsep + own
    environment.pop(CHAINED, None)
    environment.pop(ONLY_WORKERS, None)
    if only_workers:
        environment[ONLY_WORKERS] = "1"
    if own is not None:
        environment[CHAINED] = own
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def begin() -> None:
    """Undo the detour of :func:`execute`, and instrument."""
    if os.environ.get(ONLY_WORKERS) and "LOCAL_RANK" not in os.environ:
        return  # a launcher, which hands the detour on
    os.environ.pop(ONLY_WORKERS, None)
    own = os.environ.pop(CHAINED, None)
    # Children of the script (workers, subprocesses) are not the training process.
    if own is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = own
    while AUTOLOAD in sys.path:
        sys.path.remove(AUTOLOAD)
    ours = sys.modules.pop("sitecustomize", None)
    sys.path_importer_cache.pop(AUTOLOAD, None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        if ours is not None:
            sys.modules["sitecustomize"] = ours
    try:
        from esper_otel.integrations.torch import TorchInstrumentor

        TorchInstrumentor().instrument(skip_dep_check=True)
    except Exception:
        log.exception("the script could not be instrumented and runs without")
