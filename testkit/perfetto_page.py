"""Perfetto's page in a browser: its trace processor is asked in SQL what a trace has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ASK = """
async ([sql, kinds]) => {
    const engine = window.app.trace.engine, like = {number: 0, text: 'str', whole: 0n};
    const wanted = {};
    for (const [name, kind] of Object.entries(kinds)) wanted[name] = like[kind];
    const found = await engine.query(sql), rows = [];
    for (const it = found.iter(wanted); it.valid(); it.next())
        rows.push(Object.keys(kinds).map(
            name => typeof it[name] === 'bigint' ? Number(it[name]) : it[name]));
    return rows;
}
"""

PATIENCE_MS = 60_000


def wait_for_trace(page: Any) -> None:
    """Return when ``page`` has loaded its trace; raises playwright's TimeoutError."""
    page.wait_for_function("() => window.app && window.app.trace", timeout=PATIENCE_MS)


def asked(page: Any, sql: str, kinds: Mapping[str, str]) -> list[list[Any]]:
    """The rows of a query; ``kinds``: each column's name to number, whole or text."""
    rows: list[list[Any]] = page.evaluate(_ASK, [sql, dict(kinds)])
    return rows
