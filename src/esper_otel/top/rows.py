"""Rows of text in styles, as wide as a terminal shows them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

_NARROW = re.compile(r"[\x00-\u02ff\u2190-\u22ff\u2500-\u25ff\u2800-\u28ff]*")
"""Text of which each character takes one column."""


class Piece(NamedTuple):
    """Text in one style: a key of :data:`~esper_otel.top.screen.STYLES`."""

    text: str
    style: str = ""


Row = list[Piece]


def fitted(row: Sequence[Piece], width: int, *, pad: bool = False) -> Row:
    """A row cut off at ``width`` columns of a terminal; with ``pad`` it is as wide as that."""
    found: Row = []
    room = width
    for piece in row:
        text = piece.text
        if _NARROW.fullmatch(text):
            text = text[:room]
            room -= len(text)
        else:
            text, room = _cut_text(text, room)
        if text:
            found.append(Piece(text, piece.style))
        if room <= 0:
            break
    if pad and room > 0:
        found.append(Piece(" " * room))
    return found


def _cut_text(text: str, room: int) -> tuple[str, int]:
    """As much of a text as there is room for, and the room that is left."""
    for place, char in enumerate(text):
        wide = _columns(char)
        if wide > room:
            return text[:place], 0
        room -= wide
    return text, room


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
