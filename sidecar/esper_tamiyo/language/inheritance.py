"""Inheritance: a table of differences, joined with the one that it extends.

Joined are nodes, which keep their file and line, so that a fault is reported where it was
written: in the table, or in the one that it extends.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from typing import NamedTuple

import yaml

from esper_tamiyo.language.condition_reader import CONDITION_FIELDS, GROUPS
from esper_tamiyo.language.table_reader import EXTENDS, OUTDATED, REMOVE
from esper_tamiyo.language.yaml_nodes import Fault, JoinedList, NodeReader

RULES = "rules"

Pair = tuple[yaml.Node, yaml.Node]
"""A key and its value."""

_CONDITION = CONDITION_FIELDS | GROUPS
_INHIBITS = frozenset({"inhibits", OUTDATED})


class JoinedTable(NamedTuple):
    """A table joined with its base, and what is wrong with the way it extends that."""

    root: yaml.Node
    faults: list[Fault]


def extended(root: yaml.Node) -> yaml.Node | None:
    """The value of ``extends``, None in a table that stands alone."""
    if not isinstance(root, yaml.MappingNode):
        return None
    return next((value for key, value in root.value if key.value == EXTENDS), None)


def joined(root: yaml.MappingNode, base: yaml.MappingNode, base_name: str) -> JoinedTable:
    """``root`` on top of ``base``, a valid table that errors call ``base_name``.

    Fields of the table and of its rules replace those of the base. ``baseline`` and
    ``conservative`` are joined field by field. A rule that has a condition keeps nothing of
    the condition in the base, its ``scope`` included. Rules keep their place, new ones
    follow behind. An id that is removed disappears from ``inhibits`` of the base as well.
    """
    joiner = _Joiner(base_name)
    return JoinedTable(joiner.table(root, base), joiner.faults)


class _Joiner(NodeReader):
    """Joins one table with its base."""

    def __init__(self, base_name: str) -> None:
        super().__init__()
        self._base_name = base_name

    def table(self, root: yaml.MappingNode, base: yaml.MappingNode) -> yaml.MappingNode:
        """All of both."""
        own: dict[str, yaml.Node] = {}
        pairs: list[Pair] = []
        for key, value in root.value:
            if key.value not in (EXTENDS, REMOVE, RULES) or key.value == RULES in own:
                pairs.append((key, value))
            elif key.value in own:
                self.fault(key, str(key.value), "given twice")
            else:
                own[key.value] = value
        inherited = {key.value: (key, value) for key, value in base.value}
        rules_key, rules_of_base = inherited.pop(RULES)
        entries = self.entries(rules_of_base, RULES)
        ids = [_id_of(node) for _, node in entries]
        removed = self._removed(own.get(REMOVE), dict.fromkeys(ids))
        kept = self._rules(own.get(RULES), entries, removed)
        rules = JoinedList(*kept, own.get(RULES) or own.get(REMOVE) or root)
        joint = _over(list(inherited.values()), [_deepened(pair, inherited) for pair in pairs])
        return _mapping([*joint, (rules_key, rules)], root)

    def _removed(self, node: yaml.Node | None, ids: Collection[str]) -> set[str]:
        """Ids of rules of the base that are left out."""
        removed = set()
        for field, entry in self.entries(node, REMOVE) if node is not None else ():
            name = self.text(entry, field)
            if name in ids:
                removed.add(name)
            elif name:
                self.fault(entry, field, self._no_rule(name, ids))
        return removed

    def _rules(
        self,
        node: yaml.Node | None,
        inherited: list[tuple[str, yaml.Node]],
        removed: Container[str],
    ) -> tuple[list[yaml.Node], list[str]]:
        """Those of the base, changed, and the new ones; and the names of their places."""
        ids = [_id_of(entry) for _, entry in inherited]
        known = frozenset(ids)
        changes: dict[str, tuple[str, yaml.Node]] = {}
        new: list[tuple[str, yaml.Node]] = []
        for field, entry in self.entries(node, RULES) if node is not None else ():
            name = _id_of(entry)
            if name in removed:
                self.fault(entry, f"{field}.id", f'"{name}" is removed as well')
            elif name in known and name not in changes:
                changes[name] = field, entry
            elif name and name not in known and not _names_of(entry) & _CONDITION:
                message = f"{self._no_rule(name, ids)}; a new rule needs a condition"
                self.fault(entry, f"{field}.id", message)
            else:
                new.append((field, entry))
        kept = [
            _changed(field, entry, changes.get(name), removed)
            for name, (field, entry) in zip(ids, inherited, strict=True)
            if name not in removed
        ]
        return [entry for _, entry in (*kept, *new)], [field for field, _ in (*kept, *new)]

    def _no_rule(self, name: str, ids: Collection[str]) -> str:
        return f"no rule of {self._base_name} has this id{self.meant(name, ids)}"


def _changed(
    field: str,
    base: yaml.Node,
    change: tuple[str, yaml.Node] | None,
    removed: Container[str],
) -> tuple[str, yaml.Node]:
    """A rule of the base as the table has it, and the name of its place."""
    pairs = [_without(pair, removed) for pair in base.value]
    if change is None:
        return field, _mapping(pairs, base)
    field, own = change
    given = _names_of(own)
    if given & _CONDITION:
        pairs = [pair for pair in pairs if pair[0].value not in _CONDITION | {"scope"}]
    if given & _INHIBITS:
        pairs = [pair for pair in pairs if pair[0].value not in _INHIBITS]
    return field, _mapping(_over(pairs, own.value), own)


def _over(pairs: list[Pair], own: list[Pair]) -> list[Pair]:
    """``own`` in place of what has the same names among ``pairs``, faults and all."""
    given = {key.value for key, _ in own if isinstance(key, yaml.ScalarNode)}
    return [*(pair for pair in pairs if pair[0].value not in given), *own]


def _deepened(pair: Pair, inherited: dict[str, Pair]) -> Pair:
    """A field of the table; a mapping in it goes on top of the base's."""
    key, value = pair
    name = key.value if isinstance(key, yaml.ScalarNode) else ""
    below = inherited.get(name, (None, None))[1]
    if isinstance(value, yaml.MappingNode) and isinstance(below, yaml.MappingNode):
        return key, _mapping(_over(below.value, value.value), value)
    return pair


def _without(pair: Pair, removed: Container[str]) -> Pair:
    """A field of a rule of the base, which inhibits nothing that is removed."""
    key, value = pair
    if key.value not in _INHIBITS:
        return pair
    left = [entry for entry in value.value if str(entry.value).strip() not in removed]
    return key, yaml.SequenceNode(value.tag, left, value.start_mark, value.end_mark)


def _mapping(pairs: list[Pair], at: yaml.Node) -> yaml.MappingNode:
    return yaml.MappingNode("tag:yaml.org,2002:map", pairs, at.start_mark, at.end_mark)


def _names_of(node: yaml.Node) -> set[str]:
    """The fields of a rule; none of what is no rule."""
    if not isinstance(node, yaml.MappingNode):
        return set()
    return {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}


def _id_of(node: yaml.Node) -> str:
    """Its id, "" where it has none that could be one."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next(
        (
            str(value.value).strip()
            for key, value in pairs
            if key.value == "id" and isinstance(value, yaml.ScalarNode)
        ),
        "",
    )
