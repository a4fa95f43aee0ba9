"""Makes the JSON Schema of tables, a part of the package, from the classes of a table."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from esper_otel.leyline.custom import PREFIX
from esper_otel.leyline.decisions import Action
from esper_otel.leyline.frames import MAX_CUSTOM_NAME
from esper_tamiyo.language.derived import KNOWN
from esper_tamiyo.language.operators import FORMS, Form, Operand, Operator
from esper_tamiyo.language.parameters import PARAMETERS, Parameter
from esper_tamiyo.language.table import (
    Baseline,
    Combine,
    Condition,
    Conservative,
    RecordSpan,
    Rule,
    meta,
)
from esper_tamiyo.language.table_reader import ACTIONS, OUTDATED
from ops.generate.files import COMMAND

SCHEMA = Path("sidecar/esper_tamiyo/tables/table.schema.json")

ID = "urn:esper-otel:schema:threshold-table"

OPERANDS: dict[Operand, tuple[str, dict[str, Any]]] = {
    Operand.BOUND: ("number", {"type": "number"}),
    Operand.FACTOR: ("factor, above 0", {"type": "number", "exclusiveMinimum": 0}),
    Operand.AMOUNT: ("amount, above 0", {"type": "number", "exclusiveMinimum": 0}),
    Operand.COUNT: ("whole number", {"type": "integer"}),
    Operand.FLAG: ("`true`", {"const": True}),
}
REQUIRED = ["id", "severity", "action"]


def files() -> dict[Path, str]:
    """What is written, by its place in the repository."""
    return {SCHEMA: schema()}


def schema() -> str:
    """The JSON Schema of a table, as text."""
    return json.dumps(_schema(), indent=2, ensure_ascii=False) + "\n"


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
    rule = {yaml_name(Rule, field): property_of(Rule, field) for field in rule_fields()}
    rule[OUTDATED] = {**rule["inhibits"], "deprecated": True}
    rule[OUTDATED]["description"] = "former name of `inhibits`"
    fields = {**rule, **condition, **groups}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ID,
        "title": "Threshold table of Tamiyo",
        "description": f"Made by {COMMAND}; edits here are lost.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "version": {
                "type": ["string", "number"],
                "description": "name of the table; the sidecar appends a hash of the file and "
                "of those that it extends",
            },
            "extends": {
                "type": "string",
                "description": "the table that this one extends: a shipped one, or a file, "
                "relative to this one. This table lists only the differences",
            },
            "remove": {
                "type": "array",
                "items": {"type": "string"},
                "description": "ids of rules to remove from the extended table",
            },
            "baseline": _object(Baseline),
            "record": _object(RecordSpan),
            "conservative": _object(Conservative),
            "rules": {
                "type": "array",
                "description": "evaluated in this order. With `extends`, a rule with an id of "
                "the extended table changes that rule field by field; others are appended",
            },
        },
        "dependentRequired": {"remove": ["extends"]},
        "if": {"required": ["extends"]},
        "then": {"properties": {"rules": {"items": {"$ref": "#/$defs/change"}}}},
        "else": {
            "required": ["version", "rules"],
            "properties": {"rules": {"minItems": 1, "items": {"$ref": "#/$defs/rule"}}},
        },
        "$defs": {
            "rule": {
                "type": "object",
                "required": REQUIRED,
                "additionalProperties": False,
                "properties": fields,
                "oneOf": one_of,
            },
            "change": {
                "type": "object",
                "required": ["id"],
                "additionalProperties": False,
                "properties": fields,
                "oneOf": [*one_of, {"not": {"anyOf": one_of}}],
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
        name: property_of(Condition, name)
        for name in ("baseline", "baseline_of", "release", "rising")
    }
    for name in ("metric", "baseline_of"):
        said = meta(Condition, name).description
        own = {"pattern": f"^{re.escape(PREFIX)}.{{1,{MAX_CUSTOM_NAME}}}$"}
        fields[name] = {"anyOf": [{"enum": sorted(KNOWN)}, own], "description": said}
    operators = {
        operator.value: {**_operand(form), "description": form.meaning}
        for operator, form in FORMS.items()
    }
    return {**fields, **operators}


def _operand(form: Form) -> dict[str, Any]:
    found = dict(OPERANDS[form.operand][1])
    if form.operand is Operand.COUNT:
        found["minimum"] = form.least
    return found


def _object(owner: type[msgspec.Struct]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            yaml_name(owner, name): property_of(owner, name) for name in owner.__struct_fields__
        },
    }


def property_of(owner: type[msgspec.Struct], field: str) -> dict[str, Any]:
    """As msgspec describes the field, with its enumerations spelt out in place."""
    made = msgspec.json.schema(owner)
    properties = made["$defs"][owner.__name__]["properties"]
    found = dict(properties[yaml_name(owner, field)])
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


def rule_fields() -> tuple[str, ...]:
    """The fields of a rule that are written as such: its condition stands beside them."""
    return tuple(name for name in Rule.__struct_fields__ if name != "when")


def yaml_name(owner: type[msgspec.Struct], field: str) -> str:
    """What a field is called in YAML."""
    place = owner.__struct_fields__.index(field)
    return owner.__struct_encode_fields__[place]


def _values_of(one: Parameter) -> dict[str, Any]:
    if one.flag:
        return {"const": True}
    most = {"maximum": one.most} if one.most < inf else {}
    return {"type": "number", "exclusiveMinimum": 0.0, **most}
