"""Custom values: a script's own measurements, under its own names.

All are points of one metric, ``tolaria.custom``, whose attribute ``name`` tells them apart.
A metric for each name would make names of metrics out of whatever a script calls its values:
OpenTelemetry allows no blanks in them, Prometheus gives ``val.loss`` and ``val_loss`` the same
one, and one of ours could be meant. With an attribute any text is a name, and who asks for one
metric finds them all. The price: they share a unit, so a sum over names means nothing.

In frames, tables and reports the key of a value is ``custom.`` and its name.
"""

from __future__ import annotations

import hashlib
import re

from esper_otel.leyline.frames import MAX_CUSTOM_NAME
from esper_otel.leyline.metrics import CUSTOM, Metric

PREFIX = "custom."

NAME = "name"
"""Attribute of each point: what the script calls the value."""

EVALUATION = "esper.evaluation"
"""Attribute, true, of each point that was measured on other data than those trained on, before
the step's own update. Left out of the others."""

_EVALUATIONS = frozenset(
    {"val", "valid", "validation", "eval", "evaluation", "test", "dev", "heldout"}
)
_WORDS = re.compile(r"[^a-z0-9]+")


def custom_key(name: str) -> str:
    """The key of the value called ``name``."""
    return PREFIX + name


def is_custom(key: str) -> bool:
    """Whether ``key`` is that of a custom value."""
    return key.startswith(PREFIX) and len(PREFIX) < len(key) <= len(PREFIX) + MAX_CUSTOM_NAME


def custom_metric(key: str) -> Metric:
    """What the registry would say of the custom value with this key."""
    return Metric(key, CUSTOM.unit, CUSTOM.meaning, CUSTOM.when)


def is_evaluation(name: str) -> bool:
    """Whether a value of this name is measured on held-out data.

    One of its words says so, as in ``val_loss``, ``eval/accuracy`` and ``loss.test``.
    """
    return not _EVALUATIONS.isdisjoint(_WORDS.split(name.lower()))


def usable_name(name: str) -> str:
    """``name`` as it is sent: printable, and :data:`MAX_CUSTOM_NAME` characters at most.

    One that changes by this ends in a hash of the whole, so that two names stay two.
    """
    printable = "".join(sign if sign.isprintable() else "_" for sign in name)
    if printable == name and 0 < len(name) <= MAX_CUSTOM_NAME:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{printable[: MAX_CUSTOM_NAME - len(digest) - 1]}-{digest}"
