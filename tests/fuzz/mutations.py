"""Mutations: bytes as they were meant, and then not quite."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

from hypothesis import strategies as st

EDGES = (
    *(b"\x00", b"\xff", b"\x7f", b"\x80", b"\x00\x00\x00\x00", b"\xff\xff\xff\xff"),
    *(b"\xff" * 9 + b"\x01", b"\x91" * 2000, b"[" * 2000, b'{"a":' * 500, b"-1", b"1e999"),
    *(b"9" * 400, b"9" * 5000, b"NaN", b"null", b'"', b"\n", b"\xed\xa0\x80", b"\\ud800"),
    *(struct.pack("<d", value) for value in (float("nan"), float("inf"), 1e308, -0.0)),
)
"""What is put in: ends of ranges, what is nested, what is no number and no text."""

_LENGTHS = ("<I", ">I", "<H", "B")


def mutate(data: bytes, seed: int, changes: int, others: Sequence[bytes] = ()) -> bytes:
    """``data`` after so many changes; the same ones for the same ``seed``.

    ``others`` are bytes of the same kind, of which parts are put in.
    """
    chance = random.Random(seed)
    changed = bytearray(data)
    for _ in range(changes):
        chance.choice(_CHANGES)(changed, chance, others)
    return bytes(changed)


def mutations(
    whole: st.SearchStrategy[bytes], others: Sequence[bytes] = (), most: int = 6
) -> st.SearchStrategy[bytes]:
    """``whole`` with at most so many changes, often with none."""
    seeds = st.integers(0, 2**32 - 1)
    return st.builds(mutate, whole, seeds, st.integers(0, most), st.just(others))


def _span(size: int, chance: random.Random, longest: int = 64) -> tuple[int, int]:
    begin = chance.randrange(size + 1)
    longest = chance.choice((1, 4, longest, size + 1))
    return begin, min(size, begin + chance.randrange(longest + 1))


def _flip(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.randrange(256)


def _cut(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _remove(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    begin, end = _span(len(data), chance)
    del data[begin:end]


def _double(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    begin, end = _span(len(data), chance)
    at = chance.randrange(len(data) + 1)
    data[at:at] = data[begin:end]


def _put_edge(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    edge = chance.choice(EDGES)
    at = chance.randrange(len(data) + 1)
    data[at : at + chance.choice((0, len(edge)))] = edge


def _put_length(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    form = chance.choice(_LENGTHS)
    size = struct.calcsize(form)
    at = chance.randrange(len(data) + 1)
    value = chance.choice((0, 1, len(data), len(data) - at, 1 << 24, (1 << 32) - 1))
    data[at : at + size] = struct.pack(form, value % (1 << 8 * size))


def _splice(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    other = chance.choice(others) if others else bytes(data)
    begin, end = _span(len(other), chance)
    at, to = _span(len(data), chance)
    data[at:to] = other[begin:end]


_CHANGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    *(_flip, _flip, _set, _cut, _remove, _double, _put_edge, _put_edge, _put_length),
    *(_splice, _splice),
)
