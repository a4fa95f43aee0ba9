"""Reads tests of tables from YAML and says everything that is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from esper_otel.leyline.custom import is_custom
from esper_otel.leyline.decisions import (
    CONSERVATIVE_MODE,
    NOMINAL,
    WARMING_UP,
    Action,
    Proposal,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_tamiyo.language.parameters import PARAMETERS, Parameter
from esper_tamiyo.language.table import Table
from esper_tamiyo.language.table_file import load, shipped_tables
from esper_tamiyo.language.yaml_nodes import (
    BrokenDocumentError,
    Fault,
    NodeReader,
    compose_document,
    read_document,
    shown,
)
from esper_tamiyo.replaying.table_tests import (
    FIRST_STEP,
    MAX_VALUES,
    Expectation,
    Rank,
    SeriesError,
    TableTest,
    Value,
    series,
)

_RANK_FIELDS = frozenset({"metrics", "seeds", "proposals", "lost"})
_TEST_FIELDS = _RANK_FIELDS | {"name", "ranks", "step_ms", "expect", "nothing_else"}
_EXPECTATION_FIELDS = frozenset(
    {
        "step",
        "rank",
        "action",
        "reason",
        "severity",
        *PARAMETERS,
        "seed",
        "operation",
        "findings",
        "conservative",
        "silence",
    }
)
_GIVEN_METRICS = tuple(key for key in STEP_KEYS if key != "step")
_STEPS = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


class TableTestError(ValueError):
    """A file of tests that cannot be run; its text has one line for each fault."""

    def __init__(self, source: str, faults: list[Fault]) -> None:
        super().__init__("\n".join(fault.at(source) for fault in sorted(faults)))


def load_tests(path: Path) -> tuple[Table, list[TableTest]]:
    """The tests in ``path`` and the table that they are about.

    Raises :class:`TableTestError`, and
    :class:`~esper_tamiyo.language.table_file.TableError` when it is the table that cannot be
    used.
    """
    try:
        root = compose_document(read_document(path), "file of tests")
    except BrokenDocumentError as error:
        raise TableTestError(str(path), [error.fault]) from None
    reader = _TestReader()
    fields = reader.mapping(root, "", {"table", "tests"})
    name = reader.text(reader.required(fields, root, "", "table"), "table")
    node = reader.required(fields, root, "", "tests")
    entries = reader.entries(node, "tests") if node is not None else []
    if node is not None and not entries and isinstance(node, yaml.SequenceNode):
        reader.fault(node, "tests", "expected at least one test")
    if not name:
        raise TableTestError(str(path), reader.faults)
    table = load(name if name in shipped_tables() else str(path.parent / name))
    reader.reasons = {rule.id for rule in table.rules}
    tests = [reader.test(entry, field) for field, entry in entries]
    if reader.faults:
        raise TableTestError(str(path), reader.faults)
    return table, tests


class _TestReader(NodeReader):
    """Turns nodes into tests, noting faults and going on with defaults."""

    reasons: set[str]

    def test(self, node: yaml.Node, field: str) -> TableTest:
        known_faults = len(self.faults)
        fields = self.mapping(node, field, _TEST_FIELDS)
        name = self.text(self.required(fields, node, field, "name"), f"{field}.name")
        ranks = {0: self.rank(fields, field)} if _RANK_FIELDS & fields.keys() else {}
        if "ranks" in fields:
            ranks.update(self.ranks(fields["ranks"], f"{field}.ranks", ranks))
        if len(self.faults) == known_faults and not any(rank.steps for rank in ranks.values()):
            self.fault(node, field, "expected metrics or seeds with at least one value")
        step_ms = 100.0
        if "step_ms" in fields:
            number = self.number(fields["step_ms"], f"{field}.step_ms")
            if number is not None and number <= 0:
                at = fields["step_ms"]
                self.fault(at, f"{field}.step_ms", f"expected more than 0, got {shown(at)}")
            step_ms = number or step_ms
        silent = (
            self.flag(fields["nothing_else"], f"{field}.nothing_else")
            if ("nothing_else" in fields)
            else True
        )
        return TableTest(
            name=name,
            line=node.start_mark.line + 1,
            ranks=ranks,
            expected=self.expectations(fields.get("expect"), f"{field}.expect", ranks),
            step_ms=step_ms,
            nothing_else=silent,
        )

    def ranks(self, node: yaml.Node, field: str, given: dict[int, Rank]) -> dict[int, Rank]:
        ranks: dict[int, Rank] = {}
        for key, value in self.pairs(node, field):
            where = f"{field}.{key.value}"
            number = self.whole(key, field, 0, 1 << 20, 0)
            if number in ranks or number in given:
                self.fault(key, where, "this rank is given twice")
            ranks[number] = self.rank(self.mapping(value, where, _RANK_FIELDS), where)
        return ranks

    def rank(self, fields: dict[str, yaml.Node], field: str) -> Rank:
        seeds = {}
        if "seeds" in fields:
            for key, value in self.pairs(fields["seeds"], f"{field}.seeds"):
                seeds[key.value] = self.metrics(value, f"{field}.seeds.{key.value}", SEED_KEYS)
        metrics = (
            self.metrics(fields["metrics"], f"{field}.metrics", _GIVEN_METRICS)
            if "metrics" in fields
            else {}
        )
        lost = self.steps(fields["lost"], f"{field}.lost") if "lost" in fields else ()
        return Rank(
            metrics=metrics,
            seeds=seeds,
            proposals=self.proposals(fields.get("proposals"), f"{field}.proposals"),
            lost=frozenset(lost),
        )

    def metrics(
        self, node: yaml.Node, field: str, known: tuple[str, ...]
    ) -> dict[str, list[Value]]:
        found = {}
        custom = (
            [key.value for key, _ in node.value if is_custom(str(key.value))]
            if isinstance(node, yaml.MappingNode) and known is _GIVEN_METRICS
            else []
        )
        for key, value in self.mapping(node, field, {*known, *custom}).items():
            text = self.text(value, f"{field}.{key}")
            try:
                found[key] = series(text)
            except SeriesError as error:
                self.fault(value, f"{field}.{key}", str(error))
        return found

    def proposals(self, node: yaml.Node | None, field: str) -> dict[int, Proposal]:
        found: dict[int, Proposal] = {}
        for where, entry in self.entries(node, field) if node is not None else []:
            fields = self.mapping(entry, where, {"step", "seed", "operation"})
            steps = self.required(fields, entry, where, "step")
            seed = self.text(self.required(fields, entry, where, "seed"), f"{where}.seed")
            operation = self.choice(
                self.required(fields, entry, where, "operation"),
                f"{where}.operation",
                tuple(SeedOperation),
            )
            for step in self.steps(steps, f"{where}.step") if steps is not None else ():
                if step in found:
                    self.fault(entry, where, f"step {step} has a proposal already")
                if operation is not None:
                    found[step] = Proposal(seed, operation)
        return found

    def expectations(
        self, node: yaml.Node | None, field: str, ranks: dict[int, Rank]
    ) -> tuple[Expectation, ...]:
        found: list[Expectation] = []
        covered: dict[tuple[int, int, bool], Expectation] = {}
        for where, entry in self.entries(node, field) if node is not None else []:
            expectation = self.expectation(entry, where)
            if expectation is None:
                continue
            found.append(expectation)
            rank = ranks.get(expectation.rank)
            if rank is None:
                self.fault(entry, f"{where}.rank", f"the test has no rank {expectation.rank}")
                continue
            for step in expectation.steps:
                before = covered.setdefault(
                    (expectation.rank, step, expectation.silence), expectation
                )
                if before is not expectation:
                    message = f"line {before.line} has expected something of it already"
                    self.fault(entry, f"{where}.step", f"step {step}: {message}")
                elif step > rank.steps > 0 or step in rank.lost:
                    last = f"the last is {rank.steps}"
                    why = "is lost" if step in rank.lost else f"does not come: {last}"
                    self.fault(entry, f"{where}.step", f"step {step} {why}")
        return tuple(found)

    def expectation(self, node: yaml.Node, field: str) -> Expectation | None:
        fields = self.mapping(node, field, _EXPECTATION_FIELDS)
        steps = self.required(fields, node, field, "step")
        action = self.choice(
            self.required(fields, node, field, "action"), f"{field}.action", tuple(Action)
        )
        severity = self.choice(fields.get("severity"), f"{field}.severity", tuple(Severity))
        operation = self.choice(
            fields.get("operation"), f"{field}.operation", tuple(SeedOperation)
        )
        parameters = {
            name: self.parameter(fields[name], f"{field}.{name}", parameter)
            for name, parameter in PARAMETERS.items()
            if name in fields
        }
        found = fields.get("findings")
        findings = (
            tuple(self.rule(each, at) for at, each in self.entries(found, f"{field}.findings"))
            if found is not None
            else None
        )
        reason = fields.get("reason")
        conservative = fields.get("conservative")
        numbers = self.steps(steps, f"{field}.step") if steps is not None else ()
        rank = self.whole(fields.get("rank"), f"{field}.rank", 0, 1 << 20, 0)
        if action is None or not numbers:
            return None
        return Expectation(
            line=node.start_mark.line + 1,
            rank=rank,
            steps=numbers,
            action=action,
            reason=self.rule(reason, f"{field}.reason") if reason is not None else None,
            severity=severity,
            parameters=parameters,
            seed=self.text(fields["seed"], f"{field}.seed") if "seed" in fields else None,
            operation=operation,
            findings=findings,
            silence=self.flag(fields.get("silence"), f"{field}.silence"),
            conservative=(
                self.flag(conservative, f"{field}.conservative")
                if conservative is not None
                else None
            ),
        )

    def parameter(self, node: yaml.Node, field: str, form: Parameter) -> float | None:
        if form.flag:
            return 1.0 if self.flag(node, field) else None
        return self.number(node, field)

    def rule(self, node: yaml.Node, field: str) -> str:
        name = self.text(node, field)
        known = {*self.reasons, NOMINAL, WARMING_UP, CONSERVATIVE_MODE}
        if name and name not in known:
            self.fault(
                node, field, f"the table has no rule {shown(node)}{self.meant(name, known)}"
            )
        return name

    def steps(self, node: yaml.Node, field: str) -> tuple[int, ...]:
        """One step, a range like ``3-7``, or a list of both."""
        if isinstance(node, yaml.SequenceNode):
            return tuple(
                step for at, each in self.entries(node, field) for step in self.steps(each, at)
            )
        text = self.text(node, field)
        match = _STEPS.fullmatch(text)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else 0
        if not text:
            return ()
        if not FIRST_STEP <= first <= last <= MAX_VALUES:
            bounds = f"from {FIRST_STEP} to {MAX_VALUES:,}"
            message = f"expected a step {bounds}, or steps like 3-7; got {shown(node)}"
            self.fault(node, field, message)
            return ()
        return tuple(range(first, last + 1))

    def pairs(self, node: yaml.Node, field: str) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
        """The entries of a mapping whose names are free."""
        if not isinstance(node, yaml.MappingNode):
            self.fault(node, field, f"expected a mapping, got {shown(node)}")
            return []
        pairs = []
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                pairs.append((key, value))
            else:
                self.fault(key, field, f"expected a name, got {shown(key)}")
        return pairs
