"""Tests of tables: the shipped ones hold, notice every change, and say well what failed."""

from pathlib import Path

import msgspec
import pytest

from esper_tamiyo.commands.tables import format_failure
from esper_tamiyo.language.derived import KNOWN
from esper_tamiyo.language.operators import FORMS, Operand, Operator
from esper_tamiyo.language.table import Condition, Group
from esper_tamiyo.language.table_file import SHIPPED, shipped_tables
from esper_tamiyo.replaying.table_test_file import TableTestError, load_tests
from sidecar.running import tamiyo

SHIPPED_TESTS = {name: SHIPPED / "tests" / f"{name}.tests.yaml" for name in shipped_tables()}


# The shipped tables.


@pytest.mark.parametrize("name", SHIPPED_TESTS)
def test_the_shipped_tables_pass_their_tests(name):
    path = SHIPPED_TESTS[name]
    table, tests = load_tests(path)
    failures = [
        format_failure(path, failure) for test in tests for failure in test.failures(table)
    ]
    assert not failures, "\n".join(failures)


def test_the_example_of_the_documentation_passes(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "replay.md").read_text()
    path = tmp_path / "mine.tests.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    assert failures(path) == []


MARGIN = 0.1
"""How far a number may be moved before a test must notice."""


def moved(condition, easier):
    """``condition`` with its number a tenth easier, or harder, to satisfy; None if it
    has none, or one that only whole values like those of a flag are held against."""
    operand = FORMS[condition.operator].operand
    is_whole = KNOWN[condition.metric].unit in ("{flag}", "{state}")
    if operand is Operand.FLAG or (is_whole and operand is not Operand.COUNT):
        return None
    step = MARGIN * abs(condition.number) or MARGIN
    if operand is Operand.COUNT:
        step = max(1, step)
    upwards = condition.operator in (
        Operator.BELOW,
        Operator.AT_MOST,
        Operator.BELOW_BASELINE,
        Operator.BELOW_PEERS,
        Operator.RUNS_OUT_WITHIN,
    )
    number = condition.number + (step if easier == upwards else -step)
    if operand is Operand.COUNT:
        number = round(number)
        if number < 1:
            return None
    return msgspec.structs.replace(condition, number=number, release=None)


def variants(when, easier):
    """``when`` with one number moved, for each that can be."""
    if isinstance(when, Condition):
        other = moved(when, easier)
        if other is not None:
            yield str(other), other
        if when.rising and not easier:
            yield f"{when}, or not", msgspec.structs.replace(when, rising=False)
        return
    for place, part in enumerate(when.parts):
        for name, other in variants(part, easier):
            parts = (*when.parts[:place], other, *when.parts[place + 1 :])
            yield name, Group(when.combine, parts)


def changes(rule):
    """Every small change of a rule, by what it is."""
    for easier in (True, False):
        for name, when in variants(rule.when, easier):
            yield name, msgspec.structs.replace(rule, when=when)
    for persistence in (rule.persistence - 1, rule.persistence + 1):
        if persistence and rule.persistence > 1:
            of = max(rule.of, persistence)
            yield (
                f"for {persistence}",
                msgspec.structs.replace(rule, persistence=persistence, of=of),
            )
    if rule.of > rule.persistence:
        yield f"of {rule.of - 1}", msgspec.structs.replace(rule, of=rule.of - 1)
    for severity in set(type(rule.severity)) - {rule.severity}:
        yield f"severity {severity}", msgspec.structs.replace(rule, severity=severity)
    if rule.downgrade:
        yield "no downgrade", msgspec.structs.replace(rule, downgrade=False)
    if rule.conservative:
        yield "not conservative", msgspec.structs.replace(rule, conservative=False)
    if rule.inhibits:
        yield "inhibits nothing", msgspec.structs.replace(rule, inhibits=())
    if rule.parameters:
        yield "no parameters", msgspec.structs.replace(rule, parameters={})


def mutants():
    for name, path in SHIPPED_TESTS.items():
        table, _ = load_tests(path)
        for rule in table.rules:
            yield pytest.param(name, rule.id, id=f"{name}-{rule.id}")


@pytest.fixture(scope="module")
def loaded():
    return {name: load_tests(path) for name, path in SHIPPED_TESTS.items()}


