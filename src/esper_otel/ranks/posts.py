"""Posts: what each rank tells the others of a step, in bytes whose maximum is the news.

All ranks send as many bytes and each gets, at every place, the greatest. So what one rank
alone writes (the leader's word) arrives as it is where the others write zeros; a flag that
any rank raises is up; and where a number and its complement are both sent, all ranks have
the same number exactly if both maxima are one's own. One collective does for all three,
and what it carries does not grow with the number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from esper_otel.leyline.decisions import Decision, Proposal

WORD_BYTES = 4096
"""Room for the leader's word: a decision with its findings takes some hundred bytes."""

_LENGTH_BYTES = 2
_SAME_BYTES = 12


class Order(msgspec.Struct, frozen=True, array_like=True):
    """A proposal, and all that another rank needs to carry it out as this one does."""

    proposal: Proposal
    slot: str
    blueprint: str = ""
    reason: str = ""


class Word(msgspec.Struct, frozen=True, array_like=True):
    """What the leader says at the end of a step: the decision, and what it is about."""

    decision: Decision
    order: Order | None = None


class News(NamedTuple):
    """What has come of a step's posts."""

    word: Word
    flags: bytes


class DisagreementError(RuntimeError):
    """The ranks are not at the same step, or not in the same state."""


def post(step: int, digest: int, flags: bytes, word: Word | None) -> bytes:
    """The bytes of one rank; ``digest`` (32 bits) and ``step`` must be those of all."""
    said = b"" if word is None else _encoded(word)
    same = _same(step, digest)
    return b"".join(
        (
            same,
            bytes(255 - each for each in same),
            flags,
            len(said).to_bytes(_LENGTH_BYTES, "little"),
            said.ljust(WORD_BYTES, b"\0"),
        )
    )


def news(step: int, digest: int, flags: int, maxima: bytes) -> News:
    """What ``maxima`` of all posts about ``step`` say; ``flags`` is how many there are.

    Raises :class:`DisagreementError`.
    """
    same = _same(step, digest)
    if maxima[:_SAME_BYTES] != same or maxima[_SAME_BYTES : 2 * _SAME_BYTES] != bytes(
        255 - each for each in same
    ):
        raise DisagreementError(f"the ranks differ at step {step}")
    start = 2 * _SAME_BYTES
    said = start + flags + _LENGTH_BYTES
    length = int.from_bytes(maxima[start + flags : said], "little")
    try:
        word = _DECODER.decode(maxima[said : said + length])
    except msgspec.DecodeError as error:
        raise DisagreementError(f"the leader's word of step {step}: {error}") from None
    return News(word, maxima[start : start + flags])


_DECODER = msgspec.msgpack.Decoder(Word)
_ENCODER = msgspec.msgpack.Encoder()


def _encoded(word: Word) -> bytes:
    said = _ENCODER.encode(word)
    if len(said) > WORD_BYTES:
        # Its findings are for reading, and the leader's telemetry has them.
        bare = msgspec.structs.replace(word.decision, findings=[])
        said = _ENCODER.encode(msgspec.structs.replace(word, decision=bare))
    if len(said) > WORD_BYTES:
        raise ValueError(f"the decision takes {len(said)} bytes: expected {WORD_BYTES} at most")
    return said


def _same(step: int, digest: int) -> bytes:
    return step.to_bytes(8, "little") + digest.to_bytes(4, "little")
