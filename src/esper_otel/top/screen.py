"""The screen: a terminal that shows rows of text and reads keys, and is restored at the end."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import sys
import termios
import time
import tty
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from esper_otel.top.charts import ASCII, without_braille
from esper_otel.top.choice import Choice
from esper_otel.top.picture import picture
from esper_otel.top.rows import Piece, Row, fitted
from esper_otel.top.watched import RunSource

EVERY_S, SLOWEST_S = 0.5, 5.0
"""Between two looks at what is new; the second where there is very much."""

SHARE = 0.025
"""Of one processor that looking and drawing may take: beside a training there are few. Where
one look takes longer the next one is later."""

STYLES = {
    "title": "bold",
    "dim": "dim",
    "loss": "cyan",
    "norm": "magenta",
    "good": "green",
    "warn": "yellow",
    "alarm": "bold red",
    "step_latency_ms": "white",
    "input_wait_ms": "yellow",
    "forward_ms": "green",
    "backward_ms": "blue",
    "optimizer_ms": "magenta",
    "hook_latency_ms": "red",
}
"""Styles of pieces, as rich names them."""


def text_of(rows: Sequence[Row]) -> Text:
    """Rows as a text of rich's, for whoever has a display of its own."""
    lines = [Text.assemble(*((p.text, STYLES.get(p.style, "")) for p in row)) for row in rows]
    return Text("\n").join(lines)


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_KEY = re.compile(rb"\x1b(?:\[[0-9;?]*[@-~]|O.)|\x1b|[^\x1b]", re.DOTALL)
_NAMES = {b"A": "up", b"B": "down", b"C": "right", b"D": "left"}


def keys_in(data: bytes) -> list[str]:
    """The keys that a terminal has sent: characters, or left, right, up, down and enter."""
    found = []
    for sent in _KEY.findall(data):
        if sent[:1] == b"\x1b":
            if len(sent) == 3 and sent[2:] in _NAMES:
                found.append(_NAMES[sent[2:]])
        elif sent in b"\r\n":
            found.append("enter")
        else:
            found.append(sent.decode("latin-1"))
    return found


class Screen:
    """The terminal on standard output and input, while it shows a picture.

    A context: leaving it, however that happens, gives the terminal back as it was. Signals that
    end a process, or change the terminal's size, are noted meanwhile.
    """

    def __init__(self) -> None:
        self._output = sys.stdout.fileno()
        # A write that a signal interrupts is taken up again only by a file with a buffer.
        # Standard output has none under PYTHONUNBUFFERED.
        self._file = open(  # noqa: SIM115
            self._output,
            "w",
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            closefd=False,
        )
        # That it is a terminal was found out by whoever makes this; NO_COLOR is heeded by rich.
        self._console = Console(file=self._file, force_terminal=True, highlight=False)
        self._styles = {name: Style.parse(style) for name, style in STYLES.items()}
        self._is_ascii = without_braille(sys.stdout.encoding)
        self._input: int | None = None
        with suppress(OSError, ValueError):
            if sys.stdin is not None and os.isatty(sys.stdin.fileno()):
                self._input = sys.stdin.fileno()
        self._saved: list[object] | None = None
        self._handlers: dict[int, object] = {}
        self._wake, self._woken = socket.socketpair()
        self._wakeup_fd = -1
        self._shown: list[Row] = []
        self._suspend = False
        self.ended_by: int | None = None
        """The signal that asks the process to end."""

    def __enter__(self) -> Self:
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        for number in (*_ENDING, signal.SIGTSTP, signal.SIGWINCH):
            self._handlers[number] = signal.signal(number, self._on_signal)
        self._wakeup_fd = signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        self._take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._give_back()
        signal.set_wakeup_fd(self._wakeup_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._wake.close()
        self._woken.close()
        with suppress(OSError):
            self._file.close()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        try:
            columns, rows = os.get_terminal_size(self._output)
        except OSError:
            columns, rows = 80, 24
        return columns or 80, rows or 24

    @property
    def is_blank(self) -> bool:
        """Whether nothing of a picture is there."""
        return not self._shown

    def show(self, rows: Sequence[Row]) -> None:
        """Draw rows, of which only those are sent that have changed."""
        width = self.size[0]
        with self._console:  # all of it in one piece
            for place, row in enumerate(rows):
                if place >= len(self._shown) or self._shown[place] != row:
                    line = [self._segment(piece) for piece in fitted(row, width, pad=True)]
                    self._console.update_screen_lines([line], 0, place)
        self._shown = list(rows)

    def blank(self) -> None:
        """Have the next picture be drawn whole, on an empty screen."""
        self._shown = []
        self._console.clear()

    def wait(self, timeout_s: float) -> list[str]:
        """The keys that were pressed, after at most ``timeout_s``; less when something else
        happens."""
        waited: list[int] = [self._wake.fileno()]
        if self._input is not None:
            waited.append(self._input)
        ready = select.select(waited, (), (), max(timeout_s, 0.0))[0]
        if self._wake.fileno() in ready:
            with suppress(BlockingIOError):
                self._wake.recv(64)
        if self._suspend:
            self._stop()
        if self._input is None or self._input not in ready:
            return []
        try:
            data = os.read(self._input, 256)
        except OSError:
            data = b""
        if not data:  # nobody is there any more
            self._input = None
        return keys_in(data)

    def _segment(self, piece: Piece) -> Segment:
        text = piece.text.translate(ASCII) if self._is_ascii else piece.text
        return Segment(text, self._styles.get(piece.style))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number in _ENDING:
            self.ended_by = number
        elif number == signal.SIGTSTP:
            self._suspend = True

    def _stop(self) -> None:
        """Do what Ctrl-Z asks for, and go on when the shell says so."""
        self._suspend = False
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._on_signal)
        self._take()
        self._shown = []

    def _take(self) -> None:
        if self._input is not None:
            with suppress(termios.error):
                self._saved = termios.tcgetattr(self._input)
                tty.setcbreak(self._input)
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)

    def _give_back(self) -> None:
        # A terminal that is gone takes nothing back.
        with suppress(OSError):
            self._console.show_cursor(True)
            self._console.set_alt_screen(False)
        if self._saved is not None and self._input is not None:
            with suppress(termios.error, OSError):
                termios.tcsetattr(self._input, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]


def time_between(used_s: float) -> float:
    """Seconds until the next look, when one and its drawing took ``used_s`` of a processor."""
    return min(max(EVERY_S, used_s / SHARE), SLOWEST_S)


def watch(source: RunSource, choice: Choice) -> int:
    """Show runs until somebody ends it; returns the exit status, 128 more than a signal."""
    with Screen() as screen:
        size, looked_at, every = screen.size, float("-inf"), EVERY_S
        problem, changed = "", True
        while screen.ended_by is None:
            keys = screen.wait(looked_at + every - time.monotonic())
            if "q" in keys:
                return 0
            pressed = [choice.press(key, source.runs()) for key in keys]
            now, began = time.monotonic(), time.process_time()
            if any(pressed) or now >= looked_at + every:
                run, rank = choice.resolve(source.runs())
                names = (run.name, rank.rank) if run and rank else (choice.run, choice.rank)
                changed |= source.refresh(*names, now)
                looked_at = time.monotonic()
            anew = screen.size != size or screen.is_blank
            if anew:
                size = screen.size
                screen.blank()
            changed |= problem != source.problem
            if anew or any(pressed) or (changed and not choice.is_held):
                problem, changed = source.problem, False
                screen.show(picture(source.runs(), choice, *size, source.name, problem))
            if looked_at > now:
                every = time_between(time.process_time() - began)
        return 128 + screen.ended_by
