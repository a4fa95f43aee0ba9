"""Endings: how the run of a trainer ended, as the trainer reports it at the end.

It is said on the decision socket (:class:`esper_otel.leyline.wire.Goodbye`) and in the stream,
as one point of the metric ``tolaria.run.ended``. A process that is killed says nothing.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

MAX_EXCEPTION = 256
"""Longest name of an exception's type that is told, in characters."""

_STATUSES_OF_SIGNALS = frozenset({128 + 2, 128 + 15})
"""Exit statuses by which shells, and scripts with handlers, tell of SIGINT and SIGTERM."""


class HowEnded(StrEnum):
    """How a run ended."""

    DONE = "done"
    EXCEPTION = "exception"
    """An exception ended it, or the process exits with a status other than 0."""
    INTERRUPTED = "interrupted"
    """Somebody ended it: Ctrl-C, or a signal that the script turns into an exception."""


class RunEnd(msgspec.Struct, frozen=True, array_like=True):
    """How a run ended; ``exception`` is the name of the type that ended it, "" if none did."""

    how: HowEnded
    exception: str = ""

    def __str__(self) -> str:
        """In words: ``exception ValueError``."""
        return f"{self.how} {self.exception}".strip()


def run_end(how: str, exception: str = "") -> RunEnd | None:
    """What another process said; None for a way to end that this version does not know."""
    try:
        return RunEnd(HowEnded(how), exception[:MAX_EXCEPTION])
    except ValueError:
        return None


def end_by(error: BaseException | None) -> RunEnd:
    """How a run ended that ``error`` ended; None: nothing was raised."""
    if error is None:
        return RunEnd(HowEnded.DONE)
    if type(error) is SystemExit:
        return end_by_status(error.code)
    how = HowEnded.EXCEPTION if isinstance(error, Exception) else HowEnded.INTERRUPTED
    return RunEnd(how, _name_of(type(error)))


def end_by_status(status: object) -> RunEnd:
    """How a run ended whose process exits with ``status``, as ``sys.exit`` takes it."""
    if status is None or status == 0:
        return RunEnd(HowEnded.DONE)
    by_signal = isinstance(status, int) and status in _STATUSES_OF_SIGNALS
    how = HowEnded.INTERRUPTED if by_signal else HowEnded.EXCEPTION
    return RunEnd(how, "SystemExit")


def _name_of(kind: type[BaseException]) -> str:
    """As ``exception.type`` of OpenTelemetry: with its module, unless that is ``builtins``."""
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"[:MAX_EXCEPTION]
