"""Files that are made from code and committed: written anew, or only held against it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository, to which the places of generated files are relative."""

COMMAND = "python -m ops.generate"


def bring_up_to_date(files: Mapping[Path, str], command: str, *, check: bool) -> int:
    """Write those of ``files`` that differ from the text they should have.

    With ``check`` each is named on standard error instead, with the ``command`` that makes
    it. Returns the exit status: 1 when something was only named.
    """
    differ = 0
    for path, fresh in files.items():
        if path.exists() and path.read_text(encoding="utf-8") == fresh:
            continue
        differ += 1
        if check:
            print(f"{path}: out of date; run {command}", file=sys.stderr)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fresh, encoding="utf-8")
        print(f"wrote {path}")
    return int(check and differ > 0)


def with_section(page: str, begin: str, end: str, section: str) -> str:
    """``page`` with ``section`` in place of what stands between the two marks."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{section}\n{end}{after}"
