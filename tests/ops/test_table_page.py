"""The reference page and the JSON Schema say what the classes of a table say."""

import json
import re

import pytest

from esper_tamiyo.language.condition_reader import CONDITION_FIELDS, GROUPS
from esper_tamiyo.language.derived import KNOWN
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.table_reader import (
    EXTENDS,
    OUTDATED,
    REMOVE,
    RULE_FIELDS,
    TOP_FIELDS,
)
from esper_tamiyo.language.yaml_nodes import NodeReader
from ops.generate.table_page import page
from ops.generate.table_schema import schema


def test_the_schema_knows_the_fields_that_are_read():
    made = json.loads(schema())
    assert made["properties"].keys() == {*TOP_FIELDS, EXTENDS, REMOVE}
    rule, part = made["$defs"]["rule"], made["$defs"]["part"]
    read = {*RULE_FIELDS, OUTDATED}
    assert rule["properties"].keys() == read | CONDITION_FIELDS | GROUPS
    assert part["properties"].keys() == CONDITION_FIELDS | GROUPS
    registry, own = part["properties"]["metric"]["anyOf"]
    assert set(registry["enum"]) == set(KNOWN)
    assert re.fullmatch(own["pattern"], "custom.val_loss")
    for fields in (rule["properties"], part["properties"]):
        assert all(field["description"] for field in fields.values())


@pytest.mark.parametrize("name", [*RULE_FIELDS, *Operator])
def test_the_page_has_every_field(name):
    assert f"| `{name}` |" in page()


def test_words_of_a_reader_are_those_of_the_page():
    """A table in the page's words has no unknown fields."""
    assert NodeReader().meant("abov", CONDITION_FIELDS) == "; did you mean above?"
