"""Custom values as a script reports them: their names, and their numbers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from esper_otel.leyline.custom import is_evaluation, usable_name
from esper_otel.leyline.frames import MAX_CUSTOM, Value

log = logging.getLogger("esper_otel")


class CustomValues:
    """Takes what a script reports; never raises, and says once of each what it cannot take.

    ``read_async`` reads numbers and tensors, without waiting for a device.
    """

    def __init__(self, read_async: Callable[[object], Value]) -> None:
        self._read_async = read_async
        self._names: dict[str, str] = {}
        """Names as the script has them → as they are sent."""
        self._told: set[str] = set()

    def read(
        self, values: Mapping[str, object], *, evaluated: bool = False
    ) -> dict[str, Value]:
        """The numbers among ``values``, or readings of them that are under way, by name.

        None is no value. ``evaluated``: names get a ``val_`` in front unless they say
        themselves that they are evaluations.
        """
        found: dict[str, Value] = {}
        for name, value in values.items():
            if value is None:
                continue
            if evaluated and not is_evaluation(name):
                name = f"val_{name}"
            usable = self._usable(str(name))
            if usable is None:
                continue
            try:
                number = self._number(value)
            except Exception:  # of somebody's __float__
                number = None
            if number is None:
                kind = type(value).__name__
                self._tell(
                    f"value of {name}",
                    "run.report(%s=…): expected a number, got a %s; it is omitted",
                    usable,
                    kind,
                )
            else:
                found[usable] = number
        return found

    def _usable(self, name: str) -> str | None:
        """The name it is sent by; None for one too many."""
        known = self._names.get(name)
        if known is not None:
            return known
        if len(self._names) >= MAX_CUSTOM:
            self._tell(
                "names",
                "run.report(%s=…): a run can have %d custom values; further ones are omitted",
                usable_name(name),
                MAX_CUSTOM,
            )
            return None
        usable = self._names[name] = usable_name(name)
        if usable != name:
            log.warning("run.report(%s=…): the value is recorded as %s", repr(name), usable)
        return usable

    def _number(self, value: Any) -> Value | None:
        """A number, or what a device still has to deliver; None for anything else."""
        if isinstance(value, int | float):
            return float(value)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return self._read_async(value) if value.numel() == 1 else None
        if getattr(value, "size", 0) == 1 and hasattr(value, "item"):  # of NumPy
            value = value.item()
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            return None
        return float(value)  # a decimal, a fraction

    def _tell(self, what: str, message: str, *words: object) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning(message, *words)
