"""Faults: a failing part affects no other part, and is reported once.

What records a training is made of parts (a sender of each signal, spans, probes, files, the
sidecar's client), and the training can do without each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

log = logging.getLogger("esper_otel")

_T = TypeVar("_T")


def alone(part: str, work: Callable[[], _T]) -> _T | None:
    """What ``work`` gives; None when it raises, and people are told that ``part`` is off."""
    try:
        return work()
    except Exception as error:
        log.warning("%s: off for this run, %s: %s", part, type(error).__name__, error)
        log.debug("the fault", exc_info=True)
        return None


def end_each(ends: Iterable[Callable[[], Any]]) -> None:
    """Call all of ``ends``, whichever of them raise. Never raises."""
    for end in ends:
        try:
            end()
        except Exception as error:
            # Whatever it is, what was recorded is still sent.
            log.warning(
                "a part of the run could not be ended, %s: %s", type(error).__name__, error
            )
            log.debug("the fault", exc_info=True)
