"""Trace and span ids that every process of a run works out for itself.

They follow from what is known on both sides of the socket and on every rank, so the
sidecar continues a trainer's trace and ranks share one trace per step without a word sent.
"""

from __future__ import annotations

from hashlib import blake2b

STEP_SPAN = "train.step"
"""The root of a rank's spans of one step."""

DECIDE_SPAN = "tamiyo.decide"
"""Asking, as the trainer sees it; the sidecar's span below it has the same name."""


def trace_id(run: str, step: int) -> int:
    """The trace of one step of ``run``, the same on all its ranks; 128 bits, never 0."""
    return _hashed(16, run, step)


def span_id(run: str, rank: int, instance: str, step: int, name: str) -> int:
    """The span called ``name`` of one step of one process; 64 bits, never 0."""
    return _hashed(8, run, rank, instance, step, name)


def _hashed(size: int, *parts: str | int) -> int:
    # 0 is what W3C Trace Context takes for "no id".
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=size).digest(), "big") or 1
