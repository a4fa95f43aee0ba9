"""YAML documents as nodes, which keep their line, and typed access to their values.

Composed, not loaded: nothing is constructed from tags, and ``010`` or ``1e3`` mean what a
person means by them. What is wrong is noted with its line, and reading goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml

from esper_otel.leyline.terminal import printable

Choice = TypeVar("Choice", bound=StrEnum)

MAX_BYTES = 1 << 20
"""Largest document."""
MAX_VALUES = 250_000
"""Most values of a document, those behind aliases counted wherever they are used."""
MAX_FAULTS = 100
"""Faults of one document that are told."""
MAX_SHOWN = 60
"""Characters of a name or value that a fault shows."""

_TAG = "tag:yaml.org,2002:"
_TRUE, _FALSE = {"true", "yes", "on"}, {"false", "no", "off"}


class Fault(NamedTuple):
    """One thing that is wrong; line 0 means the whole file.

    ``source`` is the file where that is another than the one that was read.
    """

    line: int
    field: str
    message: str
    source: str = ""

    def at(self, source: str) -> str:
        """``file:line: field: message`` on one line, without the parts that are not known."""
        source = self.source or source
        place = f"{source}:{self.line}" if self.line else source
        return printable(": ".join(part for part in (place, self.field, self.message) if part))


class BrokenDocumentError(ValueError):
    """What is no YAML document; ``fault`` says where."""

    def __init__(self, line: int, message: str) -> None:
        self.fault = Fault(line, "", message)
        super().__init__(message)


def read_document(path: Path) -> bytes:
    """The bytes of a file, as many as it takes to see that they are too many.

    Raises :class:`BrokenDocumentError` when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise BrokenDocumentError(0, f"cannot be read: {reason}") from None


class JoinedList(yaml.SequenceNode):
    """A list whose entries come from several places; ``fields`` are the names of those."""

    def __init__(self, entries: list[yaml.Node], fields: list[str], at: yaml.Node) -> None:
        super().__init__(f"{_TAG}seq", entries, at.start_mark, at.end_mark)
        self.fields = fields


