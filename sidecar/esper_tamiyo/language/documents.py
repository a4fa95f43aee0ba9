"""YAML documents as nodes, which keep their line.

Composed, not loaded: nothing is constructed from tags, and ``010`` or ``1e3`` mean what a
person means by them.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from esper_tamiyo.language.nodes import Fault

MAX_BYTES = 1 << 20


class BrokenDocumentError(ValueError):
    """What is no YAML document; ``fault`` says where."""

    def __init__(self, line: int, message: str) -> None:
        self.fault = Fault(line, "", message)
        super().__init__(message)


def read(path: Path) -> bytes:
    """The bytes of a file, as many as it takes to see that they are too many.

    Raises :class:`BrokenDocumentError` when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise BrokenDocumentError(0, f"cannot be read: {reason}") from None


def compose(data: bytes, what: str) -> yaml.Node:
    """The root of the document in ``data``; raises :class:`BrokenDocumentError`.

    ``what`` is what the document is, as errors call it.
    """
    if len(data) > MAX_BYTES:
        raise BrokenDocumentError(0, f"larger than {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BrokenDocumentError(line, f"not UTF-8 text: byte {error.start}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ": ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else 1
        raise BrokenDocumentError(line, f"not valid YAML: {message}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BrokenDocumentError(line, f"not valid YAML: {error.reason}") from None
    except RecursionError:
        raise BrokenDocumentError(1, "not valid YAML: nested too deeply") from None
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode, in PyYAML 6
        raise BrokenDocumentError(1, f"not valid YAML: {error}") from None
    if root is None:
        raise BrokenDocumentError(1, f"the {what} is empty")
    return root
