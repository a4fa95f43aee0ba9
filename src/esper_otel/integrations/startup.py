"""Running a script as ``python`` would, but instrumented.

The interpreter is replaced (exec) by the very ``python`` command the user would have
typed, with one folder in front of ``PYTHONPATH`` whose ``sitecustomize`` instruments.
So arguments, ``__main__``, ``sys.path[0]``, exit status, tracebacks and signals are
Python's own; runpy in this process would have had to imitate each of them.
"""

from __future__ import annotations

import atexit
import importlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import NoReturn

from esper_otel.integrations.launching import (
    AUTOLOAD,
    CHAINED,
    ONLY_WORKERS,
    HandsOn,
    leave_path,
    own_call,
    with_detour,
    without_detour,
)
from esper_otel.leyline.terminal import say, say_json

log = logging.getLogger("esper_otel")


def execute(
    command: list[str], environ: Mapping[str, str], *, only_workers: bool = False
) -> NoReturn:
    """Become ``command`` with instrumentation; does not return. Raises :class:`OSError`.

    ``only_workers``: it is a launcher, or may be one, and the Pythons that it starts are
    instrumented as well.
    """
    os.execve(command[0], command, with_detour(environ, only_workers=only_workers))


def begin() -> None:
    """Undo the detour of :func:`execute`, and instrument; within Python's own start.

    Raises what a ``sitecustomize`` of the user's own raises: Python says so, and goes on.
    """
    launched = bool(os.environ.get(ONLY_WORKERS))
    call = own_call()
    if launched and call is not None and call.is_launcher:
        return  # it hands the detour on
    environment = without_detour(os.environ)
    for name in (CHAINED, ONLY_WORKERS, "PYTHONPATH"):
        if name in environment:
            os.environ[name] = environment[name]
        else:
            os.environ.pop(name, None)
    leave_path(sys.path, environment)
    ours = sys.modules.pop("sitecustomize", None)
    sys.path_importer_cache.pop(AUTOLOAD, None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        if ours is not None:
            sys.modules["sitecustomize"] = ours
    finally:
        _instrument(tells=not (launched and call is not None and call.may_idle))


def _instrument(*, tells: bool) -> None:
    """Have torch instrumented once it is there. Never raises."""
    try:
        _plug_closed_streams()
        from esper_otel import process
        from esper_otel.goodbye import watch_exits
        from esper_otel.integrations.torch import TorchInstrumentor

        hands_on = HandsOn(before_exec=process.end_before_exec)
        if tells:
            watch_exits()
            # Before there can be a run, which is at once where torch is imported already: so
            # this comes after all of theirs.
            atexit.register(_tell_nothing, hands_on, os.getpid())
        TorchInstrumentor().instrument(skip_dep_check=True)
        hands_on.put_on()
    except Exception:
        log.exception("the script could not be instrumented and runs without")


def _plug_closed_streams() -> None:
    """Have nothing of ours become standard input, output or error where these are closed.

    What C code writes there would go into a socket or a file of ours. Children get it closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _tell_nothing(hands_on: HandsOn, pid: int) -> None:
    """Say in one line that this process trained nothing that could be seen, and why."""
    try:
        from esper_otel.goodbye import ended_without_steps
        from esper_otel.settings import EsperSettings, Summaries

        if os.getpid() != pid or hands_on.handed or not ended_without_steps():
            return
        settings = EsperSettings.from_environment()
        if settings.summary is Summaries.OFF or settings.rank:
            return
        why = _why_nothing()
        if settings.summary is Summaries.JSON:
            say_json(json.dumps({"steps": 0, "nothing_recorded": why}), file=sys.stderr)
        else:
            say(f"esper-otel: nothing was recorded: {why}", file=sys.stderr, flush=True)
    except Exception:  # at the end of a script that went well
        return


def _why_nothing() -> str:
    from esper_otel.stream import is_disabled

    if is_disabled():
        return "OTEL_SDK_DISABLED is true"
    by_hand = "run = esper_otel.start(), and run.step() after each update"
    if "torch" not in sys.modules:
        return f"the script has not imported torch; for others: {by_hand}"
    return (
        "no optimizer of torch has stepped in this process. For updates without one: "
        f"{by_hand}; if other processes train: esper_otel.start(optimizer) in each"
    )
