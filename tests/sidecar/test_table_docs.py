"""The reference page and the JSON Schema say what the classes of a table say."""

import json

import pytest

from esper_tamiyo.language.condition_reader import CONDITION_FIELDS, GROUPS
from esper_tamiyo.language.derived import KNOWN
from esper_tamiyo.language.nodes import NodeReader
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.table_reader import RULE_FIELDS, TOP_FIELDS
from esper_tamiyo.table_docs import PAGE, SCHEMA, main, page, schema


@pytest.mark.parametrize(("path", "made"), [(PAGE, page), (SCHEMA, schema)])
def test_what_lies_in_docs_is_up_to_date(path, made, request):
    assert (request.config.rootpath / path).read_text() == made()


def test_the_check_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert main(["--check"]) == 1
    assert capsys.readouterr().err.count("run python -m esper_tamiyo.table_docs") == 2
    assert main([]) == 0
    assert main(["--check"]) == 0


def test_the_schema_knows_the_fields_that_are_read():
    made = json.loads(schema())
    assert made["properties"].keys() == set(TOP_FIELDS)
    rule, part = made["$defs"]["rule"], made["$defs"]["part"]
    assert rule["properties"].keys() == set(RULE_FIELDS) | CONDITION_FIELDS | GROUPS
    assert part["properties"].keys() == CONDITION_FIELDS | GROUPS
    assert set(part["properties"]["metric"]["enum"]) == set(KNOWN)
    for fields in (rule["properties"], part["properties"]):
        assert all(field["description"] for field in fields.values())


@pytest.mark.parametrize("name", [*RULE_FIELDS, *Operator])
def test_the_page_has_every_field(name):
    assert f"| `{name}` |" in page()


def test_words_of_a_reader_are_those_of_the_page():
    """A table in the page's words has no unknown fields."""
    assert NodeReader.meant("abov", CONDITION_FIELDS) == "; did you mean above?"
