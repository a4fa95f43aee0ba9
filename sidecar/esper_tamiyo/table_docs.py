"""Makes ``docs/tables.md`` and ``docs/table.schema.json`` from the classes of a table.

``python -m esper_tamiyo.table_docs`` writes them, ``--check`` only says whether they
are in step, with exit status 1 when they are not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from esper_otel.leyline.decisions import Action
from esper_otel.leyline.generated import bring_up_to_date
from esper_otel.leyline.metrics import STEP_KEYS
from esper_tamiyo.judging.hindsight import ARRIVAL_NS, HINDSIGHT_NS
from esper_tamiyo.judging.silence import UNKNOWN_AFTER_STEPS
from esper_tamiyo.judging.witness import RuleState
from esper_tamiyo.language.derived import DERIVED, KNOWN
from esper_tamiyo.language.operators import (
    BASELINES,
    FORMS,
    BaselineKind,
    Form,
    Operand,
    Operator,
)
from esper_tamiyo.language.parameters import PARAMETERS, Parameter
from esper_tamiyo.language.table import Baseline, Combine, Condition, Conservative, Rule, meta
from esper_tamiyo.language.table_reader import ACTIONS
from esper_tamiyo.language.updates import TOLD
from esper_tamiyo.table_docs_text import PAGE_TEXT

PAGE = Path("docs/tables.md")
SCHEMA = Path("docs/table.schema.json")

_OPERANDS: dict[Operand, tuple[str, dict[str, Any]]] = {
    Operand.BOUND: ("number", {"type": "number"}),
    Operand.FACTOR: ("factor, above 0", {"type": "number", "exclusiveMinimum": 0}),
    Operand.AMOUNT: ("amount, above 0", {"type": "number", "exclusiveMinimum": 0}),
    Operand.COUNT: ("whole number", {"type": "integer"}),
    Operand.FLAG: ("`true`", {"const": True}),
}
_REQUIRED = ["id", "severity", "action"]


def schema() -> str:
    """The JSON Schema of a table, as text."""
    return json.dumps(_schema(), indent=2, ensure_ascii=False) + "\n"


def page() -> str:
    """The reference page, as Markdown."""
    return PAGE_TEXT.format(
        rule_fields=_fields(Rule, _rule_fields()),
        operators=_operators(),
        condition_fields=_fields(Condition, ("metric", "baseline", "baseline_of", "release")),
        baselines=_rows(("baseline", "what it is"), _coded(BASELINES)),
        baseline_fields=_fields(Baseline, Baseline.__struct_fields__),
        conservative_fields=_fields(Conservative, Conservative.__struct_fields__),
        derived=_rows(
            ("key", "unit", "meaning", "when"),
            [
                (f"`{one.key}`", f"`{one.unit}`", one.meaning, one.when)
                for one in (row.metric for row in DERIVED)
            ],
        ),
        parameters=_rows(
            ("parameter", "values", "of", "meaning"),
            [
                (f"`{name}`", _takes(one), ", ".join(one.actions), one.meaning)
                for name, one in PARAMETERS.items()
            ],
        ),
        told=", ".join(f"`{key}`" for key in STEP_KEYS if key in TOLD),
        arrival=f"{ARRIVAL_NS / 1e9:g} s",
        hindsight=f"{HINDSIGHT_NS / 1e9:g} s",
        unknown_after=UNKNOWN_AFTER_STEPS,
        states=_rows(
            ("state", "meaning"),
            [(f"`{state.value}`", meaning) for state, meaning in STATES.items()],
        ),
    )


STATES: dict[RuleState, str] = {
    RuleState.INACTIVE: "its condition does not hold",
    RuleState.PENDING: "its condition holds, or did at some of the last `of` observations, but "
    "not yet at as many as `for` asks",
    RuleState.FIRING: "its condition holds and has for long enough: the rule acts, unless it "
    "cools down, is silenced or only observes",
    RuleState.RECOVERING: "it fired and its condition holds no longer, but it has not been "
    "released yet: it still acts",
    RuleState.UNKNOWN: "a value it needs is missing, a baseline still warms up, or nothing "
    "comes at all: nobody can say. What it had counted is kept; a rule that fired and is "
    "unknown does not act, and conservative mode does not end meanwhile",
}


def _rule_fields() -> tuple[str, ...]:
    return tuple(name for name in Rule.__struct_fields__ if name != "when")


def _named(owner: type[msgspec.Struct], field: str) -> str:
    """What a field is called in YAML."""
    place = owner.__struct_fields__.index(field)
    return owner.__struct_encode_fields__[place]


def _schema() -> dict[str, Any]:
    condition = _condition_properties()
    one_of = [{"required": [name]} for name in (*Operator, *Combine)]
    groups = {
        name.value: {
            "type": "array",
            "minItems": 1,
            "items": {"$ref": "#/$defs/part"},
            "description": f"conditions or groups, {name.value} of which must hold",
        }
        for name in Combine
    }
    rule = {_named(Rule, field): _property(Rule, field) for field in _rule_fields()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Threshold table of Tamiyo",
        "description": "Made by esper_tamiyo.table_docs; edits here are lost.",
        "type": "object",
        "required": ["version", "rules"],
        "additionalProperties": False,
        "properties": {
            "version": {
                "type": ["string", "number"],
                "description": "name of the table; a hash of the file is added to it",
            },
            "baseline": _object(Baseline),
            "conservative": _object(Conservative),
            "rules": {
                "type": "array",
                "minItems": 1,
                "items": {"$ref": "#/$defs/rule"},
                "description": "tried in this order",
            },
        },
        "$defs": {
            "rule": {
                "type": "object",
                "required": _REQUIRED,
                "additionalProperties": False,
                "properties": {**rule, **condition, **groups},
                "oneOf": one_of,
            },
            "part": {
                "type": "object",
                "additionalProperties": False,
                "properties": {**condition, **groups},
                "oneOf": one_of,
            },
        },
    }


def _condition_properties() -> dict[str, Any]:
    fields = {
        name: _property(Condition, name) for name in ("baseline", "baseline_of", "release")
    }
    for name in ("metric", "baseline_of"):
        said = meta(Condition, name).description
        fields[name] = {"enum": sorted(KNOWN), "description": said}
    operators = {
        operator.value: {**_operand(form), "description": form.meaning}
        for operator, form in FORMS.items()
    }
    return {**fields, **operators}


def _operand(form: Form) -> dict[str, Any]:
    found = dict(_OPERANDS[form.operand][1])
    if form.operand is Operand.COUNT:
        found["minimum"] = form.least
    return found


def _object(owner: type[msgspec.Struct]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            _named(owner, name): _property(owner, name) for name in owner.__struct_fields__
        },
    }


def _property(owner: type[msgspec.Struct], field: str) -> dict[str, Any]:
    """As msgspec describes the field, with its enumerations spelt out in place."""
    made = msgspec.json.schema(owner)
    properties = made["$defs"][owner.__name__]["properties"]
    found = dict(properties[_named(owner, field)])
    kind = get_type_hints(owner)[field]
    if isinstance(kind, type) and issubclass(kind, StrEnum):  # in the order they are told
        for name in ("$ref", "allOf"):
            found.pop(name, None)
        members = ACTIONS if kind is Action else tuple(kind)
        found = {"enum": [member.value for member in members], **found}
    if "anyOf" in found:  # a number or nothing: leaving it out is how a table says nothing
        found["type"] = next(one["type"] for one in found.pop("anyOf") if one["type"] != "null")
    found.pop("default", None)
    if field == "parameters":
        found["properties"] = {
            name: {**_values_of(one), "description": one.meaning}
            for name, one in PARAMETERS.items()
        }
        found["additionalProperties"] = False
    return found


def _takes(one: Parameter) -> str:
    if one.flag:
        return "`true`"
    return f"above 0, at most {one.most:g}" if one.most < inf else "above 0"


def _values_of(one: Parameter) -> dict[str, Any]:
    if one.flag:
        return {"const": True}
    most = {"maximum": one.most} if one.most < inf else {}
    return {"type": "number", "exclusiveMinimum": 0.0, **most}


def _operators() -> str:
    rows = []
    for operator, form in FORMS.items():
        kind = _OPERANDS[form.operand][0]
        if form.operand is Operand.COUNT:
            kind += f", at least {form.least}"
        eases = {-1: "lower", 0: "", 1: "higher"}[form.eases]
        rows.append((f"`{operator.value}`", kind, form.meaning, eases))
    return _rows(("operator", "takes", "holds when", "its `release` is"), rows)


def _fields(owner: type[msgspec.Struct], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        bounds = meta(owner, name)
        yaml_name = _named(owner, name)
        rows.append(
            (
                f"`{yaml_name}`",
                _values(owner, name),
                "required" if name in _REQUIRED else _default(owner, name),
                str(bounds.description),
            )
        )
    return _rows(("field", "values", "unless given", "meaning"), rows)


def _values(owner: type[msgspec.Struct], field: str) -> str:
    described = _property(owner, field)
    if "enum" in described:
        return ", ".join(f"`{value}`" for value in described["enum"])
    kind = described.get("type")
    if kind == "integer":
        return f"{described['minimum']} to {described['maximum']:,}"
    names = {
        "boolean": "`true`, `false`",
        "number": "a number",
        "array": "a list",
        "object": "a mapping",
    }
    return names.get(str(kind), "text")


def _default(owner: type[msgspec.Struct], field: str) -> str:
    if field == "of":
        return "`for`"
    place = len(owner.__struct_fields__) - owner.__struct_fields__.index(field)
    defaults = owner.__struct_defaults__
    value = defaults[-place] if place <= len(defaults) else None
    if value is None or value in ("", (), {}) or not isinstance(value, bool | int | StrEnum):
        return ""
    return f"`{str(value).lower()}`"


def _coded(meanings: dict[BaselineKind, str]) -> list[tuple[str, str]]:
    return [(f"`{kind.value}`", meaning) for kind, meaning in meanings.items()]


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write both, or check that they are in step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether they differ")
    arguments = parser.parse_args(argv)
    made = {PAGE: page(), SCHEMA: schema()}
    return bring_up_to_date(made, "python -m esper_tamiyo.table_docs", check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