@pytest.mark.parametrize(("name", "rule_id"), list(mutants()))
def test_no_rule_can_change_without_a_test_that_fails(name, rule_id, loaded):
    """That is what "fires, and does not fire just below" comes to."""
    table, every_test = loaded[name]
    tests = [test for test in every_test if test.name.split()[0].rstrip(",") == rule_id]
    place = [rule.id for rule in table.rules].index(rule_id)
    rule = table.rules[place]

    def is_noticed(changed):
        rules = (*table.rules[:place], *changed, *table.rules[place + 1 :])
        other = msgspec.structs.replace(table, rules=rules)
        return any(test.failures(other) for test in tests)

    assert is_noticed(()), "the rule is gone and every test passes"
    unnoticed = [change for change, other in changes(rule) if not is_noticed((other,))]
    assert unnoticed == []


# What a failure says.

TABLE = """\
version: 1
rules:
  - {id: high, metric: loss, above: 4, severity: HIGH, action: PAUSE}
  - id: rate
    metric: gradient_norm
    above: 9
    severity: WARNING
    action: OPTIMIZER
    parameters: {lr_scale: 0.5}
  - {id: fallback, metric: kasmina.seed.fallback_used, above: 0, severity: HIGH, action: PAUSE}
"""


@pytest.fixture
def written(tmp_path):
    """Writes a file of one test, which begins at line 3, beside a table of its own."""
    (tmp_path / "table.yaml").write_text(TABLE)

    def write(text, table="table.yaml"):
        path = tmp_path / "mine.tests.yaml"
        path.write_text(f"table: {table}\ntests:\n{text}")
        return path

    return write


def failures(path):
    table, tests = load_tests(path)
    return [format_failure(path, failure) for test in tests for failure in test.failures(table)]


