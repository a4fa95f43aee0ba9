"""What a table file costs is bounded, whatever is in it, and what is too much has its line."""

import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_tamiyo.cli import main
from esper_tamiyo.language import lint, yaml_nodes
from esper_tamiyo.language.lint import doubts
from esper_tamiyo.language.table import MAX_CONDITIONS, MAX_ID, MAX_RULES, MAX_TEXT
from esper_tamiyo.language.table_file import TableError, TableSource, files_behind, parse
from esper_tamiyo.language.yaml_nodes import MAX_FAULTS

REST = "severity: HIGH, action: PAUSE"


def parsed(text):
    return parse(TableSource("t.yaml", text.encode()))


def refused(text):
    with pytest.raises(TableError) as caught:
        parsed(text)
    return str(caught.value).splitlines()


def table(*rules):
    return "version: one\nrules:\n" + "".join(f"  - {{{rule}}}\n" for rule in rules)


def test_rules_that_all_inhibit_one_another_are_refused_by_one_cycle():
    ids = [f"r{number}" for number in range(120)]
    lines = refused(
        table(
            *(
                f"id: {rule}, metric: loss, above: 1, {REST}, "
                f"inhibits: [{', '.join(name for name in ids if name != rule)}]"
                for rule in ids
            )
        )
    )
    assert lines == [
        't.yaml:3: rules[0].inhibits[0]: "r1" inhibits this rule: neither would ever be '
        "reported",
        't.yaml:4: rules[1].inhibits[0]: "r0" inhibits this rule: neither would ever be '
        "reported",
    ]


def test_aliases_that_multiply_are_refused_before_they_are_followed():
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (line,) = refused(laughs)
    assert line == "t.yaml:6: more than 250,000 values, those behind aliases included"


def test_an_alias_within_itself_is_refused():
    (line,) = refused("version: one\nrules: &all\n  - *all\n")
    assert line == "t.yaml:2: an alias is within its own anchor"


def test_aliases_as_people_use_them_are_read():
    text = table(
        f"id: a, metric: loss, above: 1, inhibits: &low [c, d], {REST}",
        f"id: b, metric: loss, above: 1, inhibits: *low, {REST}",
        f"id: c, metric: loss, above: 2, {REST}",
        f"id: d, metric: loss, above: 3, {REST}",
    )
    assert [rule.inhibits for rule in parsed(text).rules[:2]] == [("c", "d"), ("c", "d")]


def test_what_is_nested_too_deeply_has_its_line():
    (line,) = refused("version: one\nrules:\n  - " + "[" * 5000)
    assert line == "t.yaml:3: not valid YAML: nested too deeply"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            table(*(f"id: r{n}, metric: loss, above: 1, {REST}" for n in range(MAX_RULES + 1))),
            f"t.yaml:{MAX_RULES + 3}: rules[{MAX_RULES}]: expected at most 1,000 rules",
        ),
        (
            table(
                f"id: a, {REST}, any: [{'{metric: loss, above: 1}, ' * (MAX_CONDITIONS + 1)}]"
            ),
            f"t.yaml:3: rules[0].any[{MAX_CONDITIONS}]: expected at most 32 conditions",
        ),
        (
            table(f"id: {'a' * (MAX_ID + 1)}, metric: loss, above: 1, {REST}"),
            "t.yaml:3: rules[0].id: expected at most 100 characters, got 101",
        ),
        (
            table(f"id: a, metric: loss, above: 1, {REST}, text: {'x' * (MAX_TEXT + 1)}"),
            "t.yaml:3: rules[0].text: expected at most 1,000 characters, got 1,001",
        ),
        (
            table(f"id: a, metric: loss, above: {'9' * 10_000}, {REST}"),
            f"t.yaml:3: rules[0].above: expected a number, got {'9' * 59}…",
        ),
        (
            table(f"id: a, metric: loss, above: 1, for: {'9' * 300}, {REST}"),
            f"t.yaml:3: rules[0].for: expected at most 2147483648, got {'9' * 59}…",
        ),
        (
            table(f"id: a, metric: loss, above: 1, {REST}, {'y' * 500}: 1"),
            f"t.yaml:3: rules[0].{'y' * 59}…: unknown field",
        ),
    ],
)
def test_what_is_too_much_is_refused_at_its_line(text, expected):
    assert expected in refused(text)


