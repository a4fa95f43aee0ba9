"""A table that says only what differs from another one."""

import json
import textwrap
import tomllib
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_otel.leyline.decisions import Action, Severity
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.table import RuleMode, RuleScope
from esper_tamiyo.language.table_file import (
    MAX_LEVELS,
    SCHEMA,
    SHIPPED,
    TableError,
    files_behind,
    load,
    locate,
    read,
    shipped_tables,
)
from esper_tamiyo.replaying.table_test_file import load_tests
from esper_tamiyo.serving.table_watch import FileWatch
from sidecar.running import sidecar, tamiyo, until

BASE = """\
version: base-1
baseline: {window: 32, warmup: 8}
conservative: {clean_steps: 7}
rules:
  - id: high
    metric: loss
    above: 10
    release: 5
    for: 2
    of: 3
    cooldown: 4
    severity: HIGH
    action: PAUSE
    inhibits: [low, other]
    text: High.
  - {id: low, metric: loss, below: 1, severity: WARNING, action: CONTINUE}
  - {id: other, metric: grad_var, above: 1, severity: WARNING, action: CONTINUE}
  - {id: slow, metric: step_latency_ms, above_peers: 2, scope: rank, severity: HIGH,
     action: OPTIMIZER, parameters: {lr_scale: 0.5}}
"""


