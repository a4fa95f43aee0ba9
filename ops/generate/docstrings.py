"""Docstrings as Markdown: what Python's documentation marks up, in the marks of our pages."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")
_LITERAL = re.compile(r"``([^`]+)``")


def markdown(docstring: str) -> str:
    """The text with code in single backquotes, and ``::`` blocks as fenced Python."""
    return "\n".join(_lines(docstring.strip("\n").split("\n"))).strip("\n")


def one_line(docstring: str) -> str:
    """The text for a cell of a table."""
    return " ".join(_inline(docstring).split()).replace("|", "\\|")


def _inline(text: str) -> str:
    return _LITERAL.sub(r"`\1`", _ROLE.sub(r"`\1`", text))


def _lines(lines: list[str]) -> Iterator[str]:
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if not line.endswith("::"):
            yield _inline(line)
            continue
        yield _inline(line[:-1])
        block = []
        while at < len(lines) and (not lines[at].strip() or lines[at].startswith("    ")):
            block.append(lines[at])
            at += 1
        code = textwrap.dedent("\n".join(block)).strip("\n")
        yield from ("", "```python", *code.split("\n"), "```", "")
