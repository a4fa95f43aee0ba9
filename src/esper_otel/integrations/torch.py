"""Zero-code: instruments torch, now or when the script imports it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import wrapt
from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]
    BaseInstrumentor,
)

from esper_otel import run as runs
from esper_otel.settings import EsperSettings, SettingsError

if TYPE_CHECKING:
    from esper_otel.integrations.watch import Watch

log = logging.getLogger("esper_otel")


class TorchInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Instruments torch, now or when it is imported.

    ``instrument(**settings)`` takes fields of :class:`esper_otel.settings.EsperSettings`;
    without arguments it does what zero-code instrumentation does. A wrong argument
    raises :class:`SettingsError`; a wrong environment variable is warned about, and the
    script runs without instrumentation.
    """

    _watch: Watch | None = None
    _wanted = False
    _hooked = False

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
        cls._wanted = True

        def when_imported(torch: Any) -> None:
            if not cls._wanted or cls._watch is not None:
                return
            try:
                from esper_otel.integrations.watch import Watch

                cls._watch = Watch(torch, runs.start_automatic(**settings))
            except Exception:
                log.exception("torch could not be instrumented; the script runs without")

        def wrap_accelerate(accelerator: Any) -> None:
            if cls._watch is not None:
                cls._watch.accelerate(accelerator)

        def add_callback(trainer: Any) -> None:
            if cls._watch is not None:
                cls._watch.transformers(trainer)

        # Not before torch is: a script that never imports it should not pay for it.
        wrapt.register_post_import_hook(when_imported, "torch")
        wrapt.register_post_import_hook(wrap_accelerate, "accelerate.accelerator")
        wrapt.register_post_import_hook(add_callback, "transformers.trainer")

    def _uninstrument(self, **kwargs: Any) -> None:
        cls = type(self)
        cls._wanted = False
        if cls._watch is not None:
            cls._watch.undo()
            cls._watch = None
        runs.end_automatic()
