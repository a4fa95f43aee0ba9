"""The training that a framework announces: watched from its beginning to its end."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from esper_otel import run as runs
from esper_otel.settings import SettingsError

log = logging.getLogger("esper_otel")


class Training:
    """One training of a framework, as its callbacks tell of it.

    It is watched as zero-code instrumentation would, by the same hooks, for as long as it
    lasts. In a process that is instrumented already, nothing is watched twice: the run
    that is there only learns which optimizer is the one.
    """

    def __init__(self, **settings: Any) -> None:
        self.run: runs.Run | None = None
        """The run; None before the training begins."""
        self._settings = settings
        self._watch: Any = None

    def begin(self, optimizer: Any = None) -> None:
        """Training begins, and ``optimizer`` sets its steps. Never raises."""
        if self._watch is not None:
            return
        try:
            self._begin(optimizer)
        except Exception:
            log.exception("the training could not be watched; it goes on without")

    def _begin(self, optimizer: Any) -> None:
        self.run = run = runs.start(**self._settings)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        if optimizer is not None:
            run.prefer(optimizer)
        if run is not runs.automatic():
            import torch

            from esper_otel.integrations.watch import Watch

            self._watch = Watch(torch, run)

    def share_losses(self) -> None:
        """The framework divides each loss by the number of micro-batches in a step."""
        if self.run is not None:
            self.run.recorder.losses_are_shares()

    def end(self) -> None:
        """Training is over, well or not: send what is unsent, and take everything off.

        Never raises.
        """
        if self.run is not None:
            self.run.prefer(None)
        watch, self._watch = self._watch, None
        if watch is not None and self.run is not None:
            watch.undo()
            try:
                self.run.close()
            except Exception:
                log.exception("the run could not be closed")


def require(framework: str, oldest: str) -> None:
    """Raise :class:`SettingsError` when ``framework`` is older than ``oldest``."""
    installed = version(framework)
    if Version(installed) < Version(oldest):
        raise SettingsError(
            f"{framework} {installed} is too old for this callback: expected {oldest} or newer"
        )
