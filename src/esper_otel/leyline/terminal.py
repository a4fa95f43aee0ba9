"""Terminal: text from elsewhere as it is shown to people, so that it cannot pose as ours.

A run id, a seed id, a rule's text, a file's name or an exception is whatever its author wrote:
line breaks would forge lines of ours, and escape sequences move the cursor, clear the screen or
set the window's title. So whatever people read on a terminal or in a log passes
:func:`printable`. Files and OTLP keep the text as it is.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TextIO


class Lines(str):
    """Text whose line breaks are ours: what lies between them was escaped line by line."""

    __slots__ = ()


def printable(text: str) -> str:
    """``text`` on one line, with everything escaped that is not seen, as Python writes it.

    Escaped are control characters (C0, C1, DEL), what changes the direction of text, what has
    no width, separators of lines and paragraphs, lone surrogates, and blanks other than the
    space: what :meth:`str.isprintable` denies. Letters of all scripts, accents and emoji stay.
    A backslash stays as well, so that escaping twice is escaping once.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def printable_json(text: str) -> str:
    """A JSON text that a terminal shows as it is: it holds the same values.

    JSON itself demands escapes of C0 only. What else :func:`printable` would escape can only be
    within strings, where ``\\uXXXX`` means the same. Line breaks between values stay.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\n" else _json_escape(char) for char in text
    )


def say(*lines: str, file: TextIO | None = None, flush: bool = False) -> None:
    """Print ``lines``, each escaped, to ``file`` (default: standard output)."""
    out = sys.stdout if file is None else file
    print("\n".join(map(printable, lines)), file=out, flush=flush)


def say_json(text: str, flush: bool = False) -> None:
    """Print a JSON text to standard output."""
    print(printable_json(text), flush=flush)


class EscapingFilter(logging.Filter):
    """Escapes what a log record shows: its message, and the traceback that goes with it.

    Records with nothing to escape are left as they are, arguments and all. An argument that is
    :class:`Lines` keeps its line breaks. Lines of a traceback are indented, as an exception's
    text may have line breaks of its own.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True: every record is shown."""
        try:
            self._escape(record)
        except Exception:  # logging itself reports what is wrong with a record
            return True
        return True

    def _escape(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not message.isprintable():
            given = record.args if isinstance(record.args, tuple) else ()
            has_lines = any(isinstance(each, Lines) for each in given)
            parts = message.split("\n") if has_lines else [message]
            record.msg, record.args = Lines("\n".join(map(printable, parts))), None
        if record.exc_info and not record.exc_text:
            import traceback  # only a record with an exception pays for it

            text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            record.exc_text = "\n".join(f"  {printable(line)}" for line in text.split("\n"))


def log_to_stderr(
    level: int, hide: Callable[[logging.LogRecord], bool] = lambda record: True
) -> None:
    """Have a process of the sidecar log to standard error, escaped, from ``level`` on.

    ``hide`` is a filter that comes before: it sees what is logged as it was written.

    On the handlers and not on our logger: what libraries log is escaped as well.
    """
    logging.basicConfig(format="tamiyo: %(message)s", level=level)
    for handler in logging.getLogger().handlers:
        handler.addFilter(hide)
        handler.addFilter(EscapingFilter())


def _json_escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(
        f"\\u{units[place]:02x}{units[place + 1]:02x}" for place in range(0, len(units), 2)
    )
