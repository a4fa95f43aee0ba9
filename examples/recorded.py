"""Recorded OTLP, read while it is being written."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path


class Tail:
    """Reads what has been added to a recording since it was last asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def __iter__(self) -> Iterator[bytes]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while len(size := file.read(4)) == 4:
                body = file.read(length := struct.unpack(">I", size)[0])
                if len(body) < length:
                    return  # still being written
                self.offset += 4 + length
                yield body
