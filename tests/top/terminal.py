"""A command in a pseudo terminal, and what a terminal would show of what it writes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

from testkit.patience import PATIENCE_S

ESPER = [sys.executable, "-m", "esper_otel"]
_CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b[()][A-Z0-9]|\r|\n|[^\x1b\r\n]+")


class Emulated:
    """The few things of a terminal that are used: cursor, erasing, colours, two screens."""

    def __init__(self, columns, rows):
        self.is_alternate = False
        self.entered = 0
        """How often the other screen was chosen."""
        self.cursor_is_shown = True
        self.styles = set()
        """Parameters of all that was said of styles."""
        self.unknown = set()
        self.resize(columns, rows)
        self.is_drawn_anew = True

    def resize(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.is_drawn_anew = False
        """Since the size changed. Until then a picture for the size before is on its way."""
        self.clear()

    def clear(self):
        self.cells = [[" "] * self.columns for _ in range(self.rows)]
        self.row = self.column = 0

    def feed(self, text):
        for found in _CONTROL.finditer(text):
            parameters, command = found[1], found[2]
            if command is None:
                self._put(found[0])
            elif command == "m":
                self.styles.update(filter(None, parameters.split(";")))
            elif command == "H":
                row, _, column = parameters.partition(";")
                self.row, self.column = int(row or 1) - 1, int(column or 1) - 1
            elif command == "J":
                self.is_drawn_anew = True
                self.clear()
            elif parameters == "?1049":
                self.is_alternate = command == "h"
                self.entered += self.is_alternate
                self.clear()
            elif parameters == "?25":
                self.cursor_is_shown = command == "h"
            else:
                self.unknown.add(found[0])

    def _put(self, text):
        for char in text:
            if char == "\r":
                self.column = 0
            elif char == "\n":
                self.row, self.column = self.row + 1, 0
            elif self.row < self.rows and self.column < self.columns:
                self.cells[self.row][self.column] = char
                self.column += 1
            elif self.is_drawn_anew:
                self.unknown.add("beyond the edge")

    @property
    def lines(self):
        return ["".join(row).rstrip() for row in self.cells]

    @property
    def text(self):
        return "\n".join(self.lines)


class Terminal:
    """A process whose terminal this is."""

    def __init__(self, *arguments, command=(), columns=80, rows=24, **environment):
        self.screen = Emulated(columns, rows)
        self.rest = b""
        """What was written after the screen was given back is read from here."""
        self.master, slave = pty.openpty()
        self._set_size(columns, rows)
        self.before = termios.tcgetattr(slave)
        env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        env |= {"TERM": "xterm-256color", "PYTHONUTF8": "1", **environment}
        self.process = subprocess.Popen(
            command or [*ESPER, "top", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self._slave = slave

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self._slave)

    def _set_size(self, columns, rows):
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def resize(self, columns, rows):
        """What a terminal does when its window changes: it cuts or fills, and says so."""
        self.screen.resize(columns, rows)
        self._set_size(columns, rows)
        self.process.send_signal(signal.SIGWINCH)

    def press(self, keys):
        os.write(self.master, keys.encode())

    def read(self, timeout_s=0.05):
        """Take in what was written; the number of bytes."""
        if not select.select([self.master], [], [], timeout_s)[0]:
            return 0
        data = os.read(self.master, 65536)
        text = (self.rest + data).decode("utf-8", "surrogateescape")
        # A sequence, or a letter, may be cut between two reads.
        cut = text.rfind("\x1b")
        whole = cut < 0 or bool(re.match(r"\x1b(\[[?0-9;]*[A-Za-z]|[()].)", text[cut:]))
        end = len(text) if whole else cut
        while end and "\udc80" <= text[end - 1] <= "\udcff":
            end -= 1
        self.rest = text[end:].encode("utf-8", "surrogateescape")
        self.screen.feed(text[:end])
        return len(data)

    def until(self, condition):
        """Read until ``condition`` of the screen is true; fail when it does not become so."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(self.screen):
            self.read()
            assert time.monotonic() < deadline, self.screen.text
            assert self.process.poll() is None, self.screen.text

    def end(self):
        """Its exit status, when it has ended; what it wrote meanwhile is read."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            self.read()
            assert time.monotonic() < deadline, "it goes on"
        while self.read(0.0):
            pass
        return self.process.returncode

    def is_as_before(self):
        """Whether the terminal is set as it was, with its own screen and its cursor."""
        return (
            termios.tcgetattr(self._slave) == self.before
            and not self.screen.is_alternate
            and self.screen.cursor_is_shown
        )
