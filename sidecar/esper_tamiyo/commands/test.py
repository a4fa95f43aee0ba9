"""``tamiyo test``: run the tests of a table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.terminal import printable, say, say_json

if TYPE_CHECKING:
    from esper_tamiyo.replaying.table_tests import TableTestFailure

PASSED, FAILED, TROUBLE = 0, 1, 2
"""Exit statuses: 2 when a file cannot be run."""


def add(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "test",
        help="run tests of tables",
        examples=[
            ("tamiyo test mine.tests.yaml", "which name the table they are of"),
            ("tamiyo test --json tests/*.yaml", "one JSON object for each file"),
        ],
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object for each file, one a line"
    )
    parser.set_defaults(command=_test)


def _test(options: argparse.Namespace) -> int:
    return max(_run(path, options.json) for path in options.files)


def _run(path: Path, as_json: bool) -> int:
    from esper_tamiyo.language.table_file import TableError
    from esper_tamiyo.replaying.table_test_file import TableTestError, load_tests

    try:
        table, tests = load_tests(path)
    except (TableTestError, TableError) as error:
        mistakes = str(error).split("\n")
        if as_json:
            say_json(json.dumps({"file": str(path), "mistakes": mistakes}))
        else:
            say(*mistakes, file=sys.stderr)
        return TROUBLE
    failures_of = [(test, test.failures(table)) for test in tests]
    failures = [failure for _, found in failures_of for failure in found]
    passed = sum(not found for _, found in failures_of)
    if as_json:
        content = {
            "file": str(path),
            "table_version": table.version,
            "tests": len(tests),
            "passed": passed,
            "failures": [_plain(failure) for failure in failures],
        }
        say_json(json.dumps(content))
    else:
        for failure in failures:
            say(*format_failure(path, failure).split("\n"))
        say(f"{path}: {passed} of {len(tests)} tests passed, table {table.version}")
    return FAILED if failures else PASSED


def _plain(failure: TableTestFailure) -> dict[str, object]:
    """A failure as JSON has it; ``more`` steps behind this one went as wrong."""
    names = ("line", "test", "rank", "step", "expected", "got", "more")
    return {name: getattr(failure, name) for name in names}


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