@pytest.fixture
def write(tmp_path):
    """Writes a file, of a table unless said; its path as text."""

    def written(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    written("base.yaml", BASE)
    return written


def rules(path):
    return {rule.id: rule for rule in load(path).rules}


def errors(path):
    with pytest.raises(TableError) as caught:
        load(path)
    return str(caught.value).splitlines()


def test_a_change_of_one_field_leaves_the_others(write):
    base = load("default")
    mine = write("mine.yaml", "extends: default\nrules:\n- {id: loss_spike, cooldown: 100}\n")
    table = load(mine)
    changed = {rule.id: rule for rule in table.rules}["loss_spike"]
    before = {rule.id: rule for rule in base.rules}["loss_spike"]
    assert before.cooldown != changed.cooldown == 100
    assert [rule.id for rule in table.rules] == [rule.id for rule in base.rules]
    differ = [
        (old, new) for old, new in zip(base.rules, table.rules, strict=True) if old != new
    ]
    assert differ == [(before, changed)]
    for field in changed.__struct_fields__:
        if field != "cooldown":
            assert getattr(changed, field) == getattr(before, field)
    assert (table.baseline, table.clean_steps) == (base.baseline, base.clean_steps)


def test_every_field_can_differ(write):
    mine = write(
        "mine.yaml",
        """\
        extends: base.yaml
        version: mine-2
        baseline: {window: 64}
        rules:
          - {id: high, mode: observe, severity: CRITICAL, inhibits: [low], for: 3, text: Mine.}
          - {id: new, metric: loss, above: 99, severity: HIGH, action: PAUSE}
          - {id: slow, parameters: {max_norm: 1}}
        """,
    )
    table = load(mine)
    assert table.version.startswith("mine-2+")
    assert (table.baseline.window, table.baseline.warmup, table.clean_steps) == (64, 8, 7)
    assert [rule.id for rule in table.rules] == ["high", "low", "other", "slow", "new"]
    high, _, _, slow, new = table.rules
    assert (high.mode, high.severity) == (RuleMode.OBSERVE, Severity.CRITICAL)
    assert (high.persistence, high.of, high.cooldown) == (3, 3, 4)
    assert (high.inhibits, high.text, high.when.number) == (("low",), "Mine.", 10.0)
    assert slow.parameters == {"max_norm": 1.0}, "a field is replaced, not what is in it"
    assert (new.action, new.when.number) == (Action.PAUSE, 99.0)


def test_a_condition_is_replaced_wholly(write):
    mine = write(
        "mine.yaml",
        """\
        extends: base.yaml
        rules:
          - {id: high, metric: loss, above_baseline: 3}
          - {id: low, any: [{metric: loss, below: 1}, {metric: accuracy, below: 0.1}]}
          - {id: slow, metric: step_latency_ms, above: 9}
        """,
    )
    high, low, slow = (rules(mine)[name] for name in ("high", "low", "slow"))
    assert (high.when.operator, high.when.release) == (Operator.ABOVE_BASELINE, None)
    assert [part.metric for part in low.when.parts] == ["loss", "accuracy"]
    assert slow.scope is RuleScope.STEP, "whose rule it is follows from its condition"
    assert (high.persistence, slow.parameters) == (2, {"lr_scale": 0.5})


def test_what_is_removed_is_inhibited_by_nobody(write):
    mine = write("mine.yaml", "extends: base.yaml\nremove: [low, slow]\n")
    assert [(rule.id, rule.inhibits) for rule in load(mine).rules] == [
        ("high", ("other",)),
        ("other", ()),
    ]


def test_a_table_without_a_version_of_its_own_has_the_base_s(write):
    mine = write("mine.yaml", "extends: base.yaml\nremove: [low]\n")
    name, _, content = load(mine).version.partition("+")
    assert name == "base-1"
    assert len(content) == 8
    assert load(mine).version != load(str(Path(mine).with_name("base.yaml"))).version


def test_the_version_names_the_content_of_both_files(write):
    mine = write("mine.yaml", "extends: base.yaml\nremove: [low]\n")
    before = load(mine).version
    write("base.yaml", BASE.replace("above: 10", "above: 11"))
    after = load(mine).version
    assert before != after
    write("base.yaml", BASE)
    assert load(mine).version == before
    write("mine.yaml", "extends: base.yaml\nremove: [other]\n")
    assert load(mine).version not in (before, after)


def test_tables_extend_each_other_over_several_levels_and_folders(write, tmp_path):
    write(
        "team/team.yaml",
        "extends: ../base.yaml\nrules:\n- {id: high, above: 7, metric: loss}\n",
    )
    mine = write("mine.yaml", "extends: team/team.yaml\nremove: [slow]\n")
    located = locate(read(mine))
    assert [rule.id for rule in located.table.rules] == ["high", "low", "other"]
    assert located.table.rules[0].when.number == 7.0
    assert located.extends == ("team/team.yaml", "../base.yaml")
    assert files_behind(mine) == (
        mine,
        str(tmp_path / "team/team.yaml"),
        str(tmp_path / "team/../base.yaml"),
    )
    assert files_behind("default") == (str(SHIPPED / "default.yaml"),)


# What is wrong is named with its file and line, wherever it is.


def test_faults_of_both_files(write, tmp_path):
    write("base.yaml", BASE.replace("metric: grad_var", "metric: grad_va"))
    mine = write("mine.yaml", "extends: base.yaml\nremove: [low]\n")
    (error,) = errors(mine)
    assert error.startswith(
        f'{tmp_path}/base.yaml:17: rules[2].metric: unknown metric "grad_va"'
    )


def test_a_fault_in_what_differs_is_the_table_s(write):
    mine = write(
        "mine.yaml",
        """\
        extends: base.yaml
        remove: [hihg, low]
        vrsion: two
        rules:
          - {id: high, cooldown: -1, sverity: HIGH}
          - {id: low, cooldown: 1}
          - {id: othr, cooldown: 1}
          - {metric: loss, above: 1, severity: HIGH, action: PAUSE}
          - {id: slow, cooldown: 1, cooldown: 2}
          - {id: slow, cooldown: 3}
        """,
    )
    told = [error.removeprefix(f"{mine}:") for error in errors(mine)]
    assert told[:5] == [
        "2: remove[0]: no rule of base.yaml has this id; did you mean high?",
        "3: vrsion: unknown field; did you mean version?",
        "5: rules[0].cooldown: expected at least 0, got -1",
        "5: rules[0].sverity: unknown field; did you mean severity?",
        '6: rules[1].id: "low" is removed as well',
    ]
    assert told[5] == (
        "7: rules[2].id: no rule of base.yaml has this id; did you mean other?; "
        "a new rule needs a condition"
    )
    assert "8: rules[3].id: missing" in told
    assert "9: rules[4].cooldown: given twice" in told
    assert '10: rules[5].id: "slow" is already the rule of line 9' in told


def test_a_fault_that_both_make_is_where_it_was_written(write, tmp_path):
    mine = write("mine.yaml", "extends: base.yaml\nrules:\n- {id: high, for: 9}\n")
    assert errors(mine) == [
        f"{tmp_path}/base.yaml:10: rules[0].of: expected at least for, which is 9; got 3"
    ]
    mine = write("mine.yaml", "extends: base.yaml\nrules:\n- {id: low, severity: CRITICAL}\n")
    assert errors(mine) == [
        f'{tmp_path}/base.yaml:14: rules[0].inhibits[0]: "low" is CRITICAL, more severe than '
        "this rule"
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("extends: nowhere.yaml\n", "extends: {tmp}/nowhere.yaml cannot be read: No such file"),
        ("extends: [default]\n", "extends: expected a file, or one of default, prototype"),
        ("extends: ''\n", "extends: expected a file, or one of default, prototype"),
        ("extends: mine.yaml\n", "extends: {tmp}/mine.yaml would extend itself"),
        ("extends: ./mine.yaml\n", "extends: {tmp}/mine.yaml would extend itself"),
        ("extends: base.yaml\nextends: default\n", "extends: given twice"),
        ("extends: base.yaml\nrules: 3\n", "rules: expected a list, got 3"),
        ("extends: base.yaml\nremove: low\n", 'remove: expected a list, got "low"'),
        ("extends: base.yaml\nremove: [high, low, other, slow]\n", "rules: expected at least"),
        ("version: 1\nremove: [low]\n", "remove: has a meaning only beside extends"),
        ('extends: "\\0"\n', "extends: "),
    ],
)
def test_what_cannot_be_extended(write, tmp_path, text, error):
    mine = write("mine.yaml", text)
    found = errors(mine)
    assert any(error.replace("{tmp}", str(tmp_path)) in line for line in found), found
    assert all(line.startswith(f"{mine}:") for line in found)


