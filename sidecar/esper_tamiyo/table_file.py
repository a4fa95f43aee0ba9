"""Reads a threshold table from YAML and says everything that is wrong with it.

The YAML is composed, not loaded: nodes keep their line, nothing is constructed from
tags, and ``010`` or ``1e3`` mean what a person means by them.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from esper_otel.leyline.decisions import (
    CONSERVATIVE_MODE,
    FAILED_OPEN,
    NOMINAL,
    NOT_ASKED,
    Action,
    Severity,
)
from esper_otel.leyline.metrics import BY_KEY
from esper_tamiyo.nodes import Fault, NodeReader, shown
from esper_tamiyo.table import Baseline, Combine, Condition, Group, Operator, Rule, Table

SHIPPED = Path(__file__).parent / "tables"
MAX_BYTES = 1 << 20

_ID = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = {NOMINAL, CONSERVATIVE_MODE, NOT_ASKED, *FAILED_OPEN}
_ACTIONS = (Action.CONTINUE, Action.OPTIMIZER, Action.PAUSE)
_OPERATORS = frozenset(operator.value for operator in Operator)
_GROUPS = frozenset(combine.value for combine in Combine)
_CONDITION_FIELDS = frozenset({"metric", "baseline_of"}) | _OPERATORS
_RULE_FIELDS = (
    frozenset(
        {
            "id",
            "for",
            "cooldown",
            "downgrade",
            "severity",
            "action",
            "parameters",
            "conservative",
            "text",
        }
    )
    | _CONDITION_FIELDS
    | _GROUPS
)
_PARAMETERS = {"lr_scale": (0.0, 10.0)}
"""Parameters an OPTIMIZER rule may give: more than the first number, at most the second."""


class TableError(ValueError):
    """A table that cannot be used; its text has one line for each fault."""

    def __init__(self, source: str, faults: list[Fault]) -> None:
        self.faults = sorted(faults)
        super().__init__("\n".join(fault.at(source) for fault in self.faults))


class TableSource(NamedTuple):
    """A table's text and what errors call it."""

    name: str
    data: bytes


