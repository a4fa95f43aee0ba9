"""A table is read as it is written, and a file that is none is refused at its line."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.decisions import Action, Severity
from esper_tamiyo.language.operators import BaselineKind, Operator
from esper_tamiyo.language.table import Combine, Condition, RuleMode, RuleScope
from esper_tamiyo.language.table_file import TableError, TableSource, load, parse
from esper_tamiyo.language.yaml_nodes import MAX_BYTES
from sidecar.tables_made import REST, errors, parsed, table


def test_a_rule_is_read_in_full():
    rule = parsed(
        """
        version: 1.10
        baseline: {window: 32, warmup: 8}
        conservative: {clean_steps: 7}
        rules:
          - id: diverging
            all:
              - {metric: loss, above_baseline: 4, baseline_of: loss_volatility}
              - any: [{metric: loss, above: 1e3}, {nonfinite: true}]
            for: 2
            of: 4
            cooldown: 3
            severity: HIGH
            action: OPTIMIZER
            parameters: {lr_scale: 0.5}
            inhibits: [lesser]
            text: Too much.
          - {id: lesser, metric: optimizer_lr, below_baseline: 0.1, baseline: frozen,
             release: 0.5, mode: observe, severity: WARNING, action: CONTINUE}
        """
    )
    assert rule.version.startswith("1.10+")
    assert (rule.baseline.window, rule.baseline.warmup, rule.clean_steps) == (32, 8, 7)
    diverging, lesser = rule.rules
    assert (diverging.persistence, diverging.of, diverging.cooldown) == (2, 4, 3)
    assert (diverging.scope, diverging.inhibits) == (RuleScope.STEP, ("lesser",))
    assert (lesser.mode, lesser.persistence, lesser.of) == (RuleMode.OBSERVE, 1, 1)
    assert lesser.when == Condition(
        "optimizer_lr",
        Operator.BELOW_BASELINE,
        0.1,
        "optimizer_lr",
        BaselineKind.FROZEN,
        release=0.5,
    )
    assert (diverging.severity, diverging.action) == (Severity.HIGH, Action.OPTIMIZER)
    assert diverging.parameters == {"lr_scale": 0.5}
    first, second = diverging.when.parts
    assert (first.metric, first.operator, first.number) == ("loss", Operator.ABOVE_BASELINE, 4)
    assert first.baseline_of == "loss_volatility"
    assert second.combine is Combine.ANY
    assert [part.operator for part in second.parts] == [Operator.ABOVE, Operator.NONFINITE]
    assert second.parts[0].number == 1000.0


def test_the_version_names_the_content():
    one = parsed(table(f"id: a, metric: loss, above: 1, {REST}"))
    two = parsed(table(f"id: a, metric: loss, above: 2, {REST}"))
    assert one.version != two.version
    assert one.version == parsed(table(f"id: a, metric: loss, above: 1, {REST}")).version


def test_a_rule_without_a_text_says_its_condition():
    (rule,) = parsed(table(f"id: a, metric: loss, above_baseline: 3, {REST}")).rules
    assert rule.text == "loss above 3 × its baseline"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "thresholds.yaml:1: the table is empty"),
        ("3", "thresholds.yaml:1: expected a mapping, got 3"),
        ("version: 1\n", "thresholds.yaml:1: rules: missing"),
        ("version: 1\nrules: []\n", "thresholds.yaml:2: rules: expected at least one rule"),
        ("version: 1\nrules: x\n", 'thresholds.yaml:2: rules: expected a list, got "x"'),
        ("version: 1\nrules:\n- 5\n", "thresholds.yaml:3: rules[0]: expected a mapping, got 5"),
        ("version: 1\nrules: [\n", "thresholds.yaml:3: not valid YAML: "),
        ("version: 1\n\tx: 1\n", "thresholds.yaml:2: not valid YAML: "),
        ("version: 1\nx: \x07\n", "thresholds.yaml:2: not valid YAML: "),
        ("version: 1\n---\nversion: 2\n", "thresholds.yaml:2: not valid YAML: "),
        ('version: "\\UFFFFFFFF"\n', "thresholds.yaml:1: not valid YAML: "),
        ("[" * 5000, "thresholds.yaml:1: not valid YAML: nested too deeply"),
        ("version: 1\nrules: &r [{id: a, all: *r}]\n", "thresholds.yaml:2: "),
    ],
)
def test_a_broken_file_is_named_with_its_line(text, line):
    assert errors(text)[0].startswith(line)


def test_a_bad_field_of_the_table_itself_is_named_with_its_line():
    good = f"id: a, metric: loss, above: 1, {REST}"
    cases = {
        "inhibit: 1": "thresholds.yaml:2: inhibit: unknown field",
        "baseline: {windw: 3}": (
            "thresholds.yaml:2: baseline.windw: unknown field; did you mean window?"
        ),
        "baseline: {window: 8, warmup: 9}": (
            "thresholds.yaml:2: baseline.warmup: expected at most the window of 8"
        ),
        "baseline: 4": "thresholds.yaml:2: baseline: expected a mapping, got 4",
        "conservative: {clean_steps: 0}": (
            "thresholds.yaml:2: conservative.clean_steps: expected at least 1, got 0"
        ),
    }
    for top, line in cases.items():
        assert errors(table(good, top=top)) == [line]


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path):
    missing = tmp_path / "missing.yaml"
    for path, reason in (
        (missing, "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "nul\0", "embedded null byte"),
    ):
        with pytest.raises(TableError, match=reason):
            load(str(path))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"version: 1\ntext: \xe9\n")
    with pytest.raises(TableError, match=r"latin\.yaml:2: not UTF-8 text: byte 17"):
        load(str(latin))
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(TableError, match="larger than"):
        load(str(large))


def faults_of(data):
    """Lines of the TableError; anything else that is raised goes on to the test."""
    try:
        parse(TableSource("thresholds.yaml", data))
    except TableError as error:
        return str(error).splitlines()
    return []


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["loss", "PAUSE", "HIGH", "kasmina.seed.alpha", "above", "1e3"])
)
FIELDS = st.sampled_from(
    [
        *("version", "rules", "baseline", "window", "warmup", "clean_steps", "junk"),
        *("id", "metric", "all", "any", "for", "cooldown", "downgrade", "severity"),
        *(
            "action",
            "parameters",
            "lr_scale",
            "max_norm",
            "skip_step",
            "conservative",
            "text",
            "baseline_of",
        ),
        *("of", "scope", "mode", "inhibits", "baseline", "release"),
        *(operator.value for operator in Operator),
    ]
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=6),
    max_leaves=25,
)


@given(
    JUNK.map(yaml.safe_dump)
    | st.fixed_dictionaries({"version": SCALARS, "rules": st.lists(JUNK, max_size=3)}).map(
        yaml.safe_dump
    )
    | st.text(max_size=60)
    | st.text(alphabet="-:[]{}&*!|>'\"%@`#, \n\tab1", max_size=40)
)
def test_no_text_gives_anything_but_a_table_or_a_table_error(text):
    for line in faults_of(text.encode("utf-8", "replace")):
        assert line.startswith("thresholds.yaml")


@given(st.binary(max_size=60))
def test_no_bytes_give_anything_but_a_table_or_a_table_error(data):
    assert isinstance(faults_of(data), list)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_is_read_as_it_is(number):
    (rule,) = parsed(table(f"id: a, metric: loss, above: {json.dumps(number)}, {REST}")).rules
    assert rule.when.number == number