def test_as_many_conditions_as_are_allowed_are_counted_over_both_levels():
    half = "all: [" + "{metric: loss, above: 1}, " * (MAX_CONDITIONS // 2) + "]"
    good = f"id: a, {REST}, any: [{{{half}}}, {{{half}}}]"
    assert parsed(table(good)).rules[0].id == "a"
    lines = refused(table(f"id: a, {REST}, any: [{{{half}}}, {{{half}}}, {{{half}}}]"))
    assert lines == ["t.yaml:3: rules[0].any: expected at most 32 conditions, got 48"]


def test_of_many_faults_the_first_are_told():
    lines = refused(table(*["nonsense: 1"] * 400))
    assert len(lines) == MAX_FAULTS + 1
    assert "and there are more faults; the first 100 faults are shown" in lines[-1]


def test_of_many_doubts_the_first_are_told(tmp_path, capsys):
    path = tmp_path / "t.yaml"
    path.write_text(
        table(
            *(
                f"id: r{n}, metric: loss, above: 1, {REST}, "
                f"inhibits: [{', '.join(f'r{m}' for m in range(n))}]"
                for n in range(20)
            )
        )
    )
    assert main(["check", str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == MAX_FAULTS + 1
    assert lines[-1] == "and 90 more of this kind"


def test_a_chain_of_tables_is_followed_to_its_allowed_end(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\nversion: one\n")
    assert len(files_behind(str(tmp_path / "0.yaml"))) == 16


def test_rules_with_many_ways_cost_no_more_than_a_table_may(monkeypatch):
    looked_at = []
    real = lint._impossible
    monkeypatch.setattr(lint, "_impossible", lambda way: looked_at.append(way) or real(way))
    pair = "{any: [{metric: loss, above: 1}, {metric: accuracy, above: 0.5}]}"
    rules = [f"id: r{n}, {REST}, all: [{', '.join([pair] * 9)}]" for n in range(60)]
    assert doubts(parsed(table(*rules))) == []
    assert len(looked_at) <= lint.MAX_WAYS_OF_TABLE


WORDS = st.sampled_from(
    ["loss", "above", "any", "all", "[]", "{}", "1e400", "~", "*x", "&x a", "\x85", "é", "🙂"]
)
NODES = st.recursive(
    WORDS | st.text(max_size=20) | st.integers() | st.floats() | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=25,
)
RULES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.sampled_from(["a", "b", "c", "A", "nominal"]) | NODES,
            "metric": st.sampled_from(["loss", "step", "gradient_norm"]) | NODES,
            "above": NODES,
            "for": NODES,
            "any": NODES,
            "all": NODES,
            "inhibits": st.lists(st.sampled_from("abc"), max_size=4) | NODES,
            "severity": st.sampled_from(["HIGH", "WARNING"]) | NODES,
            "action": st.sampled_from(["PAUSE", "OPTIMIZER"]) | NODES,
            "parameters": NODES,
            "text": NODES,
        },
    ),
    max_size=8,
)


@settings(deadline=None)
@given(RULES, NODES, st.integers(0, 2**32))
def test_any_table_is_read_or_refused_line_by_line(rules, version, seed):
    text = yaml.safe_dump({"version": version, "rules": rules}, allow_unicode=True)
    chance = random.Random(seed)
    if chance.random() < 0.3:  # cut or changed somewhere
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice("[]{}&*:- \n\"'") * chance.randrange(3)
    try:
        doubts(parsed(text))
    except TableError as error:
        for line in str(error).split("\n"):
            assert line.startswith("t.yaml:")
            assert line.isprintable()


def test_the_size_of_a_file_is_stated():
    assert yaml_nodes.MAX_BYTES == 1 << 20
    assert refused("#" * (yaml_nodes.MAX_BYTES + 1)) == ["t.yaml: larger than 1048576 bytes"]
