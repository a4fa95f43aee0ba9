"""The training that a framework announces: watched from its beginning to its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from packaging.version import InvalidVersion, Version

from esper_otel import process
from esper_otel.run import Run, tell_once
from esper_otel.settings import EsperSettings, SettingsError

log = logging.getLogger("esper_otel")


class Training:
    """One training of a framework, as its callbacks tell of it.

    It is watched as zero-code instrumentation would, by the same hooks, for as long as it
    lasts. In a process that is instrumented already, nothing is watched twice: the run
    that is there only learns which optimizer is the one.
    """

    _watching: ClassVar[Training | None] = None
    """The one that has hooks on torch."""

    def __init__(self, **settings: Any) -> None:
        self.run: Run | None = None
        """The run; None before the training begins."""
        self._settings = settings
        self._watch: Any = None
        self._restored: Mapping[str, Any] | None = None

    def begin(self, optimizer: Any = None) -> None:
        """Training begins, and ``optimizer`` sets its steps. Never raises."""
        try:
            self._begin(optimizer)
        except Exception:
            log.exception("the training could not be watched; it goes on without")

    def _begin(self, optimizer: Any) -> None:
        before = Training._watching
        if before is not None:
            # It was interrupted, of which not every framework tells; what it has left on
            # torch would record this training as well.
            before.end()
        automatic = process.automatic()
        self.run = run = self._own_run() if automatic is None else automatic
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        if optimizer is not None:
            run.prefer(optimizer)
        if self._restored is not None:
            run.restore(self._restored)
            self._restored = None
        if automatic is None:
            import torch

            from esper_otel.integrations.watch import Watch

            self._watch = Watch(torch, run)
            Training._watching = self
        elif self._settings:
            process.tell_ignored(run.settings, self._settings)

    def _own_run(self) -> Run:
        return Run(EsperSettings.from_environment(**self._settings))

    def state(self) -> dict[str, Any]:
        """What the framework's checkpoint is to hold of the run.

        Empty where decisions are not applied: then nothing is held, and the checkpoint is
        what it would be without us.
        """
        run = self.run
        return run.state_dict() if run is not None and run.responses.enforcing else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`, now or when the training begins. Never raises."""
        if not state:
            return
        if self.run is None:
            self._restored = state
        else:
            self.run.restore(state)

    def watch_accelerate(self, accelerator: Any) -> None:
        """Put the run into Accelerate's checkpoints, where the hooks on torch are ours."""
        if self._watch is not None:
            self._watch.accelerate(accelerator)

    @property
    def is_watched(self) -> bool:
        """Whether it has hooks of its own on torch: it has begun, and not ended."""
        return self._watch is not None

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
            self.run.recorder.losses_are_shares(self.run.settings.losses_are_shares)
        if Training._watching is self:
            Training._watching = None
        watch, self._watch = self._watch, None
        if watch is not None and self.run is not None:
            watch.undo()
            try:
                self.run.close()
            except Exception:
                log.exception("the run could not be closed")


def save_beside(run: Run, folder: Any, rank: int) -> None:
    """Put what decisions hold into ``folder``, a checkpoint; nothing in ``advise``.

    A file per rank. Raises ``OSError``.
    """
    if run.responses.enforcing:
        _file_in(folder, rank).write_bytes(msgspec.msgpack.encode(run.state_dict()))


def load_beside(run: Run, folder: Any, rank: int) -> None:
    """Go on from what :func:`save_beside` left in ``folder``, if it did. Raises ``OSError``."""
    file = _file_in(folder, rank)
    if not (run.responses.enforcing and file.exists()):
        return
    try:
        state = msgspec.msgpack.decode(file.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        tell_once(f"esper-otel: {file} is not used: {error}")
    else:
        run.restore(state)


def _file_in(folder: Any, rank: int) -> Path:
    return Path(folder) / f"esper_otel_{rank}.msgpack"


def require(framework: str, oldest: str) -> None:
    """Raise :class:`SettingsError` when ``framework`` is older than ``oldest``."""
    fault = _fault_of(framework, oldest)
    if fault is not None:
        raise SettingsError(fault)


def suits(framework: str, oldest: str) -> bool:
    """Whether ``framework`` is not older than ``oldest``; one that is, is told of once."""
    fault = _fault_of(framework, oldest)
    if fault is not None:
        tell_once(f"{fault}; its trainings are recorded as any other loop")
    return fault is None


def _fault_of(framework: str, oldest: str) -> str | None:
    # What was imported, and not what is installed: a source checkout need not be.
    used = str(getattr(import_module(framework), "__version__", ""))
    try:
        if Version(used) >= Version(oldest):
            return None
    except InvalidVersion:
        return None  # "unknown", for example: most likely a checkout of today
    return f"{framework} {used} is too old for its callback: expected {oldest} or newer"
