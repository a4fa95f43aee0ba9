"""What a Prometheus answers to the query of a panel, as Grafana would ask it."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

TIMEOUT_S = 20


class RefusedError(Exception):
    """What Prometheus found wrong with a query."""


class Answer(msgspec.Struct, frozen=True):
    """One series: its labels, and times (seconds, Unix) and values of its points."""

    labels: dict[str, str]
    times: list[float]
    values: list[float]


class Query(msgspec.Struct, frozen=True):
    """One query of a committed dashboard."""

    panel: str
    kind: str
    unit: str
    expr: str
    legend: str
    is_instant: bool


def queries(dashboard: Mapping[str, Any]) -> Iterator[Query]:
    """Those of every panel, and of the annotations."""
    for panel in dashboard["panels"]:
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
        for target in panel.get("targets", ()):
            yield Query(
                panel["title"],
                panel["type"],
                unit,
                target["expr"],
                target.get("legendFormat", ""),
                bool(target.get("instant")),
            )
    for happening in dashboard["annotations"]["list"]:
        yield Query(happening["name"], "annotation", "", happening["expr"], "", False)


def chosen(expr: str, values: Mapping[str, str]) -> str:
    """``expr`` with Grafana's variables put in; raises ``KeyError`` for one without a value."""
    for name in sorted(values, key=len, reverse=True):
        expr = expr.replace(f"${name}", values[name])
    if "$" in expr:
        raise KeyError(expr[expr.index("$") :])
    return expr


def over(url: str, expr: str, start_s: float, end_s: float, step_s: float) -> list[Answer]:
    """The answer over a range of time; raises :class:`RefusedError`."""
    span = {"start": f"{start_s:.3f}", "end": f"{end_s:.3f}", "step": f"{step_s:g}"}
    found = _ask(f"{url}/api/v1/query_range", {"query": expr, **span})
    return [_answer(one["metric"], one["values"]) for one in found]


def at(url: str, expr: str, time_s: float) -> list[Answer]:
    """The answer at one time; raises :class:`RefusedError`."""
    found = _ask(f"{url}/api/v1/query", {"query": expr, "time": f"{time_s:.3f}"})
    return [_answer(one["metric"], [one["value"]]) for one in found]


def _answer(labels: dict[str, str], points: list[tuple[float, str]]) -> Answer:
    return Answer(labels, [time for time, _ in points], [float(value) for _, value in points])


def _ask(url: str, parameters: Mapping[str, str]) -> list[Any]:
    try:
        with urllib.request.urlopen(
            f"{url}?{urllib.parse.urlencode(parameters)}", timeout=TIMEOUT_S
        ) as answer:
            found: list[Any] = json.load(answer)["data"]["result"]
            return found
    except urllib.error.HTTPError as error:
        raise RefusedError(json.load(error).get("error", str(error))) from None
