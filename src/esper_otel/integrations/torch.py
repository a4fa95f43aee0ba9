"""Zero-code: instruments torch, now or when the script imports it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import wrapt

from esper_otel import process
from esper_otel.settings import EsperSettings, SettingsError
from esper_otel.stream.environment import usable

with usable():
    from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]
        BaseInstrumentor,
    )

if TYPE_CHECKING:
    from esper_otel.integrations.watch import Watch

log = logging.getLogger("esper_otel")

AFTER_TORCH = ("accelerate.accelerator", "transformers.trainer", "deepspeed.runtime.engine")
"""Modules of frameworks that are instrumented as well, when they are imported."""


class TorchInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Instruments torch, now or when it is imported.

    ``instrument(**settings)`` takes fields of :class:`esper_otel.settings.EsperSettings`;
    without arguments it does what zero-code instrumentation does. A wrong argument
    raises :class:`SettingsError`; a wrong environment variable is warned about, and the
    script runs without instrumentation.
    """

    _watch: Watch | None = None
    _settings: Mapping[str, Any] | None = None
    """Those asked for; None while nothing is to be instrumented."""
    _awaited: ClassVar[set[str]] = set()
    """Modules whose import has a hook of ours, which nobody can take off."""

    def instrumentation_dependencies(self) -> Collection[str]:
        """The versions of torch this is written for."""
        return ("torch >= 2.4",)

    def _instrument(self, **kwargs: Any) -> None:
        settings = {k: v for k, v in kwargs.items() if k != "skip_dep_check"}
        try:
            EsperSettings.from_environment(**settings)
        except SettingsError as error:
            if settings:
                raise
            log.warning("not instrumented: %s", error)
            return
        cls = type(self)
        cls._settings = settings
        # Not before torch is: a script that never imports it should not pay for it.
        for name in ("torch", *AFTER_TORCH):
            if name in sys.modules or name not in cls._awaited:
                cls._awaited.add(name)
                wrapt.register_post_import_hook(cls._imported, name)

    @classmethod
    def _imported(cls, module: Any) -> None:
        """A module is there; what is raised here would fail its import."""
        try:
            cls._watch_module(module)
        except Exception:
            log.exception(
                "%s could not be instrumented; the script runs without", module.__name__
            )

    @classmethod
    def _watch_module(cls, module: Any) -> None:
        name, watch = module.__name__, cls._watch
        if name == "torch" and watch is None and cls._settings is not None:
            from esper_otel.integrations.watch import Watch

            cls._watch = Watch(module, process.start_automatic(**cls._settings))
        elif name == "accelerate.accelerator" and watch is not None:
            from esper_otel.integrations.training import watch_accelerate

            watch_accelerate(watch, module)
        elif name == "deepspeed.runtime.engine" and watch is not None:
            from esper_otel.integrations.training import watch_deepspeed

            watch_deepspeed(watch, module)
        elif name == "transformers.trainer" and watch is not None:
            from esper_otel.integrations.transformers import watch_transformers

            watch_transformers(watch, module)

    def _uninstrument(self, **kwargs: Any) -> None:
        cls = type(self)
        cls._settings = None
        if cls._watch is not None:
            cls._watch.undo()
            cls._watch = None
        process.end_automatic()
