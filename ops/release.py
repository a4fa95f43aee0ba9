"""Checks that a tag may be released: ``python -m ops.release v0.2.0``.

The tag is the version of the package, and the changelog has that version under a heading with
its date, in the form of Keep a Changelog.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from esper_otel._version import __version__

ROOT = Path(__file__).parent.parent
CHANGELOG = ROOT / "CHANGELOG.md"
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}

_HEADING = re.compile(r"## \[(?:Unreleased|(\d+\.\d+\.\d+\S*)\] - \d{4}-\d{2}-\d{2}$)")


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tag", help="such as v0.2.0")
    tag = parser.parse_args().tag
    problems = [*faults_of(CHANGELOG.read_text(encoding="utf-8"))]
    if tag != f"v{__version__}":
        problems.append(f"tag {tag}: expected v{__version__}, the version of the package")
    if __version__ not in released(CHANGELOG.read_text(encoding="utf-8")):
        problems.append(f"{CHANGELOG.name}: expected a heading ## [{__version__}] - YYYY-MM-DD")
    for problem in problems:
        print(f"release: {problem}", file=sys.stderr)
    return 1 if problems else 0


def released(changelog: str) -> list[str]:
    """The versions that a changelog has, the newest first."""
    headings = map(_HEADING.match, changelog.splitlines())
    return [found[1] for found in headings if found and found[1]]


def faults_of(changelog: str) -> Iterator[str]:
    """What in a changelog is not of the form, each with its line."""
    for number, line in enumerate(changelog.splitlines(), 1):
        if line.startswith("## ") and not _HEADING.match(line):
            yield f"line {number}: {line}: expected ## [VERSION] - DATE or ## [Unreleased]"
        if line.startswith("### ") and line.removeprefix("### ") not in KINDS:
            yield f"line {number}: {line}: expected one of {', '.join(sorted(KINDS))}"


if __name__ == "__main__":
    sys.exit(main())
