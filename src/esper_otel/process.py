"""The runs of this process: begun in code, or from outside for all of it.

Of the second kind there is one at most, and then there are no others, so that a step is counted
once; where the process trains several times it has a run beside it for each other training
(:mod:`esper_otel.integrations.jobs`).

A process that forks is not warned of our threads: its children have no use for them, and
what they could hold is made anew there.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_otel.loop import tell_once
from esper_otel.run import Run
from esper_otel.settings import EsperSettings, Mode

_started: weakref.WeakSet[Run] = weakref.WeakSet()
_automatic: Run | None = None


def start(optimizer: Any = None, **settings: Any) -> Run:
    """Begin to record this process's training loop.

    ``optimizer`` defines the run's steps; without one the loop calls :meth:`Run.step`
    itself. ``settings`` are fields of :class:`EsperSettings` and override the environment;
    raises :class:`SettingsError` for an unusable one. Decisions are only reported
    (``mode="advise"``) unless the settings say ``mode="enforce"``::

        run = esper_otel.start(optimizer, mode="enforce", tamiyo_deadline_ms=5.0)

    A further call, such as a notebook cell that runs again, ends the earlier run: that of
    the same optimizer, of one that is gone, or of a loop without one.

    In an already instrumented process (``esper-otel run``) each step still counts once: this
    returns the run of the training that ``optimizer`` belongs to or begins. One warning lists
    ignored settings.
    """
    if _automatic is not None:
        tell_ignored(_automatic.settings, settings)
        jobs = _automatic._jobs
        return _automatic if optimizer is None or jobs is None else jobs.named(optimizer)
    wanted = EsperSettings.from_environment(**settings)
    for before in [run for run in _started if run._loop.gives_way_to(optimizer)]:
        before.close()
    run = Run(wanted)
    _started.add(run)
    if optimizer is not None:
        run._loop.record_steps_of(optimizer)
    if run.enabled and wanted.mode is Mode.ENFORCE and "torch" in sys.modules:
        run._loop.watch_others()
    return run


def tell_ignored(held: EsperSettings, wanted: Mapping[str, Any]) -> None:
    """Warn of those ``wanted`` that differ from ``held``, the settings of the process.

    Raises :class:`SettingsError` for an unknown setting.
    """
    other = held.changed(**wanted)
    ignored = [
        f"{name}={str(getattr(other, name))!r} (active: {str(getattr(held, name))!r})"
        for name in wanted
        if getattr(other, name) != getattr(held, name)
    ]
    if ignored:
        tell_once(f"process is already instrumented; ignoring {', '.join(ignored)}")


def start_automatic(**settings: Any) -> Run:
    """The run of a process that is instrumented from outside; at most one at a time."""
    global _automatic
    if _automatic is None:
        _automatic = Run(EsperSettings.from_environment(**settings), outlives_script=True)
    return _automatic


def automatic() -> Run | None:
    """The run of a process that is instrumented from outside, None where it is not."""
    return _automatic


def end_automatic() -> None:
    """End what :func:`start_automatic` began, if it did."""
    global _automatic
    run, _automatic = _automatic, None
    if run is not None:
        run._end(end=run._goodbye.at_hand())


def end_before_exec() -> None:
    """Send what is unsent: another program is about to take this one's place."""
    if _automatic is not None:
        _automatic._end(end=_automatic._goodbye.at_hand())
    for run in list(_started):
        run.close()


def _forget_in_child() -> None:
    global _automatic
    _automatic = None


os.register_at_fork(after_in_child=_forget_in_child)


class _OnlyOurThreads:
    """Where a filter of warnings has its pattern: matches a warning that is given for us alone.

    Python 3.12 and later warn of a fork in a process that has threads, and count ours. Where
    others are there as well, Python's, torch's or some library's, the warning is theirs and is
    given. 3.12 warns before and 3.13 after what is registered for a fork, so that a filter for
    the time of the fork would not do.
    """

    def match(self, text: str) -> bool:
        """Whether ``text`` is that warning, and nobody else has a thread. Never raises."""
        if " is multi-threaded, use of fork" not in text:
            return False
        running, me = threading.enumerate(), threading.current_thread()
        ours = [each for each in running if each.name.startswith("esper-")]
        others = [each for each in running if each is not me and each not in ours]
        return bool(ours) and not others and _count_threads() <= 1 + len(ours)


def _count_threads() -> int:
    """Threads that the system knows of; 0 where it does not tell."""
    try:
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    except OSError:
        return 0


_FILTER: Any = ("ignore", _OnlyOurThreads(), DeprecationWarning, None, 0)


def _filter_first() -> None:
    """Have our filter before all others, which may have come since."""
    filters: Any = warnings.filters
    if _FILTER in filters:
        filters.remove(_FILTER)
    filters.insert(0, _FILTER)


if sys.version_info >= (3, 12):
    os.register_at_fork(before=_filter_first)
