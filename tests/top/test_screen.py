"""The screen: all of a picture arrives, however it is written."""

import io
import os
import signal
import sys
from contextlib import suppress
from fcntl import F_SETPIPE_SZ, fcntl

from esper_otel.top.rows import Piece
from esper_otel.top.screen import Screen

ROWS = [[Piece(f"{row:02}" + "\u28ff" * 78)] for row in range(24)]


def test_a_signal_while_a_picture_is_written_cuts_nothing_off(monkeypatch):
    # The pipe holds less than the picture, and is read at the ticks of a timer only: each of
    # them interrupts a write of which a part was taken.
    reading, writing = os.pipe()
    fcntl(reading, F_SETPIPE_SZ, 4096)
    os.set_blocking(reading, False)
    received = bytearray()

    def read(*_):
        with suppress(BlockingIOError):
            received.extend(os.read(reading, 65536))

    before = signal.signal(signal.SIGALRM, read)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        with io.FileIO(writing, "w") as raw, monkeypatch.context() as patch:
            unbuffered = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
            patch.setattr(sys, "stdout", unbuffered)  # as under PYTHONUNBUFFERED
            with Screen() as screen:
                screen.show(ROWS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    read()
    os.close(reading)
    written = received.decode()
    assert [written.count(row[0].text) for row in ROWS] == [1] * len(ROWS)
