"""Hugging Face Accelerate: ``Accelerator(log_with=EsperTracker())``.

It begins with ``accelerator.init_trackers(...)`` and ends with ``end_training()``. Under
``esper-otel run`` nothing has to be added.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.tracking import GeneralTracker

from esper_otel.integrations.training import Training, require, watch_accelerate

OLDEST = "1.0"


class EsperTracker(GeneralTracker):
    """Records each optimizer step between ``init_trackers`` and ``end_training``.

    What ``accelerator.log`` is given is recorded as custom values, and the configuration that
    ``init_trackers`` is given as that of the run. ``settings`` are fields of
    :class:`esper_otel.settings.EsperSettings`. Raises
    :class:`~esper_otel.settings.SettingsError` when Accelerate is too old.
    """

    name = "esper"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, **settings: Any) -> None:
        require("accelerate", OLDEST)
        super().__init__()  # type: ignore[no-untyped-call]
        self.training = Training(**settings)

    @property
    def tracker(self) -> Any:
        """The run, None before it begins."""
        return self.training.run

    def start(self) -> None:
        """Called by ``init_trackers``: the training begins."""
        self.training.start()
        self.training.share_losses()
        if self.training.watch is not None:  # the hooks on torch are ours
            watch_accelerate(self.training.watch, sys.modules["accelerate.accelerator"])

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Called by ``init_trackers`` when it is given a configuration."""
        if self.training.watch is None:
            self.start()  # older versions do not call that
        self.training.configured(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Called by ``accelerator.log``: values of the step that is under way, or behind it."""
        self.training.reported(values)

    def finish(self) -> None:
        """Called by ``end_training``."""
        self.training.stop()