def compose_document(data: bytes, what: str, source: str = "") -> yaml.Node:
    """The root of the document in ``data``; raises :class:`BrokenDocumentError`.

    ``what`` is what the document is, as errors call it. ``source`` is the file, as faults in
    its nodes are to name it where they lie among nodes of another one.
    """
    if len(data) > MAX_BYTES:
        raise BrokenDocumentError(0, f"larger than {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BrokenDocumentError(line, f"not UTF-8 text: byte {error.start}") from None
    try:
        loader = _BoundedLoader(text)
        loader.name = source
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ": ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else 1
        raise BrokenDocumentError(line, f"not valid YAML: {message}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BrokenDocumentError(line, f"not valid YAML: {error.reason}") from None
    except RecursionError:
        line = loader.line + 1
        raise BrokenDocumentError(line, "not valid YAML: nested too deeply") from None
    except BrokenDocumentError:
        raise
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode, in PyYAML 6
        raise BrokenDocumentError(1, f"not valid YAML: {error}") from None
    if root is None:
        raise BrokenDocumentError(1, f"the {what} is empty")
    _check_size(root)
    return root


class _BoundedLoader(yaml.SafeLoader):
    """Gives up at the first value that is too many, which saves seconds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._values += 1
        if self._values > MAX_VALUES:
            raise _too_many(self.line + 1)
        return super().compose_node(parent, index)


def _too_many(line: int) -> BrokenDocumentError:
    message = f"more than {MAX_VALUES:,} values, those behind aliases included"
    return BrokenDocumentError(line, message)


def _check_size(root: yaml.Node) -> None:
    """Raise :class:`BrokenDocumentError` where aliases multiply values without end.

    Ten lines of ten aliases each stand for ten thousand million values ("billion laughs").
    Each node is looked at once.
    """
    sizes: dict[int, int] = {}
    above: set[int] = set()
    waiting = [(root, False)]
    while waiting:
        node, is_over = waiting.pop()
        key = id(node)
        if is_over:
            above.discard(key)
            sizes[key] = 1 + sum(sizes.get(id(each), 1) for each in _below(node))
            if sizes[key] > MAX_VALUES:
                raise _too_many(node.start_mark.line + 1)
        elif key in above:
            message = "an alias is within its own anchor"
            raise BrokenDocumentError(node.start_mark.line + 1, message)
        elif key not in sizes and not isinstance(node, yaml.ScalarNode):
            above.add(key)
            waiting.append((node, True))
            waiting += [(each, False) for each in _below(node)]


def _below(node: yaml.Node) -> Iterator[yaml.Node]:
    """What a list or mapping consists of."""
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def shown(node: yaml.Node) -> str:
    """The value as an error shows it: words in quotes, numbers bare, long ones cut."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    value = str(node.value)
    if node.tag == f"{_TAG}null":
        return "nothing"
    value = printable(cut(value))
    return f'"{value}"' if node.tag == f"{_TAG}str" else value


def cut(text: str) -> str:
    """``text``, its end left out where it is longer than an error shows."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def fault_at(node: yaml.Node, field: str, message: str) -> Fault:
    """What is wrong with ``field``, at the line, and in the file, of ``node``."""
    return Fault(node.start_mark.line + 1, field, message, node.start_mark.name)


class NodeReader:
    """Typed access to nodes. A wrong one gives its default and a fault in ``faults``."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def fault(self, node: yaml.Node, field: str, message: str) -> None:
        """Note what is wrong with ``field`` at the line of ``node``."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(fault_at(node, field, message))
        elif len(self.faults) == MAX_FAULTS:
            more = f"and there are more faults; the first {MAX_FAULTS} faults are shown"
            self.faults.append(fault_at(node, "", more))

    def mapping(
        self, node: yaml.Node, field: str, known: Collection[str]
    ) -> dict[str, yaml.Node]:
        """The fields of a mapping; unknown and repeated ones are faults and left out."""
        if not isinstance(node, yaml.MappingNode):
            self.fault(node, field, f"expected a mapping, got {shown(node)}")
            return {}
        fields: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else shown(key)
            where = f"{field}.{cut(name)}" if field else cut(name)
            if name not in known or not isinstance(key, yaml.ScalarNode):
                self.fault(key, where, f"unknown field{self.meant(name, known)}")
            elif name in fields:
                self.fault(key, where, "given twice")
            else:
                fields[name] = value
        return fields

    def entries(self, node: yaml.Node, field: str) -> list[tuple[str, yaml.Node]]:
        """The entries of a list, each with the name of its place."""
        if not isinstance(node, yaml.SequenceNode):
            self.fault(node, field, f"expected a list, got {shown(node)}")
            return []
        if isinstance(node, JoinedList):
            return list(zip(node.fields, node.value, strict=True))
        return [(f"{field}[{place}]", entry) for place, entry in enumerate(node.value)]

    def required(
        self, fields: Mapping[str, yaml.Node], parent: yaml.Node, field: str, name: str
    ) -> yaml.Node | None:
        """The field of that name; a fault when it is missing."""
        if name not in fields and isinstance(parent, yaml.MappingNode):
            self.fault(parent, f"{field}.{name}" if field else name, "missing")
        return fields.get(name)

    def text(self, node: yaml.Node | None, field: str, most: int = MAX_BYTES) -> str:
        """A word or sentence of at most ``most`` characters; numbers are taken as written."""
        if node is None:
            return ""
        is_text = isinstance(node, yaml.ScalarNode) and node.tag != f"{_TAG}null"
        if not is_text or not node.value.strip():
            self.fault(node, field, f"expected text, got {shown(node)}")
            return ""
        text = str(node.value).strip()
        if len(text) > most:
            message = f"expected at most {most:,} characters, got {len(text):,}"
            self.fault(node, field, message)
            return text[:most]
        return text

    def number(self, node: yaml.Node, field: str) -> float | None:
        """A finite number. ``1e3`` counts, which YAML 1.1 alone takes for a word."""
        number = _parsed(node)
        if number is None or not isfinite(number):
            self.fault(node, field, f"expected a number, got {shown(node)}")
            return None
        return number

    def whole(
        self, node: yaml.Node | None, field: str, low: int, high: int, default: int
    ) -> int:
        """A whole number from ``low`` to ``high``, ``default`` when absent."""
        if node is None:
            return default
        number = _parsed(node)
        if number is None or not isfinite(number) or number != int(number):
            self.fault(node, field, f"expected a whole number, got {shown(node)}")
            return default
        if not low <= number <= high:
            bound = f"at least {low}" if number < low else f"at most {high}"
            self.fault(node, field, f"expected {bound}, got {shown(node)}")
            return default
        return int(number)

    def flag(self, node: yaml.Node | None, field: str) -> bool:
        """True or false; absent is false."""
        if node is None:
            return False
        word = node.value.lower() if node.tag == f"{_TAG}bool" else ""
        if word not in _TRUE | _FALSE:
            self.fault(node, field, f"expected true or false, got {shown(node)}")
        return word in _TRUE

    def choice(
        self, node: yaml.Node | None, field: str, choices: Iterable[Choice]
    ) -> Choice | None:
        """One of ``choices`` by its value."""
        by_value = {choice.value: choice for choice in choices}
        if node is None:
            return None
        if not isinstance(node, yaml.ScalarNode) or node.value not in by_value:
            names = ", ".join(by_value)
            meant = self.meant(node.value, by_value) if isinstance(node.value, str) else ""
            self.fault(node, field, f"expected one of {names}; got {shown(node)}{meant}")
            return None
        return by_value[node.value]

    def meant(self, name: str, known: Iterable[str]) -> str:
        """``; did you mean …?`` when something known is close to ``name``.

        Not for a fault that is not told: looking costs milliseconds in a large table.
        """
        if len(self.faults) >= MAX_FAULTS:
            return ""
        from difflib import get_close_matches  # only a faulty table pays for it

        folded = {word.lower(): word for word in known}
        close = get_close_matches(name.lower()[:80], folded, n=1)
        return f"; did you mean {folded[close[0]]}?" if close else ""


def _parsed(node: yaml.Node) -> float | None:
    quoted = not isinstance(node, yaml.ScalarNode) or node.style is not None
    if quoted or node.tag == f"{_TAG}bool":
        return None
    try:
        return float(node.value)
    except ValueError:
        return None
