"""Reads conditions, and groups of them, from the nodes of a rule."""

from __future__ import annotations

import yaml

from esper_otel.leyline.custom import PREFIX, is_custom
from esper_tamiyo.language.derived import KNOWN, is_seeds, metric_of
from esper_tamiyo.language.operators import (
    FORMS,
    ON_BASELINES,
    ON_PEERS,
    ON_RECORDS,
    BaselineKind,
    Form,
    Operand,
    Operator,
)
from esper_tamiyo.language.table import (
    MAX_CONDITIONS,
    MAX_COUNT,
    Combine,
    Condition,
    Group,
    conditions,
    is_silence,
)
from esper_tamiyo.language.yaml_nodes import NodeReader, shown

OPERATORS = frozenset(operator.value for operator in Operator)
GROUPS = frozenset(combine.value for combine in Combine)
CONDITION_FIELDS = (
    frozenset({"metric", "baseline_of", "baseline", "release", "rising"}) | OPERATORS
)


class ConditionReader(NodeReader):
    """Turns the fields of a rule, or of a part of a group, into what it waits for."""

    def when(
        self, node: yaml.Node, fields: dict[str, yaml.Node], field: str, depth: int = 0
    ) -> Condition | Group | None:
        """The one condition, or the one group, that ``fields`` hold."""
        groups = [name for name in Combine if name in fields]
        inline = sorted(CONDITION_FIELDS & fields.keys())
        if len(groups) + bool(inline) != 1:
            got = ", ".join([*groups, *inline]) or "none of them"
            message = f"expected one of a metric with its operator, all, any; got {got}"
            self.fault(node, field, message)
            return None
        if inline:
            return self.condition(node, fields, field)
        combine = groups[0]
        return self.group(combine, fields[combine], f"{field}.{combine}", depth)

    def group(self, combine: Combine, node: yaml.Node, field: str, depth: int) -> Group | None:
        """The group of conditions in a list, None when it lies too deep."""
        if depth == 2:
            self.fault(node, field, "expected conditions: groups nest once")
            return None
        entries = self.entries(node, field)
        if len(entries) > MAX_CONDITIONS:
            where, beyond = entries[MAX_CONDITIONS]
            self.fault(beyond, where, f"expected at most {MAX_CONDITIONS} conditions")
            return None
        if not entries and isinstance(node, yaml.SequenceNode):
            self.fault(node, field, "expected at least one condition")
        parts = [self.part(entry, at, depth + 1) for at, entry in entries]
        group = Group(combine, tuple(part for part in parts if part is not None))
        looks_at = list(conditions(group))
        if len(looks_at) > MAX_CONDITIONS:
            message = f"expected at most {MAX_CONDITIONS} conditions, got {len(looks_at)}"
            self.fault(node, field, message)
        seeds = any(is_seeds(part.metric) for part in looks_at)
        if seeds and any(part.operator in ON_PEERS for part in looks_at):
            self.fault(node, field, "one rule cannot compare ranks and look at seeds")
        return group

    def part(self, node: yaml.Node, field: str, depth: int) -> Condition | Group | None:
        """One part of a group, None when it is none."""
        fields = self.mapping(node, field, CONDITION_FIELDS | GROUPS)
        if not isinstance(node, yaml.MappingNode):
            return None
        part = self.when(node, fields, field, depth)
        if part is not None and is_silence(part):
            message = "missing_for of the metric step stands alone: no step record shows it"
            self.fault(node, field, message)
        return part

    def condition(
        self, node: yaml.Node, fields: dict[str, yaml.Node], field: str
    ) -> Condition | None:
        """The condition that ``fields`` hold, None when it lacks too much to be one."""
        given = [operator for operator in Operator if operator in fields]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            names = ", ".join(sorted(OPERATORS))
            self.fault(node, field, f"expected exactly one of {names}; got {got}")
            return None
        operator = given[0]
        form = FORMS[operator]
        number = self.operand(fields[operator], f"{field}.{operator}", form)
        release = self.release(fields.get("release"), f"{field}.release", operator, number)
        if operator is Operator.NONFINITE and "metric" not in fields:
            metric: str | None = "nonfinite"
        else:
            metric = self.metric(
                self.required(fields, node, field, "metric"), f"{field}.metric"
            )
        whose = self.baseline_of(fields, field, operator, metric)
        kind = self.kind(fields, field, operator)
        if metric is None or whose is None:
            return None
        self.fits(fields, field, operator, metric)
        rising = self.rising(fields, field, operator)
        return Condition(metric, operator, number or 0.0, whose, kind, release, rising)

    def operand(self, node: yaml.Node, field: str, form: Form) -> float | None:
        """The number of an operator, None when it is none."""
        if form.operand is Operand.FLAG:
            if shown(node).lower() != "true":
                self.fault(node, field, f"expected true, got {shown(node)}")
            return None
        if form.operand is Operand.COUNT:
            return self.whole(node, field, form.least, MAX_COUNT, 0) or None
        number = self.number(node, field)
        positive = form.operand in (Operand.FACTOR, Operand.AMOUNT)
        if number is not None and positive and number <= 0:
            self.fault(node, field, f"expected more than 0, got {shown(node)}")
            return None
        return number

    def release(
        self, node: yaml.Node | None, field: str, operator: Operator, number: float | None
    ) -> float | None:
        """The easier number, if there is one."""
        if node is None:
            return None
        form = FORMS[operator]
        if not form.eases:
            self.fault(node, field, f"has no meaning beside {operator}")
            return None
        release = self.operand(node, field, form)
        if release is None or number is None:
            return None
        if (release - number) * form.eases < 0:
            side = "at most" if form.eases < 0 else "at least"
            message = (
                f"contradicts {operator}: a rule that fires {operator.replace('_', ' ')} "
                f"{number:g} cannot go on until a stricter number; expected {side} "
                f"{number:g}, got {shown(node)}"
            )
            self.fault(node, field, message)
        return release

    def baseline_of(
        self, fields: dict[str, yaml.Node], field: str, operator: Operator, metric: str | None
    ) -> str | None:
        """Whose baseline is meant: empty without a baseline, None when it is wrong."""
        if "baseline_of" not in fields:
            return metric if operator in ON_BASELINES else ""
        at, where = fields["baseline_of"], f"{field}.baseline_of"
        whose = self.metric(at, where)
        if operator not in ON_BASELINES:
            names = " or ".join(ON_BASELINES)
            self.fault(at, where, f"has a meaning only beside {names}")
            return ""
        if metric and whose and is_seeds(whose) and not is_seeds(metric):
            self.fault(at, where, f"{whose} is a seed's and {metric} is not")
        return whose

    def kind(
        self, fields: dict[str, yaml.Node], field: str, operator: Operator
    ) -> BaselineKind:
        """Which past a baseline is."""
        at = fields.get("baseline")
        if at is not None and operator not in ON_BASELINES:
            names = " or ".join(ON_BASELINES)
            self.fault(at, f"{field}.baseline", f"has a meaning only beside {names}")
            return BaselineKind.ROLLING
        return self.choice(at, f"{field}.baseline", BaselineKind) or BaselineKind.ROLLING

    def rising(self, fields: dict[str, yaml.Node], field: str, operator: Operator) -> bool:
        """Whether only what goes on rising is meant."""
        at = fields.get("rising")
        if at is not None and operator not in ON_RECORDS:
            names = " or ".join(ON_RECORDS)
            self.fault(at, f"{field}.rising", f"has a meaning only beside {names}")
            return False
        return self.flag(at, f"{field}.rising")

    def fits(
        self, fields: dict[str, yaml.Node], field: str, operator: Operator, metric: str
    ) -> None:
        """Faults of metrics that an operator makes no sense of."""
        at = fields.get("metric")
        if at is None:
            return
        if operator in ON_PEERS:
            if is_seeds(metric):
                message = f"{operator} compares ranks, and {metric} is a seed's"
                self.fault(at, f"{field}.metric", message)
        elif operator is Operator.NONFINITE and is_custom(metric):
            message = (
                "no record says which custom value was not finite; expected custom_nonfinite"
            )
            self.fault(at, f"{field}.metric", f"{message} above 0")
        elif operator is Operator.NONFINITE and is_seeds(metric):
            message = "only a step counts the values that were not finite, a seed does not"
            self.fault(at, f"{field}.metric", message)

    def metric(self, node: yaml.Node | None, field: str) -> str | None:
        """The key of a metric that exists."""
        key = self.text(node, field)
        if node is None or not key:
            return None
        if metric_of(key) is None:
            own = f"; a custom value is {PREFIX}{key[:40]}"
            meant = self.meant(key, KNOWN)
            self.fault(node, field, f"unknown metric {shown(node)}{meant}{own}")
            return None
        return key
