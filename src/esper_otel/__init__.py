"""OpenTelemetry for neural-network training, with a sidecar that decides.

Three lines in a loop::

    run = esper_otel.start(optimizer)
    for images, labels in run.batches(loader):
        ...
        run.report(loss=loss)
        optimizer.step()

or none at all: ``esper-otel run train.py``.

What is listed in ``__all__`` is all that a script needs, and all that is kept as it is from one
version to the next. Each name is loaded when it is first used: ``import esper_otel`` takes no
torch along, and is done in milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper_otel._version import __version__

if TYPE_CHECKING:  # for editors and type checkers: what is loaded when it is used
    from esper_otel.kasmina.garden import Garden, GardenError
    from esper_otel.leyline.decisions import Action, Decision, Finding, Severity
    from esper_otel.process import start
    from esper_otel.ranks.process_group import ProcessGroupError
    from esper_otel.run import Run
    from esper_otel.settings import EsperSettings, Mode, SettingsError
    from esper_otel.stream import Account, StreamReport
    from esper_otel.tolaria.gradients import PCGrad, pcgrad

__all__ = [
    "Account",
    "Action",
    "Decision",
    "EsperSettings",
    "Finding",
    "Garden",
    "GardenError",
    "Mode",
    "PCGrad",
    "ProcessGroupError",
    "Run",
    "SettingsError",
    "Severity",
    "StreamReport",
    "__version__",
    "pcgrad",
    "start",
]

_HOMES = {
    "esper_otel.kasmina.garden": ("Garden", "GardenError"),
    "esper_otel.leyline.decisions": ("Action", "Decision", "Finding", "Severity"),
    "esper_otel.process": ("start",),
    "esper_otel.ranks.process_group": ("ProcessGroupError",),
    "esper_otel.run": ("Run",),
    "esper_otel.settings": ("EsperSettings", "Mode", "SettingsError"),
    "esper_otel.stream": ("Account", "StreamReport"),
    "esper_otel.tolaria.gradients": ("PCGrad", "pcgrad"),
}
"""Module → what of it belongs to this face; a test holds it to ``__all__``."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            import importlib

            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
