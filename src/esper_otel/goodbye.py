"""Goodbye: how a run ended, read from the interpreter and reported to Tamiyo and the stream.

It is said once behind each last step: to the sidecar over the decision socket, and in the
stream, where a Collector may bring it to a sidecar that is not asked. A step that is made all
the same takes it back, and then there is another end. A process that is killed, and one that
leaves by ``os._exit``, says nothing.
"""

from __future__ import annotations

import builtins
import sys
import threading
from functools import wraps
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Self

from esper_otel.leyline.custom import custom_key
from esper_otel.leyline.endings import HowEnded, RunEnd, end_by, end_by_status
from esper_otel.leyline.frames import StepFrame

if TYPE_CHECKING:
    from esper_otel.run import Run

Ending = RunEnd | None
"""How a run ended; None: nobody is told."""

DONE = RunEnd(HowEnded.DONE)
INTERRUPTED = RunEnd(HowEnded.INTERRUPTED)


class Closing:
    """An object that a ``with`` closes, together with the exception that ended the block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error=error)

    def close(
        self, timeout_s: float | None = None, *, error: BaseException | None = None
    ) -> Any:
        """End it; ``error`` is the exception that ended the block."""
        raise NotImplementedError


class LastWords:
    """The last words of ``run``."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._said_of = 0
        # Not held itself: it holds frames, and what is in them.
        self._handled_at_begin = id(sys.exc_info()[1])

    def say(self, end: Ending) -> None:
        """The run has ended so; custom values that no step followed go with it.

        Nothing is said once more behind the same step, unless there are such values, or of a
        run that nobody has heard of: without a step, or not known to be one. Waits for
        nothing, never raises.
        """
        run = self._run
        run._recorder.catch_up()
        step, clock = run._recorder.step, run._recorder.clock
        if clock.last_end:
            _exits.saw_steps = True
        if end is None or not clock.last_end or run._held is not None:
            return
        own = {custom_key(name): value for name, value in run._recorder.leftover().items()}
        if step == self._said_of and not own:
            return
        time = clock.step_end(perf_counter_ns())
        if run._client is not None and step != self._said_of:
            run._client.say_goodbye(step, time, end)
        self._said_of = step
        whose = (run.run_id, run.instance_id, run.settings.rank)
        run._stream.end(StepFrame(*whose, step, time, own, ended=end))

    def at_hand(self, error: BaseException | None = None) -> RunEnd:
        """How a run ends that is closed just now: by ``error``, else by the exception at hand.

        That is one that passes through a ``finally``, or is handled. One that was handled
        already when the run began says nothing about it.
        """
        handled = sys.exc_info()[1]
        if error is None and handled is not None and id(handled) != self._handled_at_begin:
            error = handled
        return end_by(error)

    def at_exit(self) -> RunEnd:
        """How a run ends with its process, as far as the interpreter tells."""
        error = sys.exc_info()[1]
        if error is None and not _is_interactive():  # there, errors do not end the process
            error = _last_error()
        if error is not None:
            return end_by(error)
        recorder = self._run._in_use  # of the training that stepped last
        recorder.catch_up()
        clock = recorder.clock
        return end_by_status(_exits.status_after(clock.last_end - clock.offset))


class _Exits:
    """Hears of the status that the script gives to ``sys.exit``.

    The interpreter keeps it from whoever is called at exit, and a script that catches what
    went wrong, writes it down and exits with 1 has not ended well.
    """

    def __init__(self) -> None:
        self.saw_steps = False
        """Whether a run that has ended had a step."""
        self._original: Any = None
        self._ours: Any = None
        self._status: object = None
        self._mark = 0

    def watch_exits(self) -> None:
        """From here on, until :meth:`leave_exits`."""
        if self._ours is not None:
            return
        original = sys.exit

        @wraps(original)
        def noting(status: Any = None, /) -> Any:
            if threading.current_thread() is threading.main_thread():
                self._status, self._mark = status, perf_counter_ns()
            return original(status)

        self._original, self._ours = original, noting
        sys.exit = noting

    def leave_exits(self) -> None:
        """``sys.exit`` is again what it was, unless somebody has put another in its place."""
        if self._ours is not None and sys.exit is self._ours:
            sys.exit = self._original
            self._ours = None

    def status_after(self, mark: int) -> object:
        """The status that was given last; None, which is success, if that was before ``mark``.

        Then somebody has caught it, and the training went on.
        """
        return self._status if self._mark > mark else None

    @property
    def ended_well(self) -> bool:
        """Whether the process ends without an error, as far as is known."""
        return _last_error() is None and end_by_status(self._status).how is HowEnded.DONE


_exits = _Exits()
watch_exits = _exits.watch_exits
leave_exits = _exits.leave_exits


def ended_without_steps() -> bool:
    """Whether this process ends well, and none of its runs has had a step."""
    return _exits.ended_well and not _exits.saw_steps


def _last_error() -> BaseException | None:
    """What nobody has caught, and the interpreter has shown."""
    # last_exc is of Python 3.12 and later.
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)


def _is_interactive() -> bool:
    """Whether this is a prompt or a notebook, where the process outlives errors."""
    return (
        hasattr(sys, "ps1") or bool(sys.flags.interactive) or hasattr(builtins, "get_ipython")
    )
