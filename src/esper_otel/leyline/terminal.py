"""Terminal: the only place that prints messages, with foreign text escaped; sparklines.

Telling never fails: standard output or standard error may be closed (then they are ``None``),
may be objects of the script's own without half of a stream's methods, may take no letters but
those of ASCII, and a disk may be full. What is meant for standard error goes there or nowhere.

A run id, a seed id, a rule's text, a file's name or an exception is whatever its author wrote:
line breaks would forge lines of ours, and escape sequences move the cursor, clear the screen or
set the window's title. So whatever people read on a terminal or in a log passes
:func:`printable`. Files and OTLP keep the text as it is.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import isfinite
from typing import TextIO

PREFIX = "esper-otel: "
"""What begins each line that a trainer is told."""


class Lines(str):
    """Text whose line breaks are ours: what lies between them was escaped line by line."""

    __slots__ = ()


def counted(count: int, noun: str) -> str:
    """``1 step`` or ``1,024 steps``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


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


class _Output:
    """Stands for standard output as it is when something is said."""


_OUTPUT = _Output()


def say(*lines: str, file: TextIO | _Output | None = _OUTPUT, flush: bool = False) -> None:
    """Print ``lines``, each escaped, to ``file`` (default: standard output; None: nowhere).

    ``sys.stderr`` is None where it is closed. Raises ``BrokenPipeError`` alone, and that for
    standard output alone: whoever reads a command's output has seen enough.
    """
    _put("\n".join(map(printable, lines)), file, flush, _python_escape)


def say_json(text: str, file: TextIO | _Output | None = _OUTPUT, flush: bool = False) -> None:
    """As :func:`say`, for a JSON text: what the stream has no bytes for is ``\\uXXXX``."""
    _put(printable_json(text), file, flush, _json_escape)


def tell(text: str) -> None:
    """Print ``text``, whose lines are escaped already, to standard error. Never raises."""
    _put(text, sys.stderr, True, _python_escape)


def tell_over(text: str) -> None:
    """Have the last line of standard error, a terminal, show ``text`` alone. Never raises."""
    with suppress(Exception):
        sys.stderr.write(f"\r{printable(text)}\x1b[K")
        sys.stderr.flush()


def is_terminal(stream: object) -> bool:
    """Whether somebody looks at ``stream``, which may be anything, or None."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except Exception:
        return False


def _put(
    text: str, file: TextIO | _Output | None, flush: bool, escape: Callable[[str], str]
) -> None:
    out = sys.stdout if isinstance(file, _Output) else file
    if out is None:
        return
    try:
        # In one piece: other processes write to the same terminal.
        whole = _encodable(f"{text}\n", getattr(out, "encoding", None), escape)
        is_its_own = out is sys.__stderr__
        if is_its_own:
            _write_through(out, whole)
        else:
            out.write(whole)
            if flush:
                out.flush()
    except BrokenPipeError:
        if isinstance(file, _Output):
            raise
    except Exception:  # of a disk that is full, or of an object that the script has put there
        return


def _write_through(out: TextIO, text: str) -> None:
    """Write ``text`` to the file itself: what a full disk does not take must not be buffered.

    The interpreter would try again at its end, and exit with another status (120).
    """
    out.flush()
    rest = memoryview(text.encode(out.encoding, out.errors or "strict"))
    while rest:
        rest = rest[os.write(out.fileno(), rest) :]


def _encodable(text: str, encoding: str | None, escape: Callable[[str], str]) -> str:
    """``text`` with escapes for what ``encoding`` has no bytes for."""
    if text.isascii() or not encoding:
        return text
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(
            char if char.encode(encoding, "ignore") else escape(char) for char in text
        )
    return text


def _python_escape(char: str) -> str:
    return ascii(char)[1:-1]


def take_any_text() -> None:
    """Have this process's output escape what its encoding has no bytes for.

    For commands, whose help and tables have letters of all scripts.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # an object that is no text file, or none at all
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def discard_output() -> None:
    """Have what is still to be written to standard output go nowhere: nobody reads it."""
    with suppress(Exception):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


class LastResort(logging.Handler):
    """Tells people on standard error what the script has no handler for.

    In place of :data:`logging.lastResort`, which writes no prefix, and through which a stream
    that raises would raise into the script. Where the script has a handler, that one is it.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    @classmethod
    def listen(cls, name: str) -> None:
        """Have one of these, and no second where this package was imported before, hear the
        logger called ``name``."""
        logger = logging.getLogger(name)
        for handler in [*logger.handlers]:
            kind = type(handler)
            if (kind.__module__, kind.__qualname__) == (cls.__module__, cls.__qualname__):
                logger.removeHandler(handler)
        logger.addHandler(cls())

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it. Never raises."""
        try:
            if _has_another(self, record.name):
                return
            text = self.format(record)
            tell(text if text.startswith(PREFIX) else PREFIX + text)
        except Exception:  # an argument whose text cannot be made
            return


def _has_another(handler: logging.Handler, name: str) -> bool:
    """Whether the logger called ``name``, or one above it, has another handler."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if any(each is not handler for each in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


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


BLOCKS = "▁▂▃▄▅▆▇█"
"""Of a :func:`sparkline`, from the least to the most."""

BROKEN = "×"
"""Where a value was no finite number."""

_MIDDLE = BLOCKS[3]


def sparkline(values: Sequence[float | None], least: float | None = None) -> str:
    """A block for each value, the least (or ``least``) the lowest; a blank for None.

    Values that are all the same are blocks of middle height.
    """
    known = [value for value in values if value is not None and isfinite(value)]
    most = max(known, default=0.0)
    least = min(known, default=0.0) if least is None else min(least, most)
    return "".join(_block(value, least, most) for value in values)


def _block(value: float | None, least: float, most: float) -> str:
    if value is None:
        return " "
    if not isfinite(value):
        return BROKEN
    if most == least:
        return _MIDDLE
    # Halves first: the difference of two finite numbers may be infinite.
    share = (value / 2 - least / 2) / (most / 2 - least / 2)
    return BLOCKS[min(int(share * len(BLOCKS)), len(BLOCKS) - 1)]


_PROGRESS_EVERY_S = 0.2


class Progress:
    """One line on standard error that is written over, and gone at the end."""

    def __init__(self, what: str, whole: int) -> None:
        """``whole`` is the size of all the work, in bytes."""
        self._what = what
        self._whole = max(whole, 1)
        self._shown = is_terminal(sys.stderr)
        self._next = time.monotonic() + _PROGRESS_EVERY_S
        self._written = False

    def reached(self, done: int) -> None:
        """So many bytes are done."""
        if not self._shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PROGRESS_EVERY_S
        share = min(done / self._whole, 1.0)
        text = f"{self._what}: {share:.0%} of {self._whole / 1e6:,.0f} MB"
        tell_over(text)
        self._written = True

    def end(self) -> None:
        """Take the line away."""
        if self._written:
            tell_over("")
            self._written = False