FAILING = {
    "another reason": (
        """\
  - name: jump
    metrics: {loss: 1 5, gradient_norm: 1 10}
    expect:
      - {step: 2, action: OPTIMIZER, reason: rate, lr_scale: 0.5}
""",
        """\
:6: jump: step 2: expected OPTIMIZER, reason rate, lr_scale 0.5, got PAUSE, reason high, \
lr_scale none
  decided: PAUSE HIGH high
  high fired: loss 5
  rate fired: gradient_norm 10
  values: loss 5, gradient_norm 10, step 2, nonfinite 0""",
    ),
    "nothing": (
        """\
  - name: jump
    metrics: {loss: 1x3}
    expect:
      - {step: 1-3, action: PAUSE}
""",
        """\
:6: jump: step 1: expected PAUSE, got CONTINUE (and at 2 more steps)
  decided: CONTINUE NORMAL nominal
  values: loss 1, step 1, nonfinite 0""",
    ),
    "something": (
        """\
  - name: calm
    metrics: {loss: 1 5x3 1}
""",
        """\
:3: calm: step 2: expected nothing, got PAUSE, reason high (and at 2 more steps)
  decided: PAUSE HIGH high
  high fired: loss 5
  values: loss 5, step 2, nonfinite 0""",
    ),
    "a seed of another rank": (
        """\
  - name: seeds
    ranks:
      3:
        seeds:
          s1: {kasmina.seed.fallback_used: 0 1}
    expect:
      - {step: 2, rank: 3, action: PAUSE, seed: s2}
""",
        """\
:9: seeds: rank 3, step 2: expected seed s2, got seed s1
  decided: PAUSE HIGH fallback
  fallback of seed s1 fired: kasmina.seed.fallback_used 1
  values: step 2, nonfinite 0
  seed s1: kasmina.seed.fallback_used 1""",
    ),
    "other findings": (
        """\
  - name: both
    metrics: {loss: 5, gradient_norm: 10}
    expect:
      - {step: 1, action: PAUSE, findings: [high]}
""",
        """\
:6: both: step 1: expected findings high, got findings high rate
  decided: PAUSE HIGH high
  high fired: loss 5
  rate fired: gradient_norm 10
  values: loss 5, gradient_norm 10, step 1, nonfinite 0""",
    ),
    "a silence that nobody minds": (
        """\
  - name: quiet
    metrics: {loss: 1x9}
    lost: 3-9
    expect:
      - {step: 2, silence: true, action: CONTINUE}
""",
        ":7: quiet: step 2: expected silence behind it: CONTINUE, got nothing",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_failure_says_where_what_and_what_was_seen(case, written):
    text, expected = FAILING[case]
    path = written(text)
    assert failures(path) == [f"{path}{expected}"]


PASSING = {
    "only what is said counts": """\
  - name: loose
    metrics: {loss: 1 5 5}
    expect:
      - {step: 2, action: PAUSE}
    nothing_else: false
""",
    "a list of steps": """\
  - name: list
    metrics: {loss: 5 1 5 5}
    expect:
      - {step: [1, 3-4], action: PAUSE, severity: HIGH, reason: high}
""",
    "not finite is measured, and not a value": """\
  - name: nan
    metrics: {loss: nan inf _, nonfinite: _ _ 1}
""",
    "steps that are lost are not judged": """\
  - name: lost
    metrics: {loss: 1 5 5 1}
    lost: [2, 3]
""",
    "a proposal is granted": """\
  - name: seed
    metrics: {loss: 1x3}
    proposals:
      - {step: 2-3, seed: s9, operation: cull}
    expect:
      - {step: 2-3, action: SEED, seed: s9, operation: cull, conservative: false}
""",
    "every rank has proposals of its own": """\
  - name: ranks
    metrics: {loss: 1}
    ranks:
      1:
        metrics: {loss: 1}
        proposals:
          - {step: 1, seed: s1, operation: train}
    expect:
      - {step: 1, rank: 1, action: SEED}
""",
}


@pytest.mark.parametrize("case", PASSING)
def test_what_a_test_can_say(case, written):
    assert failures(written(PASSING[case])) == []


# What is wrong with a file of tests.

FAULTY = {
    "no such metric": (
        "  - {name: x, metrics: {los: 1}}\n",
        ":3: tests[0].metrics.los: unknown field; did you mean loss?",
    ),
    "a seed's metric of the step": (
        "  - {name: x, metrics: {kasmina.seed.stage: 1}}\n",
        ":3: tests[0].metrics.kasmina.seed.stage: unknown field; "
        "did you mean kasmina.seeds_live?",
    ),
    "the step itself": (
        "  - {name: x, metrics: {step: 1}}\n",
        ":3: tests[0].metrics.step: unknown field",
    ),
    "no series": (
        "  - {name: x, metrics: {loss: fast}}\n",
        ":3: tests[0].metrics.loss: expected values like 4, 4x20, 1+0.5x10, _ or nan; "
        "got 'fast'",
    ),
    "a list for a series": (
        "  - {name: x, metrics: {loss: [1, 2]}}\n",
        ":3: tests[0].metrics.loss: expected text, got a list",
    ),
    "no values at all": (
        "  - name: x\n",
        ":3: tests[0]: expected metrics or seeds with at least one value",
    ),
    "no name": ("  - {metrics: {loss: 1}}\n", ":3: tests[0].name: missing"),
    "no such rule": (
        "  - name: x\n    metrics: {loss: 1}\n    expect:\n"
        "      - {step: 1, action: PAUSE, reason: hihg}\n",
        ':6: tests[0].expect[0].reason: the table has no rule "hihg"; did you mean high?',
    ),
    "no such finding": (
        "  - name: x\n    metrics: {loss: 1}\n    expect:\n"
        "      - {step: 1, action: PAUSE, findings: [high, low]}\n",
        ':6: tests[0].expect[0].findings[1]: the table has no rule "low"',
    ),
    "no such action": (
        "  - name: x\n    metrics: {loss: 1}\n    expect:\n      - {step: 1, action: pause}\n",
        ":6: tests[0].expect[0].action: expected one of CONTINUE, SEED, OPTIMIZER, PAUSE; "
        'got "pause"; did you mean PAUSE?',
    ),
    "no such step": (
        "  - name: x\n    metrics: {loss: 1x3}\n    expect:\n"
        "      - {step: 4, action: PAUSE}\n",
        ":6: tests[0].expect[0].step: step 4 does not come: the last is 3",
    ),
    "a lost step": (
        "  - name: x\n    metrics: {loss: 1x3}\n    lost: 2\n    expect:\n"
        "      - {step: 2, action: PAUSE}\n",
        ":7: tests[0].expect[0].step: step 2 is lost",
    ),
    "step 0": (
        "  - name: x\n    metrics: {loss: 1}\n    lost: 0\n",
        ":5: tests[0].lost: expected a step from 1 to 100,000, or steps like 3-7; got 0",
    ),
    "a range that runs backwards": (
        "  - name: x\n    metrics: {loss: 1}\n    lost: 7-3\n",
        ':5: tests[0].lost: expected a step from 1 to 100,000, or steps like 3-7; got "7-3"',
    ),
    "the same step twice": (
        "  - name: x\n    metrics: {loss: 1x3}\n    expect:\n"
        "      - {step: 1-2, action: PAUSE}\n      - {step: 2, action: PAUSE}\n",
        ":7: tests[0].expect[1].step: step 2: line 6 has expected something of it already",
    ),
    "no such rank": (
        "  - name: x\n    metrics: {loss: 1}\n    expect:\n"
        "      - {step: 1, rank: 1, action: PAUSE}\n",
        ":6: tests[0].expect[0].rank: the test has no rank 1",
    ),
    "a rank twice": (
        "  - name: x\n    metrics: {loss: 1}\n    ranks:\n      0: {metrics: {loss: 1}}\n",
        ":6: tests[0].ranks.0: this rank is given twice",
    ),
    "no number for a rank": (
        "  - name: x\n    ranks:\n      one: {metrics: {loss: 1}}\n",
        ':5: tests[0].ranks: expected a whole number, got "one"',
    ),
    "two proposals at once": (
        "  - name: x\n    metrics: {loss: 1}\n    proposals:\n"
        "      - {step: 1, seed: a, operation: train}\n"
        "      - {step: 1, seed: b, operation: train}\n",
        ":7: tests[0].proposals[1]: step 1 has a proposal already",
    ),
    "no such operation": (
        "  - name: x\n    metrics: {loss: 1}\n    proposals:\n"
        "      - {step: 1, seed: a, operation: trian}\n",
        ":6: tests[0].proposals[0].operation: expected one of germinate, train, blend, "
        'shadow, probate, fossilize, cull; got "trian"; did you mean train?',
    ),
    "steps that take no time": (
        "  - {name: x, metrics: {loss: 1}, step_ms: 0}\n",
        ":3: tests[0].step_ms: expected more than 0, got 0",
    ),
    "no flag": (
        "  - {name: x, metrics: {loss: 1}, nothing_else: maybe}\n",
        ':3: tests[0].nothing_else: expected true or false, got "maybe"',
    ),
    "seeds without names": (
        "  - {name: x, seeds: [1]}\n",
        ":3: tests[0].seeds: expected a mapping, got a list",
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_what_is_wrong_with_a_file_is_said_with_line_and_field(case, written):
    text, expected = FAULTY[case]
    path = written(text)
    with pytest.raises(TableTestError) as caught:
        load_tests(path)
    assert str(caught.value) == f"{path}{expected}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ":1: the file of tests is empty"),
        (b"- a\n", ":1: expected a mapping, got a list"),
        (b"tests: []\n", ":1: table: missing"),
        (b"table: default\n", ":1: tests: missing"),
        (b"table: default\ntests: []\n", ":2: tests: expected at least one test"),
        (b"table: default\ntests: {}\n", ":2: tests: expected a list, got a mapping"),
        (b"table: [\n", ":2: not valid YAML: "),
        (b"\xff\n", ":1: not UTF-8 text: byte 0"),
        (b"#" * ((1 << 20) + 1), ": larger than 1048576 bytes"),
    ],
)
def test_what_is_no_file_of_tests(content, expected, tmp_path):
    path = tmp_path / "tests.yaml"
    path.write_bytes(content)
    with pytest.raises(TableTestError) as caught:
        load_tests(path)
    assert f"{path}{expected}" in str(caught.value)


# The command.


def test_the_command_runs_the_shipped_tests():
    done = tamiyo("test", *SHIPPED_TESTS.values())
    assert (done.returncode, done.stderr) == (0, "")
    for line, path in zip(done.stdout.splitlines(), SHIPPED_TESTS.values(), strict=True):
        assert line.startswith(f"{path}: ")
        assert " tests passed, table " in line


def test_a_test_that_fails_is_status_1(written):
    path = written(FAILING["nothing"][0] + FAILING["something"][0].replace("calm", "other"))
    done = tamiyo("test", path)
    assert (done.returncode, done.stderr) == (1, "")
    assert FAILING["nothing"][1] in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{path}: 0 of 2 tests passed, table 1+")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("table: nowhere.yaml\ntests: [{name: x}]\n"),
        lambda path: path.with_name("table.yaml").write_text("rules: []\n"),
        lambda path: path.write_text("table: table.yaml\ntests: 1\n"),
    ],
)
def test_a_file_that_cannot_be_run_is_status_2_and_the_others_are_run(break_it, written):
    path = written(PASSING["a list of steps"])
    break_it(path)
    good = Path(SHIPPED_TESTS["prototype"])
    done = tamiyo("test", path, good)
    assert done.returncode == 2
    assert str(path.parent) in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith(f"{good}: ")
