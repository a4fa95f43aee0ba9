"""Rules that can never fire, be heard or end, as ``tamiyo check`` tells them."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.decisions import Action, Severity
from esper_otel.leyline.metrics import STEP_KEYS
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.history import BaselineKey, History, Watched
from esper_tamiyo.judging.rules import test_of as as_test
from esper_tamiyo.language.derived import KNOWN
from esper_tamiyo.language.lint import Doubt, doubts, limits
from esper_tamiyo.language.operators import ON_BASELINES, Operator
from esper_tamiyo.language.operators import BaselineKind as Kind
from esper_tamiyo.language.table import Combine, Condition, Group, Rule, Table
from esper_tamiyo.language.table_file import TableSource, load, parse
from sidecar.frames_made import frame

REST = "severity: HIGH, action: PAUSE"
COSINE = "kasmina.seed.isolation.cosine"


def table(*rules):
    lines = "\n".join(f"  - {{{rule}, {REST}}}" for rule in rules)
    return parse(TableSource("t", f"version: one\nrules:\n{lines}\n".encode()))


def said(*rules):
    return [f"{doubt.rule}: {doubt.message}" for doubt in doubts(table(*rules))]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "metric: accuracy, above: 1",
            "can never fire: accuracy lies from 0 to 1, and is never above 1",
        ),
        (
            "metric: accuracy, above: 1.5",
            "can never fire: accuracy lies from 0 to 1, and is never above 1.5",
        ),
        ("metric: accuracy, at_least: 1", ""),
        ("metric: accuracy, below: 0", "can never fire: accuracy lies from 0 to 1, and is"),
        (
            "metric: step_latency_ms, below: 0",
            "can never fire: step_latency_ms lies at or above 0",
        ),
        (
            "metric: gpu_util_percent, above: 100",
            "can never fire: gpu_util_percent lies from 0",
        ),
        (f"metric: {COSINE}, below: -1", f"can never fire: {COSINE} lies from -1 to 1"),
        ("metric: loss, below: -1e9", ""),
        (
            "metric: accuracy, rises_by: 1.5",
            "can never fire: accuracy lies from 0 to 1, and cannot",
        ),
        ("metric: step, unchanged_for: 5", "can never fire: no step comes twice"),
        (
            "all: [{metric: loss, above: 5}, {metric: loss, below: 3}]",
            "can never fire: loss cannot be above 5 and below 3 at once",
        ),
        ("any: [{metric: loss, above: 5}, {metric: loss, below: 3}]", ""),
        ("all: [{metric: loss, at_least: 5}, {metric: loss, at_most: 5}]", ""),
        (
            "all: [{metric: nonfinite, above: 2}, {metric: nonfinite, below: 3}]",
            "can never fire: nonfinite cannot be above 2 and below 3 at once",  # whole numbers
        ),
        (
            "all: [{metric: loss, missing_for: 3}, {metric: loss, above: 3}]",
            "can never fire: loss cannot be missing for 3 and above 3 at once",
        ),
        (
            "all: [{metric: loss, unchanged_for: 3}, {metric: loss, rises_by: 3}]",
            "can never fire: loss cannot be unchanged for 3 and rises by 3 at once",
        ),
        (
            "any: [{metric: loss, above: 5}, {metric: accuracy, above: 2}]",
            "has a part that can never hold: accuracy lies from 0 to 1, and is never above 2",
        ),
        (
            "all: [{metric: loss, above: 5}, {any: [{metric: loss, below: 3}, "
            "{metric: loss, below: 9}]}]",
            "has a part that can never hold: loss cannot be above 5 and below 3 at once",
        ),
        (
            "all: [{metric: loss, above_baseline: 2}, {metric: loss, below_baseline: 1.5}]",
            "can never fire: loss cannot be above 2 × its baseline and below 1.5 × its "
            "baseline at once",
        ),
        ("all: [{metric: loss, above_baseline: 2}, {metric: loss, below_baseline: 2.5}]", ""),
        (
            "all: [{metric: loss, above_baseline: 2}, "
            "{metric: loss, below_baseline: 1.5, baseline: frozen}]",
            "",
        ),
        (
            "all: [{metric: loss, above_baseline: 2}, "
            "{metric: loss, below_baseline: 1.5, baseline_of: loss_ewma}]",
            "",
        ),
        (
            "all: [{metric: loss, above_peers: 2}, {metric: loss, below_peers: 2}]",
            "can never fire: loss cannot be above 2 × that of its peers and below 2 × that of "
            "its peers at once",
        ),
        ("all: [{metric: loss, above_peers: 2}, {metric: loss, below_baseline: 1.5}]", ""),
        (
            "metric: step, below: 100, for: 200",
            "can never fire: it holds at 100 steps at most, and for asks for 200",
        ),
        ("metric: step, below: 100, for: 100", ""),
        ("metric: step, above: 100, for: 200", ""),
        (
            "all: [{metric: step, above: 10}, {metric: step, at_most: 12}, {metric: loss, "
            "above: 1}], for: 2, of: 9",
            "",
        ),
        (
            "all: [{metric: step, above: 10}, {metric: step, at_most: 12}, {metric: loss, "
            "above: 1}], for: 3, of: 9",
            "can never fire: it holds at 2 steps at most, and for asks for 3",
        ),
        ("any: [{metric: step, below: 3}, {metric: step, below: 2}], for: 5", ""),
        (
            "any: [{metric: step, below: 3}, {metric: loss, above: 1}], for: 200",
            "",
        ),
        (
            "all: [{metric: step, nonfinite: true}, {metric: loss, above: 1}]",
            "can never fire: every step has its number",
        ),
        (
            "all: [{metric: loss, nonfinite: true}, {metric: loss, above: 1}]",
            "can never fire: loss cannot be not finite and above 1 at once",
        ),
        ("all: [{metric: loss, missing_for: 3}, {metric: loss, nonfinite: true}]", ""),
        (
            # Peers are compared at a step that has both values.
            "all: [{metric: loss, nonfinite: true}, {metric: loss, above_peers: 3}]",
            "can never fire: loss cannot be not finite and above 3 × that of its peers at once",
        ),
        ("all: [{nonfinite: true}, {metric: nonfinite, above: 2}]", ""),
        (
            "all: [{nonfinite: true}, {metric: nonfinite, below: 1}]",
            "can never fire: nonfinite cannot be above 0 and below 1 at once",
        ),
        (
            "metric: step_latency_ms, above: 5, release: -1",
            "can never end: step_latency_ms lies at or above 0, so it is always above -1",
        ),
        ("metric: step_latency_ms, above: 5, release: 0", ""),
        ("metric: loss, above: 5, release: -1", ""),
    ],
)
def test_a_rule_by_itself(rule, message):
    found = said(f"id: a, {rule}")
    assert len(found) == bool(message)
    if message:
        assert found[0].startswith(f"a: {message}")


HEARD = "is always inhibited: each time it fires, all fires too and inhibits it"


@pytest.mark.parametrize(
    ("inhibitor", "inhibited", "never"),
    [
        ("metric: loss, above: 1", "metric: loss, above: 2", True),
        ("metric: loss, above: 2", "metric: loss, above: 1", False),
        ("metric: loss, above: 1", "metric: loss, above_baseline: 2", False),
        ("metric: loss, above_baseline: 2", "metric: loss, above_baseline: 3", True),
        ("metric: loss, above: 1", "all: [{metric: loss, above: 2}, {nonfinite: true}]", True),
        ("metric: loss, above: 1", "any: [{metric: loss, above: 2}, {nonfinite: true}]", False),
        ("metric: loss, above: 1, for: 2", "metric: loss, above: 2", False),
        ("metric: loss, above: 1, mode: observe", "metric: loss, above: 2", False),
        ("metric: loss, above: 1", "metric: loss, above: 2, release: 0.5", False),
        ("metric: loss, unchanged_for: 3", "metric: loss, unchanged_for: 5", True),
    ],
)
def test_a_rule_that_another_always_inhibits(inhibitor, inhibited, never):
    found = said(f"id: all, inhibits: [b], {inhibitor}", f"id: b, {inhibited}")
    assert found == ([f"b: {HEARD}"] if never else [])


def test_a_rule_that_inhibits_the_one_on_silence():
    quiet = "id: quiet, metric: step, missing_for: 5, severity: HIGH, action: CONTINUE"
    loud = f"id: a, metric: loss, above: 1, inhibits: [quiet], {REST}"
    text = f"version: one\nrules:\n  - {{{loud}}}\n  - {{{quiet}}}\n"
    found = doubts(parse(TableSource("t", text.encode())))
    assert found == [
        Doubt(
            "a",
            "inhibits quiet without effect: that rule fires while no data arrives, beside any "
            "other",
        )
    ]


@pytest.mark.parametrize("name", ["default", "prototype"])
def test_shipped_tables_have_none(name):
    assert doubts(load(name)) == []


METRICS = ["loss", "accuracy", "nonfinite", "gpu_util_percent"]
BOUNDS = st.builds(
    Condition,
    st.sampled_from(METRICS),
    st.sampled_from([Operator.ABOVE, Operator.AT_LEAST, Operator.BELOW, Operator.AT_MOST]),
    st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 100.0, 101.0]),
)
REFERENCES = [
    BaselineKey(metric, kind) for metric in METRICS for kind in (Kind.ROLLING, Kind.FROZEN)
]
FACTORS = st.builds(
    lambda metric, operator, number, of: Condition(
        metric, operator, number, of.metric, of.kind
    ),
    st.sampled_from(METRICS[:2]),
    st.sampled_from(ON_BASELINES),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from(REFERENCES[:3]),
)
GROUPS = st.builds(
    Group,
    st.sampled_from(Combine),
    st.lists(BOUNDS | FACTORS, min_size=1, max_size=4).map(tuple),
)


@given(GROUPS, st.data())
def test_what_can_never_fire_never_does(when, data):
    rule = Rule(id="a", when=when, action=Action.PAUSE, severity=Severity.HIGH, text="")
    found = doubts(Table("t", (rule,)))
    if not any("can never fire" in doubt.message for doubt in found):
        return
    values = {}
    for key in METRICS:
        low, high = limits(KNOWN[key])
        number = st.integers(0, 100) if key == "nonfinite" else st.floats(low, high)
        values[key] = float(data.draw(number.filter(lambda value: abs(value) < 1e300)))
    history = History(Watched(tuple(REFERENCES), warmup=1))
    for reference in history.baselines.values():
        reference.value = data.draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 50.0]))
    assert as_test(when)(values, history) is not True


def test_every_step_metric_has_limits_that_its_zero_is_within():
    for key in STEP_KEYS:
        low, high = limits(KNOWN[key])
        assert low <= 0.0 <= high


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("metric: loss, above: 1, parameters: {skip_step: true}", ""),
        ("nonfinite: true, parameters: {skip_step: true}", ""),
        ("metric: loss, above_peers: 2", ""),
        (
            "metric: loss, above_peers: 2, parameters: {skip_step: true}",
            "asks for skip_step without effect: no update is checked by a rule that is about "
            "other ranks",
        ),
        (
            "metric: kasmina.seed.alpha, above: 0.5, parameters: {max_norm: 1}",
            "asks for max_norm without effect: no update is checked by a rule that is about "
            "seeds",
        ),
        (
            "metric: loss, above: 1, downgrade: true, parameters: {max_norm: 1}",
            "asks for max_norm without effect: no update is checked by a rule that counts "
            "only beside a proposal",
        ),
        (
            "metric: step_latency_ms, above: 1, parameters: {skip_step: true}",
            "asks for skip_step without effect: no update is checked by a rule that has no "
            "condition on loss, gradient_norm, optimizer_lr, optimizer_momentum or nonfinite",
        ),
    ],
)
def test_what_is_asked_of_an_update_in_vain(rule, message):
    assert said(f"id: a, {rule}") == ([f"a: {message}"] if message else [])


def test_a_rule_that_changes_no_update_is_pointed_out(tmp_path):
    table = tmp_path / "mine.yaml"
    table.write_text(
        "version: 1\nrules:\n"
        "  - {id: idle, metric: loss, above: 1, severity: HIGH, action: OPTIMIZER}\n"
        "  - {id: waits, metric: loss, above: 1, severity: HIGH, action: OPTIMIZER, "
        "downgrade: true}\n"
        "  - {id: skips, nonfinite: true, severity: HIGH, action: OPTIMIZER, "
        "parameters: {skip_step: true}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "esper_tamiyo.cli", "check", str(table)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    idle, waits, skips = done.stdout.splitlines()[-3:]
    assert idle.endswith("loss above 1, no parameters: changes no update")
    assert waits.endswith("loss above 1, on proposals only")
    assert skips.endswith("a value is not finite, skip_step")


def test_check_names_file_and_line_and_fails(tmp_path):
    bad = tmp_path / "mine.yaml"
    bad.write_text(
        "version: 1\nrules:\n"
        f"  - {{id: fine, metric: loss, above: 1, {REST}}}\n"
        f"  - {{id: dead, metric: accuracy, above: 2, {REST}}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "esper_tamiyo.cli", "check", str(bad)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"{bad}:4: dead: can never fire: accuracy lies from 0 to 1, and is never above 2\n"
    )
    assert Engine(parse(TableSource("mine", bad.read_bytes()))).observe(frame(0, loss=2.0))
