"""Tables: ``tamiyo check`` describes one, ``test`` tests one, ``table`` prints a shipped one.

``check`` exits with 1 when it is not a table, or when a rule of it can never fire, never be
heard or never end, or inhibits in vain; each is named with file and line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.leyline.command_line import Subcommands
from esper_otel.leyline.decisions import Action
from esper_otel.leyline.terminal import printable, say, say_json
from esper_tamiyo.commands import CommandError

if TYPE_CHECKING:
    from esper_tamiyo.language.table import Rule, Table
    from esper_tamiyo.language.yaml_nodes import Fault
    from esper_tamiyo.replaying.table_tests import TableTestFailure


def add_check(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "check",
        help="validate and describe a table (exit status 1 if it is invalid)",
        examples=[
            ("tamiyo check mine.yaml", "its rules, or its mistakes by line"),
            ("tamiyo check --json mine.yaml", "the same, for editors and CI"),
        ],
    )
    parser.add_argument("table", help="default, prototype or a file")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> int:
    from esper_tamiyo.language.lint import doubts
    from esper_tamiyo.language.table_file import TableError, locate, read
    from esper_tamiyo.language.yaml_nodes import MAX_FAULTS, Fault

    try:
        source = read(options.table)
        located = locate(source)
    except TableError as error:
        if options.json:
            _print_mistakes(options.table, options.table, error.faults)
        else:
            say(*str(error).split("\n"), file=sys.stderr)
        return 1
    table = located.table
    found = [
        Fault(located.lines[doubt.rule], doubt.rule, doubt.message, located.sources[doubt.rule])
        for doubt in doubts(table)
    ]
    if found:
        found.sort()
        if options.json:
            _print_mistakes(options.table, source.name, found)
            return 1
        lines = [fault.at(source.name) for fault in found[:MAX_FAULTS]]
        if len(found) > MAX_FAULTS:
            lines.append(f"and {len(found) - MAX_FAULTS:,} more of this kind")
        say(*lines, file=sys.stderr)
        return 1
    if options.json:
        say_json(json.dumps(_description(options.table, table, located.extends)))
    else:
        _describe(options.table, table, located.extends)
    return 0


def _print_mistakes(name: str, source: str, mistakes: Iterable[Fault]) -> None:
    """What is wrong, as JSON; ``line`` is null for what is about a whole file."""
    told = [
        {
            "file": each.source or source,
            "line": each.line or None,
            "field": each.field,
            "message": each.message,
        }
        for each in mistakes
    ]
    say_json(json.dumps({"table": name, "valid": False, "mistakes": told}))


def _description(name: str, table: Table, extends: tuple[str, ...]) -> dict[str, object]:
    """What :func:`_describe` says, as plain data."""
    return {
        "table": name,
        "valid": True,
        "version": table.version,
        "extends": list(extends),
        "baseline": {"window": table.baseline.window, "warmup": table.baseline.warmup},
        "clean_steps": table.clean_steps,
        "rules": [
            {
                "id": rule.id,
                "action": rule.action.value,
                "severity": rule.severity.value,
                "when": str(rule.when),
                "more": _extras(rule),
            }
            for rule in table.rules
        ],
        "mistakes": [],
    }


def _describe(name: str, table: Table, extends: tuple[str, ...]) -> None:
    say(f"{name}: valid, version {table.version}, {len(table.rules)} rules")
    if extends:
        say(f"extends {', which extends '.join(extends)}")
    window, warmup = table.baseline.window, table.baseline.warmup
    say(f"baseline: median of {window} observations, after {warmup}")
    say(f"conservative mode: ends after {table.clean_steps} clean steps")
    for action in sorted({rule.action for rule in table.rules}):
        say("", action.value)
        for rule in table.rules:
            if rule.action is action:
                tail = "".join(f", {extra}" for extra in _extras(rule))
                say(f"  {rule.id:24} {rule.severity.value:9} {rule.when}{tail}")


def _changes_nothing(rule: Rule) -> bool:
    """Whether an OPTIMIZER rule leaves the optimizer alone, and does not say that it only
    holds back seeds."""
    is_about_it = rule.action is Action.OPTIMIZER and not rule.downgrade
    return is_about_it and not rule.parameters


def _extras(rule: Rule) -> list[str]:
    from esper_tamiyo.language.parameters import PARAMETERS

    of = f" of {rule.of}" if rule.of > rule.persistence else ""
    extras = [
        f"for {rule.persistence}{of}" if rule.persistence > 1 or of else "",
        f"cooldown {rule.cooldown}" if rule.cooldown else "",
        "on proposals only" if rule.downgrade else "",
        "enters conservative mode" if rule.conservative else "",
        "only observed" if rule.mode == "observe" else "",
        f"inhibits {', '.join(rule.inhibits)}" if rule.inhibits else "",
        *(
            name if PARAMETERS[name].flag else f"{name} {value:g}"
            for name, value in rule.parameters.items()
        ),
        "no parameters: changes no update" if _changes_nothing(rule) else "",
    ]
    return [extra for extra in extras if extra]


def add_table(commands: Subcommands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "table",
        help="print a table that comes with the package",
        usage="%(prog)s [-h] [--schema] [name]",  # which Python 3.14 words differently
        examples=[
            ("tamiyo table > mine.yaml", "a copy of the default table to change"),
            ("tamiyo table --schema > table.schema.json", "for editors that complete YAML"),
        ],
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "name", nargs="?", default="default", help="default or prototype (default: %(default)s)"
    )
    what.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of tables, for editors"
    )
    parser.set_defaults(command=_table)


def _table(options: argparse.Namespace) -> int:
    from esper_tamiyo.language.table_file import SCHEMA

    if options.schema:
        say_json(SCHEMA.read_text(encoding="utf-8").removesuffix("\n"))
    else:
        say(*_shipped(options.name).read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    return 0


def _shipped(name: str) -> Path:
    """The file of a table; raises :class:`CommandError` when there is no such table."""
    from esper_tamiyo.language.table_file import path_of, shipped_tables

    names = shipped_tables()
    if name not in names:
        raise CommandError(f"{name}: no such table; expected one of {', '.join(names)}")
    return path_of(name)


PASSED, FAILED, TROUBLE = 0, 1, 2
"""Exit statuses: 2 when a file cannot be run."""


def add_test(commands: Subcommands) -> None:
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
