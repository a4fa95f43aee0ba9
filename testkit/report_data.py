"""The data of a report's page, read back as the page reads them."""

from __future__ import annotations

import base64
import re
import zlib
from typing import Any

import msgspec
import numpy as np

_DATA = re.compile(r'<script id="data" type="text/plain">([A-Za-z0-9+/=]*)</script>')
_NUMBERS = {"delta": "<u4", "single": "<f4", "double": "<f8"}


def unpacked(page: str) -> dict[str, Any]:
    """What is in ``page``; each curve has its arrays as ``x`` and ``y``."""
    found = _DATA.search(page)
    if found is None:
        raise ValueError("no data in this page")
    return unpacked_data(base64.b64decode(found[1]))


def unpacked_data(packed: bytes) -> dict[str, Any]:
    """What is in the data of a page; as :func:`unpacked`."""
    raw = zlib.decompress(packed)
    end = 4 + int.from_bytes(raw[:4], "little")
    data: dict[str, Any] = msgspec.json.decode(raw[4:end])
    arrays: list[Any] = []
    for kind, count, base in data["arrays"]:
        size = count * np.dtype(_NUMBERS[kind]).itemsize
        planes = np.frombuffer(raw, np.uint8, size, end).reshape(-1, max(count, 1))
        numbers = np.ascontiguousarray(planes.T).view(_NUMBERS[kind])[:, 0]
        arrays.append(
            int(base) + np.cumsum(numbers.astype(np.int64)) if kind == "delta" else numbers
        )
        end += size
    for run in data["runs"]:
        for rank in run["ranks"]:
            for curves in (rank["curves"], *rank["seeds"].values()):
                for curve in curves.values():
                    curve["x"], curve["y"] = arrays[curve["steps"]], arrays[curve["values"]]
    return data