def test_a_circle_is_refused(write, tmp_path):
    one = write("one.yaml", "version: 1\nextends: two.yaml\n")
    two = write("two.yaml", "extends: one.yaml\n")
    assert errors(one) == [
        f"{two}:1: extends: {tmp_path}/one.yaml would extend itself, by way of two.yaml"
    ]
    assert files_behind(one) == (one, two)


def test_a_line_of_tables_ends_somewhere(write):
    write("0.yaml", BASE)
    for level in range(1, MAX_LEVELS + 2):
        last = write(f"{level}.yaml", f"extends: {level - 1}.yaml\n")
    assert load(str(Path(last).with_name(f"{MAX_LEVELS - 1}.yaml")))
    assert f"expected at most {MAX_LEVELS} tables" in errors(last)[0]


def test_a_base_that_is_no_yaml_is_named(write, tmp_path):
    write("base.yaml", "version: [\n")
    mine = write("mine.yaml", "extends: base.yaml\n")
    assert errors(mine)[0].startswith(f"{tmp_path}/base.yaml:")


# Whoever reads tables reads these as well.


def test_check_tells_what_a_table_extends_and_doubts_with_their_file(write, tmp_path):
    mine = write("mine.yaml", "extends: base.yaml\nremove: [low]\n")
    checked = tamiyo("check", mine)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "extends base.yaml\n" in checked.stdout
    write(
        "base.yaml", BASE.replace("metric: grad_var, above: 1", "metric: grad_var, below: -1")
    )
    doubted = tamiyo("check", mine)
    assert doubted.returncode == 1
    assert doubted.stderr.startswith(f"{tmp_path}/base.yaml:17: other: can never fire")


def test_a_test_of_a_table_reads_the_base_as_well(write):
    write("mine.yaml", "extends: base.yaml\nrules:\n- {id: high, for: 1, of: 1}\n")
    tests = write(
        "mine.tests.yaml",
        """\
        table: mine.yaml
        tests:
          - name: at once
            metrics: {loss: 2 11}
            expect: [{step: 2, action: PAUSE, reason: high}]
        """,
    )
    table, (test,) = load_tests(Path(tests))
    assert test.failures(table) == []


def test_a_changed_base_is_noticed_while_serving(write, tmp_path):
    mine = write("mine.yaml", "extends: base.yaml\nremove: [low]\n")
    watch = FileWatch(mine, load(mine).version)
    assert [watch.look(now=False) for _ in range(3)] == [None] * 3
    write("base.yaml", BASE.replace("above: 10", "above: 12"))
    (news,) = filter(None, [watch.look(now=False) for _ in range(3)])
    assert (news, news.rules[0].when.number) == (load(mine), 12.0)
    (tmp_path / "base.yaml").unlink()
    (news,) = filter(None, [watch.look(now=False) for _ in range(3)])
    assert "base.yaml cannot be read" in news.message
    write("base.yaml", BASE)
    (news,) = filter(None, [watch.look(now=False) for _ in range(3)])
    assert news == load(mine)


