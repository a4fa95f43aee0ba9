"""Reads a threshold table from YAML and says everything that is wrong with it.

The YAML is composed, not loaded: nodes keep their line, nothing is constructed from
tags, and ``010`` or ``1e3`` mean what a person means by them. A table that extends another
one is read with it.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml

from esper_tamiyo.language.inheritance import extended, joined
from esper_tamiyo.language.table import Table
from esper_tamiyo.language.table_reader import EXTENDS, TableReader
from esper_tamiyo.language.yaml_nodes import (
    BrokenDocumentError,
    Fault,
    compose_document,
    fault_at,
    read_document,
)

log = logging.getLogger("tamiyo")

SHIPPED = Path(__file__).parents[1] / "tables"
SCHEMA = SHIPPED / "table.schema.json"
"""The JSON Schema of tables."""

MAX_LEVELS = 16
"""Tables in a line, each of which extends the next."""


class TableError(ValueError):
    """A table that cannot be used; its text has one line for each fault."""

    def __init__(self, source: str, faults: list[Fault]) -> None:
        self.faults = sorted(faults, key=lambda fault: (fault.source, fault))
        super().__init__("\n".join(fault.at(source) for fault in self.faults))


class TableSource(NamedTuple):
    """A table's text and what errors call it."""

    name: str
    data: bytes


def shipped_tables() -> list[str]:
    """Names of the tables that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


class Located(NamedTuple):
    """A table, and where it comes from.

    ``lines`` are those that the ids of its rules stand on, ``sources`` the files that these
    are in, "" for the table's own. ``extends`` are the names of the tables that it extends,
    the nearest first.
    """

    table: Table
    lines: dict[str, int]
    sources: dict[str, str]
    extends: tuple[str, ...]


def load(name: str, warn: bool = True) -> Table:
    """The table of that name, or else in that file; raises :class:`TableError`.

    ``warn``: say in the log when it uses a word that has been replaced.
    """
    return locate(read(name), warn).table


def path_of(name: str) -> Path:
    """The file of the table of that name, or else that file."""
    return SHIPPED / f"{name}.yaml" if name in shipped_tables() else Path(name)


def read(name: str) -> TableSource:
    """The text of the table of that name, or else of that file.

    Raises :class:`TableError` when it cannot be read.
    """
    path = path_of(name)
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
    document = _document(source, ())
    reader = TableReader()
    reader.faults += document.faults
    table = reader.table(document.root, document.content[:8])
    if reader.faults:
        raise TableError(source.name, reader.faults)
    if warn and reader.outdated:
        log.warning("%s", reader.outdated[0].at(source.name))
    return Located(table, reader.lines, reader.sources, document.extends)


def files_behind(name: str) -> tuple[str, ...]:
    """The file of that table and those that it extends, as far as they can be told.

    Tables that come with the package are left out: they do not change.
    """
    files: list[str] = []
    path = path_of(name)
    while (
        len(files) < MAX_LEVELS
        and str(path) not in files
        and not (files and path.parent == SHIPPED)
    ):
        files.append(str(path))
        try:
            node = extended(compose_document(read_document(path), "table"))
        except BrokenDocumentError:
            break
        if not isinstance(node, yaml.ScalarNode):
            break
        path = _base_path(node, str(path))
    return tuple(files)


class _Document(NamedTuple):
    """A table with all that it extends, before it is read.

    ``content`` is a hash of all files, ``extends`` as of :class:`Located`.
    """

    root: yaml.Node
    content: str
    faults: list[Fault]
    extends: tuple[str, ...]


def _document(source: TableSource, above: tuple[Path, ...]) -> _Document:
    """``above`` are the files that extend this one. Raises :class:`TableError`."""
    try:
        root = compose_document(source.data, "table", source.name if above else "")
    except BrokenDocumentError as error:
        raise TableError(source.name, [error.fault]) from None
    content = hashlib.sha256(source.data)
    node = extended(root)
    if node is None or not isinstance(root, yaml.MappingNode):
        return _Document(root, content.hexdigest(), [], ())
    name, base = _base(source, node, above)
    assert isinstance(base.root, yaml.MappingNode)  # it was read as a table
    content.update(base.content.encode())
    both = joined(root, base.root, name)
    return _Document(
        both.root, content.hexdigest(), base.faults + both.faults, (name, *base.extends)
    )


def _base(
    source: TableSource, node: yaml.Node, above: tuple[Path, ...]
) -> tuple[str, _Document]:
    """The table that ``source`` extends, and its name; raises :class:`TableError` when it is
    none."""
    if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
        names = ", ".join(shipped_tables())
        _refuse(source, node, f"expected a file, or one of {names}")
    path = _base_path(node, source.name)
    line = (*above, _real(Path(source.name)))
    if _real(path) in line:
        way = "" if _real(path) == line[-1] else f", by way of {Path(source.name).name}"
        _refuse(source, node, f"{path} would extend itself{way}")
    if len(line) == MAX_LEVELS:
        _refuse(source, node, f"expected at most {MAX_LEVELS} tables that extend each other")
    try:
        base = TableSource(str(path), read_document(path))
    except BrokenDocumentError as error:
        hint = f"expected a file, or one of {', '.join(shipped_tables())}"
        _refuse(source, node, f"{path} {error}; {hint}")
    document = _document(base, line)
    if path.parent != SHIPPED:
        reader = TableReader()
        reader.faults += document.faults
        reader.table(document.root, "")
        if reader.faults:
            raise TableError(base.name, reader.faults)
    return str(node.value).strip(), document


def _base_path(node: yaml.ScalarNode, name: str) -> Path:
    """Where the table lies that ``extends`` of the file ``name`` means."""
    wanted = str(node.value).strip()
    return path_of(wanted) if wanted in shipped_tables() else Path(name).parent / wanted


def _real(path: Path) -> Path:
    """The one name of a file that has several; ``path`` where it is no file's name."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle, or a NUL
        return path


def _refuse(source: TableSource, node: yaml.Node, message: str) -> NoReturn:
    fault = fault_at(node, EXTENDS, message)
    raise TableError(source.name, [fault])