def shipped_tables() -> list[str]:
    """Names of the tables that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load(name: str) -> Table:
    """The table of that name, or else in that file; raises :class:`TableError`."""
    path = SHIPPED / f"{name}.yaml" if name in shipped_tables() else Path(name)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = f"expected a file, or one of {', '.join(shipped_tables())}"
        raise TableError(
            str(path), [Fault(0, "", f"cannot be read: {reason}; {hint}")]
        ) from None
    return parse(TableSource(str(path), data))


def parse(source: TableSource) -> Table:
    """The table in ``source.data``; raises :class:`TableError` with every fault found."""
    if len(source.data) > MAX_BYTES:
        raise TableError(source.name, [Fault(0, "", f"larger than {MAX_BYTES} bytes")])
    try:
        root = _compose(source.data)
    except _BrokenYamlError as error:
        raise TableError(source.name, [error.fault]) from None
    reader = _TableReader()
    table = reader.table(root, hashlib.sha256(source.data).hexdigest()[:8])
    if reader.faults:
        raise TableError(source.name, reader.faults)
    return table


class _BrokenYamlError(Exception):
    def __init__(self, line: int, message: str) -> None:
        self.fault = Fault(line, "", message)


def _compose(data: bytes) -> yaml.Node:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _BrokenYamlError(line, f"not UTF-8 text: byte {error.start}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ": ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else 1
        raise _BrokenYamlError(line, f"not valid YAML: {message}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _BrokenYamlError(line, f"not valid YAML: {error.reason}") from None
    except RecursionError:
        raise _BrokenYamlError(1, "not valid YAML: nested too deeply") from None
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode, in PyYAML 6
        raise _BrokenYamlError(1, f"not valid YAML: {error}") from None
    if root is None:
        raise _BrokenYamlError(1, "the table is empty")
    return root


class _TableReader(NodeReader):
    """Turns nodes into a table, noting faults and going on with defaults."""

    def table(self, root: yaml.Node, content: str) -> Table:
        fields = self.mapping(root, "", {"version", "baseline", "conservative", "rules"})
        version = self.text(self.required(fields, root, "", "version"), "version")
        rules: list[Rule] = []
        node = self.required(fields, root, "", "rules")
        if node is not None:
            entries = self.entries(node, "rules")
            if not entries and isinstance(node, yaml.SequenceNode):
                self.fault(node, "rules", "expected at least one rule")
            ids: dict[str, int] = {}
            for field, entry in entries:
                rules += self.rule(entry, field, ids)
        return Table(
            version=f"{version}+{content}",
            rules=tuple(rules),
            baseline=self.baseline(fields.get("baseline")),
            clean_steps=self.clean_steps(fields.get("conservative")),
        )

    def baseline(self, node: yaml.Node | None) -> Baseline:
        default = Baseline()
        if node is None:
            return default
        fields = self.mapping(node, "baseline", {"window", "warmup"})
        window = self.whole(fields.get("window"), "baseline.window", 2, 1024, default.window)
        warmup = self.whole(
            fields.get("warmup"), "baseline.warmup", 1, 1024, min(default.warmup, window)
        )
        if warmup > window:
            at = fields.get("warmup", node)
            self.fault(at, "baseline.warmup", f"expected at most the window of {window}")
        return Baseline(window, warmup)

    def clean_steps(self, node: yaml.Node | None) -> int:
        default = Table.__struct_defaults__[-1]
        if node is None:
            return int(default)
        fields = self.mapping(node, "conservative", {"clean_steps"})
        low, high = 1, 1 << 31
        at = "conservative.clean_steps"
        return self.whole(fields.get("clean_steps"), at, low, high, int(default))

    def rule(self, node: yaml.Node, field: str, ids: dict[str, int]) -> list[Rule]:
        """A list of the rule, empty when it lacks too much to be one."""
        fields = self.mapping(node, field, _RULE_FIELDS)
        if not isinstance(node, yaml.MappingNode):
            return []
        rule_id = self.rule_id(self.required(fields, node, field, "id"), field, ids)
        when = self.when(node, fields, field)
        action = self.choice(
            self.required(fields, node, field, "action"), f"{field}.action", _ACTIONS
        )
        severity = self.choice(
            self.required(fields, node, field, "severity"), f"{field}.severity", tuple(Severity)
        )
        downgrade = self.flag(fields.get("downgrade"), f"{field}.downgrade")
        conservative = self.flag(fields.get("conservative"), f"{field}.conservative")
        if downgrade and conservative:
            # What a downgrade rule does depends on the proposal, and the mode must not:
            # a sidecar that only reads the stream never sees a proposal.
            at = fields["conservative"]
            message = "a downgrade rule cannot enter conservative mode"
            self.fault(at, f"{field}.conservative", message)
        parameters = self.parameters(fields.get("parameters"), f"{field}.parameters", action)
        persistence = self.whole(fields.get("for"), f"{field}.for", 1, 1 << 31, 1)
        cooldown = self.whole(fields.get("cooldown"), f"{field}.cooldown", 0, 1 << 31, 0)
        text = self.text(fields.get("text"), f"{field}.text") if "text" in fields else ""
        if when is None or action is None or severity is None:
            return []
        return [
            Rule(
                id=rule_id,
                when=when,
                action=action,
                severity=severity,
                text=text or str(when),
                persistence=persistence,
                cooldown=cooldown,
                downgrade=downgrade,
                conservative=conservative,
                parameters=parameters,
            )
        ]

    def rule_id(self, node: yaml.Node | None, field: str, ids: dict[str, int]) -> str:
        rule_id = self.text(node, f"{field}.id")
        if node is None or not rule_id:
            return ""
        line = node.start_mark.line + 1
        if not _ID.fullmatch(rule_id):
            message = f"expected a to z, 0 to 9 and _, a letter first, got {shown(node)}"
            self.fault(node, f"{field}.id", message)
        elif rule_id in _RESERVED:
            self.fault(node, f"{field}.id", f'"{rule_id}" is a reason of its own, not a rule')
        elif rule_id in ids:
            self.fault(
                node, f"{field}.id", f'"{rule_id}" is already the rule of line {ids[rule_id]}'
            )
        ids.setdefault(rule_id, line)
        return rule_id

    def when(
        self, node: yaml.Node, fields: dict[str, yaml.Node], field: str, depth: int = 0
    ) -> Condition | Group | None:
        """The one condition, or the one group, that ``fields`` hold."""
        groups = [name for name in Combine if name in fields]
        inline = sorted(_CONDITION_FIELDS & fields.keys())
        if len(groups) + bool(inline) != 1:
            got = ", ".join([*groups, *inline]) or "none of them"
            message = f"expected one of a metric with its operator, all, any; got {got}"
            self.fault(node, field, message)
            return None
        if inline:
            return self.condition(node, fields, field)
        combine = groups[0]
        where = f"{field}.{combine}"
        if depth == 2:
            self.fault(fields[combine], where, "expected conditions: groups nest once")
            return None
        parts: list[Condition | Group] = []
        entries = self.entries(fields[combine], where)
        if not entries and isinstance(fields[combine], yaml.SequenceNode):
            self.fault(fields[combine], where, "expected at least one condition")
        for at, entry in entries:
            inner = self.mapping(entry, at, _CONDITION_FIELDS | _GROUPS)
            if isinstance(entry, yaml.MappingNode):
                part = self.when(entry, inner, at, depth + 1)
                parts += [part] if part is not None else []
        return Group(combine, tuple(parts))

    def condition(
        self, node: yaml.Node, fields: dict[str, yaml.Node], field: str
    ) -> Condition | None:
        given = [operator for operator in Operator if operator in fields]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            names = ", ".join(sorted(_OPERATORS))
            self.fault(node, field, f"expected exactly one of {names}; got {got}")
            return None
        operator = given[0]
        where = f"{field}.{operator}"
        number = self.operand(fields[operator], where, operator)
        if operator is Operator.NONFINITE and "metric" not in fields:
            metric: str | None = "nonfinite"
        else:
            metric = self.metric(
                self.required(fields, node, field, "metric"), f"{field}.metric"
            )
        whose = metric
        if "baseline_of" in fields:
            at = fields["baseline_of"]
            whose = self.metric(at, f"{field}.baseline_of")
            if operator is not Operator.ABOVE_BASELINE:
                message = "has a meaning only beside above_baseline"
                self.fault(at, f"{field}.baseline_of", message)
            elif metric and whose and BY_KEY[metric].scope != BY_KEY[whose].scope:
                message = f"{whose} and {metric} are not of the same scope"
                self.fault(at, f"{field}.baseline_of", message)
        if metric is None or whose is None:
            return None
        return Condition(
            metric, operator, number, whose if operator is Operator.ABOVE_BASELINE else ""
        )

    def operand(self, node: yaml.Node, field: str, operator: Operator) -> float:
        if operator is Operator.NONFINITE:
            if shown(node).lower() != "true":
                self.fault(node, field, f"expected true, got {shown(node)}")
            return 0.0
        if operator is Operator.UNCHANGED_FOR:
            return float(self.whole(node, field, 2, 1 << 31, 2))
        number = self.number(node, field)
        positive = operator in (Operator.ABOVE_BASELINE, Operator.RISES_BY)
        if number is not None and positive and number <= 0:
            self.fault(node, field, f"expected more than 0, got {shown(node)}")
        return number if number is not None else 0.0

    def metric(self, node: yaml.Node | None, field: str) -> str | None:
        key = self.text(node, field)
        if node is None or not key:
            return None
        if key not in BY_KEY:
            self.fault(node, field, f"unknown metric {shown(node)}{self.meant(key, BY_KEY)}")
            return None
        return key

    def parameters(
        self, node: yaml.Node | None, field: str, action: Action | None
    ) -> dict[str, float]:
        if node is None:
            return {}
        if action is not None and action is not Action.OPTIMIZER:
            self.fault(node, field, f"only OPTIMIZER takes parameters, this is {action}")
        parameters = {}
        for name, value in self.mapping(node, field, _PARAMETERS).items():
            number = self.number(value, f"{field}.{name}")
            low, high = _PARAMETERS[name]
            if number is not None and not low < number <= high:
                message = f"expected more than {low:g}, at most {high:g}, got {shown(value)}"
                self.fault(value, f"{field}.{name}", message)
            elif number is not None:
                parameters[name] = number
        return parameters