def test_a_base_that_is_new_is_watched_from_then_on(write):
    mine = write("mine.yaml", BASE)
    watch = FileWatch(mine, load(mine).version)
    write("mine.yaml", "extends: base.yaml\nremove: [low]\n")
    (news,) = filter(None, [watch.look(now=False) for _ in range(4)])
    assert news == load(mine)
    write("base.yaml", BASE.replace("above: 10", "above: 12"))
    (news,) = filter(None, [watch.look(now=False) for _ in range(4)])
    assert news.rules[0].when.number == 12.0
    write("mine.yaml", "extends: default\n")
    assert watch.look(now=True) == load(mine)


def test_a_sidecar_decides_by_a_changed_base(write, tmp_path):
    mine = write("mine.yaml", "extends: base.yaml\nrules:\n- {id: high, for: 1, of: 1}\n")
    with (
        sidecar(tmp_path / "t.sock", "--table", mine, "--no-journal") as running,
        running.client() as client,
    ):
        assert client.hello().table_version == load(mine).version
        assert client.ask(0, loss=9.0).reason == "nominal"
        write("base.yaml", BASE.replace("above: 10", "above: 8"))
        until(lambda: running.status()["table"]["version"] == load(mine).version)
        assert client.ask(1, loss=9.0).reason == "high"


# tamiyo table


@pytest.mark.parametrize("name", shipped_tables())
def test_a_shipped_table_is_printed_as_it_is(name, tmp_path):
    printed = tamiyo("table", name)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert printed.stdout == (SHIPPED / f"{name}.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(printed.stdout)
    assert load(str(mine)) == load(name)


def test_default_is_meant_and_another_name_is_refused():
    assert tamiyo("table").stdout == (SHIPPED / "default.yaml").read_text()
    refused = tamiyo("table", "defualt")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        "tamiyo: defualt: no such table; expected one of default, prototype\n"
    )


def schema():
    return json.loads(SCHEMA.read_text())


def test_the_schema_is_in_the_package_and_is_printed():
    printed = tamiyo("table", "--schema")
    assert printed.returncode == 0
    made = json.loads(printed.stdout)
    assert made == schema()
    assert made["$id"].startswith("urn:esper-otel:")
    jsonschema.Draft202012Validator.check_schema(made)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (BASE, True),
        ("extends: default\nremove: [loss_spike]\n", True),
        ("extends: default\nrules:\n- {id: loss_spike, cooldown: 100}\n", True),
        ("extends: default\nrules:\n- {id: a, metric: loss, above: 2}\n", True),
        ("extends: default\nrules:\n- {cooldown: 100}\n", False),
        ("extends: default\nrules:\n- {id: a, metric: loss, above: 2, below: 1}\n", False),
        ("version: a\nrules:\n- {id: loss_spike, cooldown: 100}\n", False),
        ("version: a\nremove: [a]\nrules:\n- {id: b, nonfinite: true}\n", False),
        ("rules: []\n", False),
    ],
)
def test_the_schema_tells_what_a_table_may_say(text, valid):
    assert jsonschema.Draft202012Validator(schema()).is_valid(yaml.safe_load(text)) is valid


@pytest.mark.parametrize("name", shipped_tables())
def test_shipped_tables_fit_the_schema(name):
    document = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    jsonschema.Draft202012Validator(schema()).validate(document)


def test_the_wheel_has_the_schema():
    """It lies in a package that the wheel takes whole."""
    project = tomllib.loads((SHIPPED.parents[2] / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["src/esper_otel", "sidecar/esper_tamiyo"]}
    assert files("esper_tamiyo").joinpath("tables", "table.schema.json").is_file()


WORDS = st.sampled_from(
    ["high", "low", "loss", "above", "id", "rules", "remove", "baseline", "window", "extends"]
)
SCALARS = WORDS | st.integers(-3, 99) | st.booleans() | st.none() | st.text(max_size=4)
FIELDS = st.sampled_from(["id", "metric", "above", "for", "all", "inhibits", "scope", "text"])
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(FIELDS | WORDS, inner, max_size=4)
    ),
    max_leaves=12,
)
TOP = st.sampled_from(["version", "remove", "rules", "baseline", "conservative", "other"])


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(top=st.dictionaries(TOP, ANYTHING, max_size=4))
def test_whatever_stands_in_a_table_it_is_read_or_refused(write, top):
    text = yaml.safe_dump({"extends": "base.yaml", **top}, allow_unicode=True)
    mine = write("mine.yaml", text)
    faults = []
    try:
        assert load(mine).rules
    except TableError as error:
        faults = error.faults
    assert all(fault.line for fault in faults)
