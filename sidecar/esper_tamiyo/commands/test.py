"""``tamiyo test``: run the tests of a table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.leyline.terminal import printable, say
from esper_tamiyo.commands.common import Commands

if TYPE_CHECKING:
    from esper_tamiyo.replaying.table_tests import TableTestFailure

PASSED, FAILED, TROUBLE = 0, 1, 2
"""Exit statuses: 2 when a file cannot be run."""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser("test", help="run tests of tables")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.set_defaults(command=_test)


def _test(options: argparse.Namespace) -> int:
    return max(_run(path) for path in options.files)


def _run(path: Path) -> int:
    from esper_tamiyo.language.table_file import TableError
    from esper_tamiyo.replaying.table_test_file import TableTestError, load_tests

    try:
        table, tests = load_tests(path)
    except (TableTestError, TableError) as error:
        say(*str(error).split("\n"), file=sys.stderr)
        return TROUBLE
    failed = 0
    for test in tests:
        failures = test.failures(table)
        failed += bool(failures)
        for failure in failures:
            say(*format_failure(path, failure).split("\n"))
    say(f"{path}: {len(tests) - failed} of {len(tests)} tests passed, table {table.version}")
    return FAILED if failed else PASSED


def format_failure(path: Path, failure: TableTestFailure) -> str:
    """A failure for people: where, what, and the values that the table saw."""
    also = f" (and at {failure.more:,} more steps)" if failure.more else ""
    whose = f"rank {failure.rank}, " if failure.rank else ""
    lines = [
        f"{path}:{failure.line}: {failure.test}: {whose}step {failure.step}: "
        f"expected {failure.expected}, got {failure.got}{also}"
    ]
    if failure.judged is None:
        return printable(lines[0])
    frame, decision = failure.judged
    lines.append(f"  decided: {decision.action} {decision.severity} {decision.reason}")
    for finding in decision.findings:
        whose = f" of seed {finding.seed_id}" if finding.seed_id else ""
        lines.append(f"  {finding.rule}{whose} fired: {_values(finding.values)}")
    lines.append(f"  values: {_values(frame.values)}")
    for seed_id, values in frame.seeds.items():
        lines.append(f"  seed {seed_id}: {_values(values)}")
    return "\n".join(map(printable, lines))


def _values(values: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.6g}" for key, value in values.items()) or "none"
