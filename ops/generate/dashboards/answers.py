"""What a Prometheus answers to the query of a panel, as Grafana would ask it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from ops.stack.queries import Prometheus


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
    """The answer over a range of time; raises ``ops.stack.queries.QueryError``."""
    span = {"start": f"{start_s:.3f}", "end": f"{end_s:.3f}", "step": f"{step_s:g}"}
    found = Prometheus(url).ask("query_range", query=expr, **span)
    return [_answer(one["metric"], one["values"]) for one in found]


def at(url: str, expr: str, time_s: float) -> list[Answer]:
    """The answer at one time; raises ``ops.stack.queries.QueryError``."""
    found = Prometheus(url).ask("query", query=expr, time=f"{time_s:.3f}")
    return [_answer(one["metric"], [one["value"]]) for one in found]


def _answer(labels: dict[str, str], points: list[tuple[float, str]]) -> Answer:
    return Answer(labels, [time for time, _ in points], [float(value) for _, value in points])
