"""Tables of a few rules as text, read, and what is said about a bad one."""

import pytest

from esper_tamiyo.language.table_file import TableError, TableSource, parse


def parsed(text):
    """The table that this text is."""
    return parse(TableSource("thresholds.yaml", text.encode()))


def errors(text):
    """The lines that refuse this text."""
    with pytest.raises(TableError) as caught:
        parsed(text)
    return str(caught.value).splitlines()


def table(*rules, top=""):
    """A table with these rules, each a line of YAML flow; rules[0] is on line 4."""
    lines = "\n".join(f"  - {{{rule}}}" for rule in rules)
    return f"version: one\n{top}\nrules:\n{lines}\n"


REST = "severity: HIGH, action: PAUSE"
