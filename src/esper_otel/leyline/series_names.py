"""Series names: the Prometheus names of our metrics and attributes.

The one place where names are translated: the sidecar's ``/metrics``, the metrics page, the
dashboards, the alert rules and the tests that look into a real Prometheus take them from here.
It says what the Collector's Prometheus exporters do with their defaults, which is
github.com/prometheus/otlptranslator: escaping, with suffixes.
"""

from __future__ import annotations

import re
from typing import Literal

from esper_otel.leyline.metrics import Metric

Kind = Literal["gauge", "counter", "histogram"]

_UNITS = {"ms": "milliseconds", "s": "seconds", "GBy": "gigabytes", "%": "percent", "1": ""}
_PER = {"s": "second"}
_SEPARATORS = re.compile(r"[^a-zA-Z0-9:]")


def prometheus_name(metric: Metric) -> str:
    """What the gauge of a metric in the registry is called in Prometheus."""
    return series_name(metric.instrument, metric.unit)


def series_name(instrument: str, unit: str, kind: Kind = "gauge") -> str:
    """The name of an instrument's series; a histogram's ends in ``_bucket`` and so on besides.

    The name is cut into words, the unit's word is added unless it is one of them, and
    what stands in braces is no unit. "ms" is not the word "milliseconds", so a name that
    ends in the first gets the second as well. A counter ends in ``_total``, and a gauge of
    unit ``1`` in ``_ratio``. Raises ``KeyError`` for a unit that nobody has translated yet.
    """
    words = [word for word in _SEPARATORS.split(instrument) if word]
    main, _, per = unit.partition("/")
    suffixes = [] if "{" in main else [_UNITS[main]]
    if per:
        suffixes.append(f"per_{_PER[per]}")
    words += [suffix for suffix in suffixes if suffix and suffix not in words]
    last = "total" if kind == "counter" else "ratio" if (kind, unit) == ("gauge", "1") else ""
    if last:
        words = [*(word for word in words if word != last), last]
    return "_".join(words)


def label_name(attribute: str) -> str:
    """The label that an attribute, of a resource or of a point, becomes."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", attribute)
