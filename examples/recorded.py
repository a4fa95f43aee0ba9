"""Recorded OTLP, read while it is being written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esper_otel.leyline.otlp_file import RecordingError, bodies


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
            try:
                for _, body in bodies(file, self.path):
                    self.offset = file.tell()
                    yield body
            except RecordingError:
                return  # still being written
