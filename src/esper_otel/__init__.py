"""OpenTelemetry for neural-network training, with a sidecar that decides.

Three lines in a loop::

    run = esper_otel.start(optimizer)
    for images, labels in run.batches(loader):
        ...
        run.report(loss=loss)
        optimizer.step()

or none at all: ``esper-otel run train.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper_otel.process import start
    from esper_otel.run import Run
    from esper_otel.settings import EsperSettings, Mode, SettingsError
    from esper_otel.tolaria.gradients import pcgrad

__version__ = "0.1.0"
__all__ = ["EsperSettings", "Mode", "Run", "SettingsError", "pcgrad", "start"]

_HOMES = {
    "EsperSettings": "settings",
    "Mode": "settings",
    "Run": "run",
    "SettingsError": "settings",
    "pcgrad": "tolaria.gradients",
    "start": "process",
}


def __getattr__(name: str) -> Any:
    # Looked up when used: the sidecar imports esper_otel.leyline and nothing else of this.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
