"""Adds up coverage for each package: ``python -m ops.coverage_table``, after ``make coverage``.

``make coverage`` measures lines and branches, also of the processes that tests start. The table
is printed and kept in ``build/coverage/packages.md``, beside the pages that ``coverage html``
makes; the workflow shows it on its summary page. A share is (covered lines + covered branches)
of (statements + branches), as ``coverage report`` computes it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path

import msgspec

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "coverage"
TABLE = FOLDER / "packages.md"
PAGES = FOLDER / "index.html"
SOURCES = ("src", "sidecar")


class Counts(msgspec.Struct):
    """Lines and branches of one file, or of several added up."""

    num_statements: int = 0
    covered_lines: int = 0
    num_branches: int = 0
    covered_branches: int = 0

    def added(self, other: Counts) -> Counts:
        """The sum of both."""
        mine, others = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        return Counts(*(a + b for a, b in zip(mine, others, strict=True)))

    @property
    def percent(self) -> float:
        """The covered share in percent; 100 where there is nothing to cover."""
        every = self.num_statements + self.num_branches
        covered = self.covered_lines + self.covered_branches
        return 100.0 * covered / every if every else 100.0


class File(msgspec.Struct):
    """A file in the report of ``coverage json``."""

    summary: Counts


class Report(msgspec.Struct):
    """The part of that report that is used here."""

    files: dict[str, File]


def main() -> int:
    """Entry point; returns the exit status."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stdout + done.stderr).strip() or f"exit status {done.returncode}"
        print(f"coverage: {words}; `make coverage` measures", file=sys.stderr)
        return 1
    table = table_of(by_package(msgspec.json.decode(done.stdout, type=Report)))
    FOLDER.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(table, encoding="utf-8")
    print(table, end="")
    print(f"{TABLE.relative_to(ROOT)} keeps it, {PAGES.relative_to(ROOT)} has each line")
    return 0


def by_package(report: Report) -> dict[str, Counts]:
    """The sum of each package, such as ``esper_otel.stream``, in the order of their names."""
    sums: defaultdict[str, Counts] = defaultdict(Counts)
    for path, file in report.files.items():
        parts = Path(path).parts
        if parts[0] in SOURCES:
            package = ".".join(parts[1:-1][:2])
            sums[package] = sums[package].added(file.summary)
    return dict(sorted(sums.items()))


def table_of(packages: Mapping[str, Counts]) -> str:
    """The packages as a table of Markdown, with sums for both distributions and for all."""
    lines = ["| package | statements | branches | covered |", "| --- | ---: | ---: | ---: |"]
    lines += [_line(f"`{name}`", counts) for name, counts in packages.items()]
    for root in sorted({name.partition(".")[0] for name in packages}):
        of_it = [counts for name, counts in packages.items() if name.partition(".")[0] == root]
        lines.append(_line(f"**all of `{root}`**", _sum(of_it)))
    lines.append(_line("**total**", _sum(packages.values())))
    return "\n".join(lines) + "\n"


def _sum(every: Iterable[Counts]) -> Counts:
    return reduce(Counts.added, every, Counts())


def _line(name: str, counts: Counts) -> str:
    numbers = f"{counts.num_statements:,} | {counts.num_branches:,} | {counts.percent:.1f} %"
    return f"| {name} | {numbers} |"


if __name__ == "__main__":
    sys.exit(main())
