"""What a rule held normal, and what would have let it pass: in words and in YAML."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from esper_otel.leyline.decisions import Action
from esper_tamiyo.journaling.entries import Found, table_entry
from esper_tamiyo.journaling.expectations import (
    as_yaml,
    expected,
    if_false_alarm,
    passing,
)
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.table import Condition
from esper_tamiyo.language.table_file import TableSource, load, parse
from sidecar.frames_made import frame

TOP = "version: t\nbaseline: {window: 8, warmup: 4}\nrules:\n"


def table(*rules, action="PAUSE"):
    rest = f"severity: HIGH, action: {action}"
    return parse(
        TableSource("t", (TOP + "".join(f"- {{{rule}, {rest}}}\n" for rule in rules)).encode())
    )


def findings(table, frames):
    """The findings about the last of ``frames``."""
    engine = Engine(table)
    for each in frames:
        decision = engine.observe(each)
    return decision.findings


def told(rule, *losses, source="default", **also):
    """What is told of one rule, about the last step of a run with these losses."""
    one = table(f"id: a, {rule}")
    frames = [frame(step, loss=loss) for step, loss in enumerate(losses)]
    frames[-1] = structs.replace(frames[-1], values={**frames[-1].values, **also})
    (finding,) = findings(one, frames)
    return list(expected(one.rules[0].when, finding.values, table_entry(one, source)))


STEADY = [1.5] * 8


@pytest.mark.parametrize(
    ("rule", "losses", "sentence"),
    [
        (
            "metric: loss, above_baseline: 2",
            [*STEADY, 4.2],
            "loss 4.2, expected at most 3: 2 × its baseline of 1.5 (rolling median of the last "
            "8)",
        ),
        (
            "metric: loss, below_baseline: 0.5",
            [*STEADY, 0.5],
            "loss 0.5, expected at least 0.75: 0.5 × its baseline of 1.5 (rolling median of "
            "the last 8)",
        ),
        (
            "metric: loss, above_baseline: 2, baseline: lowest",
            [*STEADY, 4.2],
            "loss 4.2, expected at most 3: 2 × its baseline of 1.5 (lowest rolling median of "
            "the last 8 so far)",
        ),
        (
            "metric: loss, above_baseline: 2, baseline: frozen",
            [*STEADY, *STEADY, 4.2],
            "loss 4.2, expected at most 3: 2 × its baseline of 1.5 (median of the first 8)",
        ),
        (
            "metric: loss, above_baseline: 2",
            [*[-50.0] * 8, 4.2],
            "loss 4.2, expected at most 0: 1 times its size above its baseline of -50 (rolling "
            "median of the last 8)",
        ),
        ("metric: loss, above: 3", [4.2], "loss 4.2, expected at most 3"),
        ("metric: loss, at_least: 4.2", [4.2], "loss 4.2, expected below 4.2"),
        ("metric: loss, below: 5", [4.2], "loss 4.2, expected at least 5"),
        ("metric: loss, at_most: 5", [4.2], "loss 4.2, expected above 5"),
        (
            "metric: loss, rises_by: 2",
            [1.0, 4.2],
            "loss 4.2, expected below 3: 2 above the 1 of before",
        ),
        (
            "metric: loss, risen_for: 3",
            [*[1.0] * 120, *[3.0] * 3],
            "loss 3, expected at most 1.02 within 3 observations: what it was before",
        ),
        (
            "metric: loss, unchanged_for: 3",
            [1.0, 1.0, 1.0],
            "loss 1, expected to change within 3 observations",
        ),
        (
            "metric: loss, runs_out_within: 20",
            [20.0 - step for step in range(14)],
            "loss 7, expected to last more than 20 observations: at its slope 7 are left",
        ),
        (
            "metric: loss, above: 3, release: 1",
            [4.2, 2.0],
            "loss 2, expected at most 1, the release",
        ),
    ],
)
def test_each_operator_says_what_it_expected(rule, losses, sentence):
    assert told(rule, *losses) == [sentence]


def test_the_baseline_of_another_metric_is_named():
    one = table(
        "id: a, metric: input_wait_ms, above_baseline: 0.5, baseline_of: step_latency_ms"
    )
    frames = [frame(step, step_latency_ms=100.0, input_wait_ms=1.0) for step in range(8)]
    (finding,) = findings(one, [*frames, frame(8, step_latency_ms=100.0, input_wait_ms=60.0)])
    assert list(expected(one.rules[0].when, finding.values, table_entry(one, ""))) == [
        "input_wait_ms 60, expected at most 50: 0.5 × 100, the baseline of step_latency_ms "
        "(rolling median of the last 8)"
    ]


def test_what_is_missing_or_not_finite():
    assert told("nonfinite: true", 1.0, nonfinite=2.0) == [
        "2 values of the step not finite, expected none"
    ]
    one = table("id: a, metric: loss, missing_for: 2")
    (finding,) = findings(one, [frame(0, loss=1.0), frame(1), frame(2)])
    assert list(expected(one.rules[0].when, finding.values, table_entry(one, ""))) == [
        "loss missing for 2 steps, expected to come within 2"
    ]
    silent = table("id: a, metric: step, missing_for: 50", action="CONTINUE")
    seen = {"step": 4.0, "silent(s)": 12.0}
    assert list(expected(silent.rules[0].when, seen, table_entry(silent, ""))) == [
        "nothing came for 12 s, expected a step within 50 of its step times"
    ]


def test_ranks_are_told_with_the_step_that_was_compared():
    when = Condition("step_latency_ms", Operator.ABOVE_PEERS, 1.5)
    seen = {"step_latency_ms": 25.0, "peers(step_latency_ms)": 10.0, "step": 7.0}
    assert list(expected(when, seen, table_entry(load("default"), ""))) == [
        "step_latency_ms 25, expected at most 15: 1.5 × the 10 of the other ranks at step 7"
    ]


def test_only_conditions_that_held_are_told_of_an_any():
    words = told("any: [{metric: loss, above: 100}, {metric: loss, above: 3}]", 4.2)
    assert words == ["loss 4.2, expected at most 3"]


def test_what_else_a_rule_knew_of_the_past_is_told_in_words():
    when = Condition("loss", Operator.ABOVE, 3.0)
    seen = {"loss": 4.2, "level(loss)": 1.5, "scatter(loss)": 0.25}
    seen |= {"excursions(loss)": 2.0, "farthest(loss)": 2.8, "risk(loss)": 1e-4}
    seen |= {"level(grad_var)": 7.0}
    assert list(expected(when, seen, table_entry(load("default"), ""))) == [
        "loss 4.2, expected at most 3; level 1.5; scatter 0.25; excursions so far 2; "
        "farthest of them in scatters 2.8; risk 0.0001"
    ]


# What would have let it pass.

RULES = [
    "metric: loss, above: 3",
    "metric: loss, at_least: 3",
    "metric: loss, below: 3",
    "metric: loss, at_most: 3",
    "metric: loss, above_baseline: 1.5",
    "metric: loss, below_baseline: 0.9",
    "metric: loss, above_baseline: 2, baseline: lowest, baseline_of: grad_var",
    "metric: loss, rises_by: 0.5",
    "all: [{metric: loss, above: 3}, {metric: loss, above_baseline: 1.1}]",
    "any: [{metric: loss, above: 3}, {metric: loss, above_baseline: 1.1}]",
    "any: [{all: [{metric: loss, above: 1}, {metric: grad_var, above: 1}]}, "
    "{metric: loss, below_baseline: 0.9}]",
]
LOSSES = st.floats(0.01, 1e6) | st.floats(-1e6, -0.01)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None)
@given(before=st.lists(LOSSES, min_size=5, max_size=12), last=LOSSES, other=st.floats(0.1, 9.0))
def test_the_number_lets_the_same_step_pass(rule, before, last, other):
    """And the YAML that it is told in says the same table."""
    frames = [frame(step, loss=loss, grad_var=other) for step, loss in enumerate(before)]
    frames.append(frame(len(before), loss=last, grad_var=other))
    one = table(f"id: a, {rule}")
    found = findings(one, frames)
    if not found:
        return
    easier = passing(one.rules[0].when, found[0].values)
    if easier is None:
        return
    again = table(f"id: a, {', '.join(as_yaml(easier))}")
    assert again.rules[0].when == easier
    assert findings(again, frames) == []


@pytest.mark.parametrize(
    ("rule", "losses", "lines"),
    [
        (
            "metric: loss, above_baseline: 2",
            [*STEADY, 4.5],
            ["metric: loss", "above_baseline: 3"],
        ),
        (
            "metric: loss, above_baseline: 2",
            [*STEADY, 4.21],
            ["metric: loss", "above_baseline: 2.9"],
        ),
        ("metric: loss, at_least: 3", [4.2], ["metric: loss", "at_least: 4.3"]),
        ("metric: loss, below: 5", [4.23], ["metric: loss", "below: 4.2"]),
        (
            "all: [{metric: loss, above: 1}, "
            "{metric: loss, above_baseline: 2, baseline: highest}]",
            [*STEADY, 4.5],
            [
                "all: [{metric: loss, above: 1}, "
                "{metric: loss, above_baseline: 3, baseline: highest}]"
            ],
        ),
        ("nonfinite: true", [1.0], None),
        ("metric: loss, unchanged_for: 2", [1.0, 1.0], None),
    ],
)
def test_the_number_is_rounded_up_to_two_digits(rule, losses, lines):
    one = table(f"id: a, {rule}")
    frames = [frame(step, loss=loss) for step, loss in enumerate(losses)]
    frames[-1].values["nonfinite"] = 1.0
    (finding,) = findings(one, frames)
    easier = passing(one.rules[0].when, finding.values)
    assert (None if easier is None else list(as_yaml(easier))) == lines


def test_the_yaml_of_every_shipped_rule_says_its_condition():
    for rule in (*load("default").rules, *load("prototype").rules):
        when = ", ".join(as_yaml(rule.when))
        hold = "" if rule.about_silence else f", for: {rule.persistence}, of: {rule.of}"
        again = table(f"id: a, {when}{hold}", action="CONTINUE")
        assert again.rules[0].when == rule.when


def advice(table, rule_id, values, source, action=Action.PAUSE, run="run 1"):
    entry = table_entry(table, source)
    (rule,) = (each for each in entry.rules if each.id == rule_id)
    finding = Found(rule=rule_id, action=action, severity=rule.severity, text="", values=values)
    return list(if_false_alarm(finding, rule, entry, run))


def test_the_lines_are_a_table_that_can_be_used(tmp_path):
    seen = {"gradient_norm": 129.0, "baseline(gradient_norm)": 1.0}
    words = advice(load("default"), "gradient_spike", seen, "default")
    assert words == [
        "If that was a false alarm, a table with these lines lets it pass:",
        "  extends: default",
        "  rules:",
        "    - id: gradient_spike",
        "      all: [{metric: gradient_norm, above_record: 4}, "
        "{metric: gradient_norm, above_baseline: 130}]",
        "or, for this run alone and while it runs, say:",
        "  tamiyo silence 'run 1' gradient_spike",
    ]
    mine = tmp_path / "mine.yaml"
    mine.write_text("\n".join(line[2:] for line in words[1:-2]) + "\n")
    (rule,) = (each for each in load(str(mine)).rules if each.id == "gradient_spike")
    assert [part.number for part in rule.when.parts] == [4.0, 130.0]
    assert rule.parameters == {"usual_norm": 1.0}


@pytest.mark.parametrize(
    ("rule", "action", "lines"),
    [
        (
            "nonfinite_loss",
            Action.PAUSE,
            ["rules:", "  - id: nonfinite_loss", "    mode: observe"],
        ),
        ("telemetry_quiet", Action.CONTINUE, ["remove: [telemetry_quiet]"]),
    ],
)
def test_where_no_number_helps(rule, action, lines, tmp_path):
    seen = {"nonfinite": 1.0, "step": 4.0, "silent(s)": 12.0}
    words = advice(load("default"), rule, seen, "/etc/tamiyo/mine.yaml", action)
    assert [line[2:] for line in words[1:-2]] == ["extends: mine.yaml", *lines]
    text = "\n".join(["extends: default", *lines])
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"{text}\n")
    assert load(str(mine))
    assert yaml.safe_load(text)["extends"] == "default"


@pytest.mark.parametrize(
    ("version", "base"), [("default-5+1", "default"), ("mine+1", "TABLE.yaml")]
)
def test_a_table_whose_file_is_not_known_is_told_by_its_version(version, base):
    named = structs.replace(load("default"), version=version)
    words = advice(named, "loss_fell", {}, "", Action.CONTINUE)
    assert words[1] == f"  extends: {base}"


def test_every_rule_of_the_default_table_can_be_explained_whatever_it_saw():
    """Nothing raises where values are missing, or there are too many of them."""
    default = load("default")
    entry = table_entry(default, "default")
    for rule in entry.rules:
        for seen in ({}, {"silent(s)": 1.0}, {"loss": 1.0, "baseline(loss)": 0.0}):
            assert isinstance(list(expected(rule.condition, seen, entry)), list)
            passing(rule.condition, seen)
