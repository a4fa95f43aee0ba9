"""What Prometheus and Jaeger have, asked over their HTTP APIs."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import msgspec

TIMEOUT_S = 20

_PLACEHOLDER = "placeholder for the Jaeger UI"
"""A word of what Jaeger shows where its page was not built in."""


class QueryError(Exception):
    """What the backend found wrong with a query."""


class Series(msgspec.Struct, frozen=True):
    """One series: its labels and (milliseconds, value) of each sample."""

    labels: dict[str, str]
    samples: list[tuple[int, float]]


class Prometheus:
    """A Prometheus at ``url``."""

    def __init__(self, url: str) -> None:
        self._url = url

    def series(self, selector: str, over: str = "1h") -> list[Series]:
        """Every sample of the last ``over`` of what ``selector`` selects."""
        found = self.ask("query", query=f"{selector}[{over}]")
        return [
            Series(
                one["metric"],
                [(round(float(at) * 1000), float(value)) for at, value in one["values"]],
            )
            for one in found
        ]

    def value(self, expression: str) -> float | None:
        """The one value of ``expression`` now, None when there is none."""
        found = self.ask("query", query=expression)
        return float(found[0]["value"][1]) if found else None

    def ask(self, what: str, **parameters: str) -> list[Any]:
        """The result of a query as it came; raises :class:`QueryError`."""
        query = urllib.parse.urlencode(parameters)
        found: list[Any] = _json(f"{self._url}/api/v1/{what}?{query}")["data"]["result"]
        return found


class Jaeger:
    """A Jaeger whose page is at ``url``."""

    def __init__(self, url: str) -> None:
        self._url = url

    def traces(self, service: str, **tags: str) -> list[dict[str, Any]]:
        """Traces with a span of ``service`` that has these tags."""
        parameters = {"service": service, "limit": "1000", "lookback": "1h"}
        if tags:
            parameters["tags"] = json.dumps(tags)
        query = urllib.parse.urlencode(parameters)
        traces: list[dict[str, Any]] = _json(f"{self._url}/api/traces?{query}")["data"] or []
        return traces


def is_page(url: str) -> bool:
    """Whether somebody who opens ``url`` sees a page, and no error and no placeholder."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode(errors="replace")
            kind = str(answer.headers.get("Content-Type", ""))
    except OSError:
        return False
    return kind.startswith("text/html") and _PLACEHOLDER not in text


def _json(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise QueryError(f"{url}: {error.read().decode(errors='replace')}") from None
