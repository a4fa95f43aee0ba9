"""Reads a threshold table from YAML and says everything that is wrong with it.

The YAML is composed, not loaded: nodes keep their line, nothing is constructed from
tags, and ``010`` or ``1e3`` mean what a person means by them.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

from esper_tamiyo.language.table import Table
from esper_tamiyo.language.table_reader import TableReader
from esper_tamiyo.language.yaml_nodes import (
    BrokenDocumentError,
    Fault,
    compose_document,
    read_document,
)

log = logging.getLogger("tamiyo")

SHIPPED = Path(__file__).parents[1] / "tables"


class TableError(ValueError):
    """A table that cannot be used; its text has one line for each fault."""

    def __init__(self, source: str, faults: list[Fault]) -> None:
        self.faults = sorted(faults)
        super().__init__("\n".join(fault.at(source) for fault in self.faults))


class TableSource(NamedTuple):
    """A table's text and what errors call it."""

    name: str
    data: bytes


def shipped_tables() -> list[str]:
    """Names of the tables that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


class Located(NamedTuple):
    """A table, and the line that each of its rules' ids stands on."""

    table: Table
    lines: dict[str, int]


def load(name: str, warn: bool = True) -> Table:
    """The table of that name, or else in that file; raises :class:`TableError`.

    ``warn``: say in the log when it uses a word that has been replaced.
    """
    return locate(read(name), warn).table


def read(name: str) -> TableSource:
    """The text of the table of that name, or else of that file.

    Raises :class:`TableError` when it cannot be read.
    """
    path = SHIPPED / f"{name}.yaml" if name in shipped_tables() else Path(name)
    try:
        return TableSource(str(path), read_document(path))
    except BrokenDocumentError as error:
        hint = f"expected a file, or one of {', '.join(shipped_tables())}"
        raise TableError(str(path), [Fault(0, "", f"{error}; {hint}")]) from None


def parse(source: TableSource) -> Table:
    """The table in ``source.data``; raises :class:`TableError` with every fault found."""
    return locate(source).table


def locate(source: TableSource, warn: bool = True) -> Located:
    """As :func:`parse`, with the lines of the rules; ``warn`` as for :func:`load`."""
    try:
        root = compose_document(source.data, "table")
    except BrokenDocumentError as error:
        raise TableError(source.name, [error.fault]) from None
    reader = TableReader()
    table = reader.table(root, hashlib.sha256(source.data).hexdigest()[:8])
    if reader.faults:
        raise TableError(source.name, reader.faults)
    if warn and reader.outdated:
        log.warning("%s", reader.outdated[0].at(source.name))
    return Located(table, reader.lines)
