"""Reads a table, and its rules, from YAML nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf

import msgspec
import yaml

from esper_otel.leyline.decisions import (
    CONSERVATIVE_MODE,
    NOMINAL,
    RANK_OF,
    UNJUDGED,
    Action,
    Severity,
)
from esper_tamiyo.language.condition_reader import CONDITION_FIELDS, GROUPS, ConditionReader
from esper_tamiyo.language.cycles import cycles
from esper_tamiyo.language.derived import is_seeds
from esper_tamiyo.language.operators import ON_PEERS
from esper_tamiyo.language.parameters import PARAMETERS, Parameter
from esper_tamiyo.language.table import (
    ID,
    MAX_ID,
    MAX_RULES,
    MAX_TEXT,
    Baseline,
    Condition,
    Conservative,
    Group,
    RecordSpan,
    Rule,
    RuleMode,
    RuleScope,
    Table,
    conditions,
    held,
    is_silence,
    span,
)
from esper_tamiyo.language.yaml_nodes import Fault, fault_at, shown

RESERVED = {NOMINAL, CONSERVATIVE_MODE, *UNJUDGED}
ACTIONS = (Action.CONTINUE, Action.OPTIMIZER, Action.PAUSE)
TOP_FIELDS = ("version", "baseline", "record", "conservative", "rules")
EXTENDS, REMOVE = "extends", "remove"
"""Fields of a table that is written as what differs from another one."""
OUTDATED = "silences"
"""What ``inhibits`` was called. It is still read."""

RULE_FIELDS = tuple(name for name in Rule.__struct_encode_fields__ if name != "when")

_ID = re.compile(ID)
_MEANINGLESS_IN_SILENCE = (
    *("for", "of", "cooldown", "downgrade", "conservative"),
    *("inhibits", OUTDATED),
)
KNOWN_RULE_FIELDS = frozenset(RULE_FIELDS) | CONDITION_FIELDS | GROUPS | {OUTDATED}


class TableReader(ConditionReader):
    """Turns nodes into a table, noting faults and going on with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}
        """The line that each rule's id stands on."""
        self.sources: dict[str, str] = {}
        """The file that it is in, "" for the one that is read."""
        self.outdated: list[Fault] = []
        """Where the table says :data:`OUTDATED`: no fault, but worth a word."""

    def table(self, root: yaml.Node, content: str) -> Table:
        """The table; ``content`` names what is in the file."""
        fields = self.mapping(root, "", (*TOP_FIELDS, EXTENDS, REMOVE))
        if REMOVE in fields:
            self.fault(fields[REMOVE], REMOVE, "has a meaning only beside extends")
        version = self.text(self.required(fields, root, "", "version"), "version", MAX_ID)
        return Table(
            version=f"{version}+{content}",
            rules=self.rules(self.required(fields, root, "", "rules")),
            baseline=self.baseline(fields.get("baseline")),
            record=self.record(fields.get("record")),
            clean_steps=self.clean_steps(fields.get("conservative")),
        )

    def baseline(self, node: yaml.Node | None) -> Baseline:
        """The window and warm-up of baselines."""
        default = Baseline()
        if node is None:
            return default
        fields = self.mapping(node, "baseline", Baseline.__struct_fields__)
        low, high = span(Baseline, "window")
        window = self.whole(fields.get("window"), "baseline.window", low, high, default.window)
        low, high = span(Baseline, "warmup")
        usual = min(default.warmup, window)
        warmup = self.whole(fields.get("warmup"), "baseline.warmup", low, high, usual)
        if warmup > window:
            at = fields.get("warmup", node)
            self.fault(at, "baseline.warmup", f"expected at most the window of {window}")
        return Baseline(window, warmup)

    def record(self, node: yaml.Node | None) -> RecordSpan:
        """What records of excursions span, and their risk."""
        default = RecordSpan()
        if node is None:
            return default
        fields = self.mapping(node, "record", RecordSpan.__struct_fields__)
        usual = msgspec.structs.asdict(default)
        found: dict[str, int] = {}
        for name in RecordSpan.__struct_fields__:
            low, high = span(RecordSpan, name)
            most = (
                min(usual[name], found.get("window", high)) if name == "warmup" else usual[name]
            )
            found[name] = self.whole(fields.get(name), f"record.{name}", low, high, most)
        if found["warmup"] > found["window"]:
            at = fields.get("warmup", node)
            message = f"expected at most the window of {found['window']}"
            self.fault(at, "record.warmup", message)
        return RecordSpan(**found)

    def clean_steps(self, node: yaml.Node | None) -> int:
        """When conservative mode is left."""
        default = Conservative().clean_steps
        if node is None:
            return default
        fields = self.mapping(node, "conservative", Conservative.__struct_fields__)
        low, high = span(Conservative, "clean_steps")
        at = "conservative.clean_steps"
        return self.whole(fields.get("clean_steps"), at, low, high, default)

    def rules(self, node: yaml.Node | None) -> tuple[Rule, ...]:
        """All rules that are enough to be one."""
        if node is None:
            return ()
        entries = self.entries(node, "rules")
        if not entries and isinstance(node, yaml.SequenceNode):
            self.fault(node, "rules", "expected at least one rule")
        if len(entries) > MAX_RULES:
            where, beyond = entries[MAX_RULES]
            self.fault(beyond, where, f"expected at most {MAX_RULES:,} rules")
            return ()
        rules: list[Rule] = []
        inhibits: list[tuple[Rule, str, yaml.Node]] = []
        for field, entry in entries:
            rule = self.rule(entry, field, inhibits)
            if rule is not None:
                rules.append(rule)
        self.check_inhibits(rules, inhibits)
        return tuple(rules)

    def rule(
        self, node: yaml.Node, field: str, inhibits: list[tuple[Rule, str, yaml.Node]]
    ) -> Rule | None:
        """The rule, None when it lacks too much to be one."""
        fields = self.mapping(node, field, KNOWN_RULE_FIELDS)
        if not isinstance(node, yaml.MappingNode):
            return None
        rule_id = self.rule_id(self.required(fields, node, field, "id"), field)
        when = self.when(node, fields, field)
        action = self.choice(
            self.required(fields, node, field, "action"), f"{field}.action", ACTIONS
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
        persistence, of = self.persistence(fields, field)
        low, high = span(Rule, "cooldown")
        cooldown = self.whole(fields.get("cooldown"), f"{field}.cooldown", low, high, 0)
        mode = self.choice(fields.get("mode"), f"{field}.mode", RuleMode) or RuleMode.ACT
        text = ""
        if "text" in fields:
            text = self.text(fields["text"], f"{field}.text", MAX_TEXT)
        word = self.word_for_inhibits(node, fields, field)
        inhibited = self.ids(fields.get(word), f"{field}.{word}")
        if when is None or action is None or severity is None:
            return None
        if is_silence(when):
            self.check_silence_rule(fields, field, action)
        rule = Rule(
            id=rule_id,
            when=held(when, (persistence, of)),
            action=action,
            severity=severity,
            text=text or str(when),
            persistence=persistence,
            of=of,
            cooldown=cooldown,
            scope=self.scope(fields.get("scope"), f"{field}.scope", when),
            downgrade=downgrade,
            conservative=conservative,
            mode=mode,
            inhibits=tuple(name for _, name, _ in inhibited),
            parameters=parameters,
        )
        inhibits += [(rule, at, entry) for at, _, entry in inhibited]
        return rule

    def word_for_inhibits(
        self, node: yaml.MappingNode, fields: Mapping[str, yaml.Node], field: str
    ) -> str:
        """``inhibits``, or what it was called where a rule says that."""
        if OUTDATED not in fields:
            return "inhibits"
        key = next(key for key, _ in node.value if key.value == OUTDATED)
        if "inhibits" in fields:
            message = "is the former name of inhibits; expected one of them"
            self.fault(key, f"{field}.{OUTDATED}", message)
        message = f"is called inhibits now; {OUTDATED} is still read"
        self.outdated.append(fault_at(key, f"{field}.{OUTDATED}", message))
        return OUTDATED

    def rule_id(self, node: yaml.Node | None, field: str) -> str:
        """The id, which no other rule of the table may have."""
        rule_id = self.text(node, f"{field}.id", MAX_ID)
        if node is None or not rule_id:
            return ""
        ids = self.lines
        if not _ID.fullmatch(rule_id):
            message = f"expected a to z, 0 to 9 and _, a letter first, got {shown(node)}"
            self.fault(node, f"{field}.id", message)
        elif rule_id in RESERVED:
            self.fault(node, f"{field}.id", f'"{rule_id}" is a reason of its own, not a rule')
        elif rule_id in ids:
            self.fault(
                node, f"{field}.id", f'"{rule_id}" is already the rule of line {ids[rule_id]}'
            )
        ids.setdefault(rule_id, node.start_mark.line + 1)
        self.sources.setdefault(rule_id, node.start_mark.name)
        return rule_id

    def persistence(self, fields: Mapping[str, yaml.Node], field: str) -> tuple[int, int]:
        """``for`` and ``of``."""
        low, high = span(Rule, "persistence")
        persistence = self.whole(fields.get("for"), f"{field}.for", low, high, 1)
        low, high = span(Rule, "of")
        usual = min(persistence, high)
        of = self.whole(fields.get("of"), f"{field}.of", low, high, usual)
        if "of" in fields and of < persistence:
            message = f"expected at least for, which is {persistence}; got {of}"
            self.fault(fields["of"], f"{field}.of", message)
        return persistence, of

    def scope(self, node: yaml.Node | None, field: str, when: Condition | Group) -> RuleScope:
        """Whose rule it is, which its conditions say; a scope that is given must fit."""
        parts = list(conditions(when))
        scope, reason = RuleScope.STEP, "no condition is about seeds or other ranks"
        for part in parts:
            if is_seeds(part.metric):
                scope, reason = RuleScope.SEED, f"{part.metric} is a seed's"
            elif part.operator in ON_PEERS:
                scope, reason = RuleScope.RANK, f"{part.operator} compares ranks"
        given = self.choice(node, field, RuleScope)
        if node is not None and given is not None and given is not scope:
            self.fault(node, field, f"expected {scope}, as {reason}; got {given}")
        return scope

    def ids(self, node: yaml.Node | None, field: str) -> list[tuple[str, str, yaml.Node]]:
        """Ids of other rules: where each stands, the id, its node."""
        if node is None:
            return []
        return [
            (at, name, entry)
            for at, entry in self.entries(node, field)
            if (name := self.text(entry, at))
        ]

    def check_silence_rule(
        self, fields: Mapping[str, yaml.Node], field: str, action: Action
    ) -> None:
        """A rank that sends nothing makes no observations, and nobody asks for it."""
        if action is not Action.CONTINUE:
            message = f"expected CONTINUE: a stale rank sends no request; got {action}"
            self.fault(fields["action"], f"{field}.action", message)
        for name in _MEANINGLESS_IN_SILENCE:
            if name in fields:
                message = "has no meaning beside missing_for of the metric step"
                self.fault(fields[name], f"{field}.{name}", message)

    def check_inhibits(
        self, rules: list[Rule], inhibits: list[tuple[Rule, str, yaml.Node]]
    ) -> None:
        """Inhibited rules exist, are no more severe, and do not inhibit in turn, not even
        by way of others."""
        by_id = {rule.id: rule for rule in rules}
        inhibited: dict[str, dict[str, tuple[str, yaml.Node]]] = {name: {} for name in by_id}
        for rule, field, node in inhibits:
            name = str(node.value).strip()
            other = by_id.get(name)
            if other is None:
                if name not in self.lines:  # a rule that is itself wrong has its own fault
                    message = f"no rule has this id{self.meant(name, by_id)}"
                    self.fault(node, field, message)
            elif other is rule:
                self.fault(node, field, "a rule cannot inhibit itself")
            elif RANK_OF[other.severity] > RANK_OF[rule.severity]:
                message = f'"{name}" is {other.severity}, more severe than this rule'
                self.fault(node, field, message)
            else:
                inhibited[rule.id][name] = field, node
        for cycle in cycles(inhibited):
            for place, rule_id in enumerate(cycle):
                before, name = cycle[place - 1], cycle[(place + 1) % len(cycle)]
                field, node = inhibited[rule_id][name]
                way = ": neither" if before == name else f' by way of "{before}": none'
                message = f'"{name}" inhibits this rule{way} would ever be reported'
                self.fault(node, field, message)

    def parameters(
        self, node: yaml.Node | None, field: str, action: Action | None
    ) -> dict[str, float]:
        """What the rule asks of an update."""
        if node is None:
            return {}
        parameters = {}
        for name, value in self.mapping(node, field, PARAMETERS).items():
            parameter, at = PARAMETERS[name], f"{field}.{name}"
            if action is not None and action not in parameter.actions:
                whose = " and ".join(parameter.actions)
                self.fault(value, at, f"only {whose} may have it, this is {action}")
            number = self.parameter(value, at, parameter)
            if number is not None:
                parameters[name] = number
        return parameters

    def parameter(self, node: yaml.Node, field: str, form: Parameter) -> float | None:
        """One value of ``parameters``, None when it is none."""
        if form.flag:
            if shown(node).lower() == "true":
                return 1.0
            self.fault(node, field, f"expected true, got {shown(node)}")
            return None
        number = self.number(node, field)
        if number is not None and not 0.0 < number <= form.most:
            most = f", at most {form.most:g}" if form.most < inf else ""
            self.fault(node, field, f"expected more than 0{most}, got {shown(node)}")
            return None
        return number
