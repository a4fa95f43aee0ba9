"""What a table may say, and what is said about a bad one."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.decisions import RANK_OF, Action, Severity
from esper_tamiyo.language.operators import BaselineKind, Operator
from esper_tamiyo.language.table import Combine, Condition, RuleMode, RuleScope
from esper_tamiyo.language.table_file import TableError, TableSource, load, parse
from esper_tamiyo.language.yaml_nodes import MAX_BYTES

RULE_IDS = {
    "hook_budget",
    "step_latency_high",
    "kasmina_apply_slow",
    "kasmina_finalize_slow",
    "isolation_violations",
    "loss_spike",
    "loss_warning",
    "loss_volatility_high",
    "grad_variance_high",
    "grad_conflict_high",
    "optimizer_hint",
    "optimizer_stale",
    "device_pressure_high",
    "cpu_pressure_high",
    "nonfinite_loss",
}


def parsed(text):
    return parse(TableSource("thresholds.yaml", text.encode()))


def errors(text):
    with pytest.raises(TableError) as caught:
        parsed(text)
    return str(caught.value).splitlines()


def table(*rules, top=""):
    """A table with these rules, each a line of YAML flow; rules[0] is on line 4."""
    lines = "\n".join(f"  - {{{rule}}}" for rule in rules)
    return f"version: one\n{top}\nrules:\n{lines}\n"


REST = "severity: HIGH, action: PAUSE"


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


GONE = {"loss_volatility_high", "grad_variance_high", "optimizer_stale"}
"""Rules that the default table does without: what is smoothed remembers one outlier as many."""


@pytest.mark.parametrize("name", ["default", "prototype"])
def test_shipped_tables_are_valid_and_have_every_rule_of_the_prototype(name):
    rules = {rule.id: rule for rule in load(name).rules}
    gone = GONE if name == "default" else set()
    assert rules.keys() >= RULE_IDS - gone
    assert not rules.keys() & gone
    assert all(rule.text for rule in rules.values())


def test_shipped_tables_agree_on_severity_and_action():
    """But that the default table only tells what no action would be an answer to."""
    default = {rule.id: rule for rule in load("default").rules}
    only_told = {"hook_budget", "step_latency_high", "loss_spike", "optimizer_hint"}
    holds_seeds_back = {"loss_spike"}
    for rule in load("prototype").rules:
        if rule.id in GONE:
            continue
        other = default[rule.id]
        if rule.id in only_told:
            assert other.action is Action.CONTINUE, rule.id
            assert other.conservative == (rule.id in holds_seeds_back), rule.id
            assert RANK_OF[other.severity] <= RANK_OF[rule.severity]
        else:
            assert (other.severity, other.action) == (rule.severity, rule.action), rule.id
            assert other.conservative == rule.conservative
        assert other.downgrade == rule.downgrade


def test_no_rule_of_the_default_table_promises_the_optimizer_what_it_does_not_do():
    for rule in load("default").rules:
        assert rule.parameters or rule.downgrade or rule.action is not Action.OPTIMIZER


BAD = [
    # (rule or top-level text, line, what is said)
    (
        f'id: a, metric: loss, above: "fast", {REST}',
        'rules[0].above: expected a number, got "fast"',
    ),
    (
        f"id: a, metric: loss, above: fast, {REST}",
        'rules[0].above: expected a number, got "fast"',
    ),
    (
        f"id: a, metric: loss, above: [1], {REST}",
        "rules[0].above: expected a number, got a list",
    ),
    (
        f"id: a, metric: loss, above: .nan, {REST}",
        "rules[0].above: expected a number, got .nan",
    ),
    (
        f"id: a, metric: loss, above: .inf, {REST}",
        "rules[0].above: expected a number, got .inf",
    ),
    (
        f"id: a, metric: loss, above: true, {REST}",
        "rules[0].above: expected a number, got true",
    ),
    (f"id: a, metric: loss, above: , {REST}", "rules[0].above: expected a number, got nothing"),
    (
        f"id: a, metric: los, above: 1, {REST}",
        'rules[0].metric: unknown metric "los"; did you mean loss?',
    ),
    (
        f"id: a, metric: tolaria.loss, above: 1, {REST}",
        'rules[0].metric: unknown metric "tolaria.loss"',
    ),
    (
        f"id: a, metric: loss, above: 1, for: 6, of: 5, {REST}",
        "rules[0].of: expected at least for, which is 6; got 5",
    ),
    (
        f"id: a, metric: loss, above: 1, of: 2000, {REST}",
        "rules[0].of: expected at most 1024, got 2000",
    ),
    (
        f"id: a, metric: loss, above: 1, scope: rank, {REST}",
        "rules[0].scope: expected step, as no condition is about seeds or other ranks; "
        "got rank",
    ),
    (
        f"id: a, metric: kasmina.seed.alpha, above: 0.5, scope: step, {REST}",
        "rules[0].scope: expected seed, as kasmina.seed.alpha is a seed's; got step",
    ),
    (
        f"id: a, metric: loss, above_peers: 2, scope: seed, {REST}",
        "rules[0].scope: expected rank, as above_peers compares ranks; got seed",
    ),
    (
        f"id: a, metric: loss, above: 1, scope: ranks, {REST}",
        'rules[0].scope: expected one of step, seed, rank; got "ranks"; did you mean rank?',
    ),
    (
        f"id: a, metric: kasmina.seed.alpha, above_peers: 2, {REST}",
        "rules[0].metric: above_peers compares ranks, and kasmina.seed.alpha is a seed's",
    ),
    (
        f"id: a, metric: kasmina.seed.alpha, nonfinite: true, {REST}",
        "rules[0].metric: only a step counts the values that were not finite",
    ),
    (
        f"id: a, all: [{{metric: loss, above_peers: 2}}, "
        f"{{metric: kasmina.seed.alpha, above: 0}}], {REST}",
        "rules[0].all: one rule cannot compare ranks and look at seeds",
    ),
    (
        f"id: a, metric: loss, above: 3, release: 4, {REST}",
        "rules[0].release: contradicts above: a rule that fires above 3 cannot go on until a "
        "stricter number; expected at most 3, got 4",
    ),
    (
        f"id: a, metric: loss, below: 3, release: 2, {REST}",
        "rules[0].release: contradicts below: a rule that fires below 3 cannot go on until a "
        "stricter number; expected at least 3, got 2",
    ),
    (
        f"id: a, metric: loss, above_baseline: 3, release: 0, {REST}",
        "rules[0].release: expected more than 0, got 0",
    ),
    (
        f"id: a, metric: loss, rises_by: 3, release: 2, {REST}",
        "rules[0].release: has no meaning beside rises_by",
    ),
    (
        f"id: a, metric: gpu_mem_free_gb, runs_out_within: 9, release: 1.5, {REST}",
        "rules[0].release: expected a whole number, got 1.5",
    ),
    (
        f"id: a, all: [{{metric: loss, above: 1}}], release: 0.5, {REST}",
        "rules[0]: expected one of a metric with its operator, all, any; got all, release",
    ),
    (
        f"id: a, metric: loss, above: 1, baseline: frozen, {REST}",
        "rules[0].baseline: has a meaning only beside above_baseline or below_baseline",
    ),
    (
        f"id: a, metric: loss, above_baseline: 2, baseline: frosen, {REST}",
        "rules[0].baseline: expected one of rolling, frozen, lowest, highest; "
        'got "frosen"; did you mean frozen?',
    ),
    (
        f"id: a, metric: loss, missing_for: 0, {REST}",
        "rules[0].missing_for: expected at least 1, got 0",
    ),
    (
        f"id: a, metric: step, missing_for: 5, {REST}",
        "rules[0].action: expected CONTINUE: a stale rank sends no request; got PAUSE",
    ),
    (
        "id: a, metric: step, missing_for: 5, for: 2, severity: HIGH, action: CONTINUE",
        "rules[0].for: has no meaning beside missing_for of the metric step",
    ),
    (
        f"id: a, mode: watch, metric: loss, above: 1, {REST}",
        'rules[0].mode: expected one of act, observe; got "watch"',
    ),
    (
        f"id: a, inhibits: b, metric: loss, above: 1, {REST}",
        'rules[0].inhibits: expected a list, got "b"',
    ),
    (
        f"id: a, inhibits: [b], metric: loss, above: 1, {REST}",
        "rules[0].inhibits[0]: no rule has this id",
    ),
    (
        f"id: a, inhibits: [a], metric: loss, above: 1, {REST}",
        "rules[0].inhibits[0]: a rule cannot inhibit itself",
    ),
    (
        f"id: a, metric: loss, above: 1, below: 2, {REST}",
        "rules[0]: expected exactly one of above, above_baseline, above_peers, above_record, "
        "at_least, at_most, below, below_baseline, below_peers, below_record, fallen_for, "
        "missing_for, nonfinite, risen_for, rises_by, runs_out_within, unchanged_for; "
        "got above, below",
    ),
    (f"id: a, metric: loss, {REST}", "rules[0]: expected exactly one of"),
    (
        f"id: a, {REST}",
        "rules[0]: expected one of a metric with its operator, all, any; got none",
    ),
    (
        f"id: a, metric: loss, above: 1, all: [], {REST}",
        "rules[0]: expected one of a metric with its operator, all, any; "
        "got all, above, metric",
    ),
    (f"id: a, above: 1, {REST}", "rules[0].metric: missing"),
    (f"metric: loss, above: 1, {REST}", "rules[0].id: missing"),
    ("id: a, metric: loss, above: 1, action: PAUSE", "rules[0].severity: missing"),
    ("id: a, metric: loss, above: 1, severity: HIGH", "rules[0].action: missing"),
    (
        "id: a, metric: loss, above: 1, severity: HIGH, action: STOP",
        'rules[0].action: expected one of CONTINUE, OPTIMIZER, PAUSE; got "STOP"',
    ),
    (
        "id: a, metric: loss, above: 1, severity: HIGH, action: pause",
        'rules[0].action: expected one of CONTINUE, OPTIMIZER, PAUSE; got "pause"; '
        "did you mean PAUSE?",
    ),
    (
        "id: a, metric: loss, above: 1, severity: HIGH, action: SEED",
        'rules[0].action: expected one of CONTINUE, OPTIMIZER, PAUSE; got "SEED"',
    ),
    (
        "id: a, metric: loss, above: 1, severity: BAD, action: PAUSE",
        'rules[0].severity: expected one of NORMAL, WARNING, HIGH, CRITICAL; got "BAD"',
    ),
    (f"id: A b, metric: loss, above: 1, {REST}", "rules[0].id: expected a to z, 0 to 9 and _"),
    (f"id: nominal, metric: loss, above: 1, {REST}", 'rules[0].id: "nominal" is a reason'),
    (f"id: [a], metric: loss, above: 1, {REST}", "rules[0].id: expected text, got a list"),
    (
        f"id: a, metric: loss, above: 1, for: 0, {REST}",
        "rules[0].for: expected at least 1, got 0",
    ),
    (
        f"id: a, metric: loss, above: 1, for: 1.5, {REST}",
        "rules[0].for: expected a whole number, got 1.5",
    ),
    (
        f"id: a, metric: loss, above: 1, cooldown: -1, {REST}",
        "rules[0].cooldown: expected at least 0, got -1",
    ),
    (
        f"id: a, metric: loss, above: 1, downgrade: maybe, {REST}",
        'rules[0].downgrade: expected true or false, got "maybe"',
    ),
    (
        f"id: a, metric: loss, above: 1, downgrade: true, conservative: true, {REST}",
        "rules[0].conservative: a downgrade rule cannot enter conservative mode",
    ),
    (
        f"id: a, metric: loss, above_baseline: 0, {REST}",
        "rules[0].above_baseline: expected more than 0",
    ),
    (f"id: a, metric: loss, rises_by: -1, {REST}", "rules[0].rises_by: expected more than 0"),
    (
        f"id: a, metric: loss, unchanged_for: 1, {REST}",
        "rules[0].unchanged_for: expected at least 2, got 1",
    ),
    (f"id: a, nonfinite: false, {REST}", "rules[0].nonfinite: expected true, got false"),
    (
        f"id: a, metric: loss, above: 1, baseline_of: loss, {REST}",
        "rules[0].baseline_of: has a meaning only beside above_baseline or below_baseline",
    ),
    (
        f"id: a, metric: loss, above_baseline: 2, baseline_of: kasmina.seed.alpha, {REST}",
        "rules[0].baseline_of: kasmina.seed.alpha is a seed's and loss is not",
    ),
    (
        f"id: a, metric: loss, above: 1, parameters: {{lr_scale: 2}}, {REST}",
        "rules[0].parameters.lr_scale: only OPTIMIZER may have it, this is PAUSE",
    ),
    (
        "id: a, metric: loss, above: 1, parameters: {skip_step: true}, severity: HIGH, "
        "action: CONTINUE",
        "rules[0].parameters.skip_step: only OPTIMIZER and PAUSE may have it, this is CONTINUE",
    ),
    (
        "id: a, metric: loss, above: 1, parameters: {restore: true}, severity: HIGH, "
        "action: PAUSE",
        "rules[0].parameters.restore: only OPTIMIZER may have it, this is PAUSE",
    ),
    *(
        (
            f"id: a, metric: loss, above: 1, parameters: {{{name}: {value}}}, severity: HIGH, "
            "action: OPTIMIZER",
            f"rules[0].parameters.{name}: expected {expected}",
        )
        for name, value, expected in (
            ("lr_scale", "11", "more than 0, at most 10, got 11"),
            ("lr_scale", "0", "more than 0, at most 10, got 0"),
            ("lr_scale", "-0.25", "more than 0, at most 10, got -0.25"),
            ("lr_scale", ".nan", "a number, got .nan"),
            ("lr_scale", "nan", 'a number, got "nan"'),
            ("lr_scale", ".inf", "a number, got .inf"),
            ("lr_scale", "true", "a number, got true"),
            ("max_norm", "0", "more than 0, got 0"),
            ("max_norm", ".inf", "a number, got .inf"),
            ("skip_step", "false", "true, got false"),
            ("skip_step", "1", "true, got 1"),
            ("restore", "false", "true, got false"),
        )
    ),
    (
        "id: a, metric: loss, above: 1, parameters: {lr_scal: 1}, severity: HIGH, "
        "action: OPTIMIZER",
        "rules[0].parameters.lr_scal: unknown field; did you mean lr_scale?",
    ),
    (f"id: a, all: [], {REST}", "rules[0].all: expected at least one condition"),
    (f"id: a, all: 3, {REST}", "rules[0].all: expected a list, got 3"),
    (f"id: a, all: [3], {REST}", "rules[0].all[0]: expected a mapping, got 3"),
    (
        f"id: a, all: [{{metric: los, above: 1}}], {REST}",
        'rules[0].all[0].metric: unknown metric "los"',
    ),
    (
        f"id: a, all: [{{any: [{{all: [{{metric: loss, above: 1}}]}}]}}], {REST}",
        "rules[0].all[0].any[0].all: expected conditions: groups nest once",
    ),
    (f"id: a, id: b, metric: loss, above: 1, {REST}", "rules[0].id: given twice"),
    # on one line, however long it is and whatever is in it
    (
        f'id: "a\\n\\e[31mb", metric: loss, above: 1, {REST}',
        'rules[0].id: expected a to z, 0 to 9 and _, a letter first, got "a\\n\\x1b[31mb"',
    ),
    (
        f"id: {'A' * 99}, metric: loss, above: 1, {REST}",
        f'rules[0].id: expected a to z, 0 to 9 and _, a letter first, got "{"A" * 59}…"',
    ),
]


@pytest.mark.parametrize(("rule", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_rule_is_named_with_its_line_and_field(rule, message):
    (line,) = errors(table(rule))
    assert line.startswith(f"thresholds.yaml:4: {message}")


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


def test_top_level_fields_are_checked_too():
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


def test_all_errors_come_at_once_in_order_of_lines():
    found = errors(
        table(
            "id: a, metric: los, above: fast, severity: HIGH, action: PAUSE",
            "id: b, metric: loss, above: 1, severity: HIGH, action: PAUSE",
            "id: b, metric: loss, below: x, severity: high, action: PAUSE",
        )
    )
    assert found == [
        'thresholds.yaml:4: rules[0].above: expected a number, got "fast"',
        'thresholds.yaml:4: rules[0].metric: unknown metric "los"; did you mean loss?; '
        "a custom value is custom.los",
        'thresholds.yaml:6: rules[2].below: expected a number, got "x"',
        'thresholds.yaml:6: rules[2].id: "b" is already the rule of line 5',
        "thresholds.yaml:6: rules[2].severity: expected one of NORMAL, WARNING, HIGH, "
        'CRITICAL; got "high"; did you mean HIGH?',
    ]


def test_what_rules_say_of_each_other_is_checked():
    low = "severity: WARNING, action: PAUSE"
    assert errors(
        table(
            f"id: a, metric: loss, above: 1, inhibits: [b, c, dd], {low}",
            f"id: b, metric: loss, above: 1, {REST}",
            f"id: c, metric: loss, above: 1, inhibits: [a], {low}",
            f"id: d, metric: loss, above: 1, {low}",
        )
    ) == [
        'thresholds.yaml:4: rules[0].inhibits[0]: "b" is HIGH, more severe than this rule',
        'thresholds.yaml:4: rules[0].inhibits[1]: "c" inhibits this rule: neither would ever '
        "be reported",
        "thresholds.yaml:4: rules[0].inhibits[2]: no rule has this id; did you mean d?",
        'thresholds.yaml:6: rules[2].inhibits[0]: "a" inhibits this rule: neither would ever '
        "be reported",
    ]


def test_a_cycle_of_rules_that_inhibit_each_other_is_refused():
    def rule(name, *inhibits):
        return f"id: {name}, metric: loss, above: 1, inhibits: [{', '.join(inhibits)}], {REST}"

    assert errors(
        table(
            rule("outside", "a"),
            rule("a", "b", "end"),
            rule("b", "end", "c"),
            rule("c", "a"),
            rule("end"),
            rule("other", "another"),
            rule("another", "end", "other"),
        )
    ) == [
        'thresholds.yaml:5: rules[1].inhibits[0]: "b" inhibits this rule by way of "c": none '
        "would ever be reported",
        'thresholds.yaml:6: rules[2].inhibits[1]: "c" inhibits this rule by way of "a": none '
        "would ever be reported",
        'thresholds.yaml:7: rules[3].inhibits[0]: "a" inhibits this rule by way of "b": none '
        "would ever be reported",
        'thresholds.yaml:9: rules[5].inhibits[0]: "another" inhibits this rule: neither would '
        "ever be reported",
        'thresholds.yaml:10: rules[6].inhibits[1]: "other" inhibits this rule: neither would '
        "ever be reported",
    ]


OUTDATED = table(
    f"id: a, metric: loss, above: 1, silences: [b], {REST}",
    f"id: b, metric: loss, above: 1, {REST}",
    f"id: c, metric: loss, above: 1, silences: [b], {REST}",
)


def test_what_inhibits_was_called_is_still_read_with_one_warning(caplog):
    assert [rule.inhibits for rule in parsed(OUTDATED).rules] == [("b",), (), ("b",)]
    assert caplog.messages == [
        "thresholds.yaml:4: rules[0].silences: is called inhibits now; silences is still read"
    ]


def test_the_warning_names_the_line_of_the_word(caplog, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(OUTDATED.replace("silences:", "\n    silences:\n    "))
    load(str(path), warn=False)
    assert not caplog.messages
    load(str(path))
    (message,) = caplog.messages
    assert message.startswith(f"{path}:5: rules[0].silences: ")


def test_both_words_at_once_are_refused_and_faults_use_the_one_that_was_given(caplog):
    assert errors(
        table(
            f"id: a, metric: loss, above: 1, silences: [b], inhibits: [b], {REST}",
            f"id: b, metric: loss, above: 1, silences: [nobody], {REST}",
            "id: quiet, metric: step, missing_for: 9, silences: [b], severity: HIGH, "
            "action: CONTINUE",
        )
    ) == [
        "thresholds.yaml:4: rules[0].silences: is the former name of inhibits; expected one "
        "of them",
        "thresholds.yaml:5: rules[1].silences[0]: no rule has this id",
        "thresholds.yaml:6: rules[2].silences: has no meaning beside missing_for of the metric "
        "step",
    ]
    assert not caplog.messages


def test_silence_is_a_rule_of_its_own():
    assert errors(
        table(
            "id: a, all: [{metric: step, missing_for: 5}, {metric: loss, above: 1}], "
            "severity: HIGH, action: CONTINUE"
        )
    ) == [
        "thresholds.yaml:4: rules[0].all[0]: missing_for of the metric step stands alone: no "
        "step record shows it",
    ]


def test_a_misspelt_operator_is_suggested():
    first, second = errors(table(f"id: a, metric: loss, abov: 1, {REST}"))
    assert first.startswith("thresholds.yaml:4: rules[0]: expected exactly one of above, ")
    assert second == ("thresholds.yaml:4: rules[0].abov: unknown field; did you mean above?")


def test_files_that_cannot_be_read(tmp_path):
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
