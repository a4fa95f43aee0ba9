"""Every field of a table, wrong in the ways people get it wrong: file, line and field.

Fields and operators are taken from the language itself, so that a new one is tried, or
missed here.
"""

import json
from copy import deepcopy

from hypothesis import given, settings
from hypothesis import strategies as st

from esper_tamiyo.language.condition_reader import CONDITION_FIELDS, GROUPS, OPERATORS
from esper_tamiyo.language.operators import (
    FORMS,
    ON_BASELINES,
    ON_PEERS,
    ON_RECORDS,
    BaselineKind,
    Operand,
    Operator,
)
from esper_tamiyo.language.parameters import PARAMETERS
from esper_tamiyo.language.table import Baseline, Conservative, RecordSpan
from esper_tamiyo.language.table_file import TableError, TableSource, parse
from esper_tamiyo.language.table_reader import RULE_FIELDS, TOP_FIELDS

STEPS = ["loss", "step_latency_ms", "optimizer_lr", "gradient_norm"]
SEEDS = ["kasmina.seed.alpha", "kasmina.seed.last_kernel_latency_ms"]
OF_SEEDS = [each for each in Operator if each not in (*ON_PEERS, Operator.NONFINITE)]

NUMBERS = {
    Operand.BOUND: st.integers(-9, 9),
    Operand.FACTOR: st.integers(2, 9),
    Operand.AMOUNT: st.integers(2, 9),
    Operand.COUNT: st.integers(2, 9),
    Operand.FLAG: st.just(True),
}


@st.composite
def conditions(draw, metrics, operators):
    """A condition that is right, with everything that may stand beside its operator."""
    operator = draw(st.sampled_from(operators))
    form = FORMS[operator]
    number = draw(NUMBERS[form.operand])
    made = {"metric": draw(st.sampled_from(metrics)), operator.value: number}
    if form.eases:
        made["release"] = number + form.eases
    if operator in ON_BASELINES:
        made["baseline"] = draw(st.sampled_from(BaselineKind)).value
        made["baseline_of"] = draw(st.sampled_from(metrics))
    if operator in ON_RECORDS:
        made["rising"] = draw(st.booleans())
    if operator is Operator.NONFINITE and draw(st.booleans()):
        del made["metric"]  # of any value of the step
    return made


@st.composite
def groups(draw, parts):
    """A group that is right."""
    return {
        draw(st.sampled_from(sorted(GROUPS))): draw(st.lists(parts, min_size=1, max_size=3))
    }


@st.composite
def waits(draw):
    """What a rule waits for, nested as deep as it may be, and whose rule that makes it."""
    scope = draw(st.sampled_from(["step", "seed"]))
    about = (SEEDS, OF_SEEDS) if scope == "seed" else (STEPS, list(Operator))
    one = conditions(*about)
    when = draw(one | groups(one | groups(one)))
    if any(name in json.dumps(when) for name in ON_PEERS):
        scope = "rank"
    return when, scope


@st.composite
def rules(draw, name):
    """A rule that is right, with every field that it may have."""
    when, scope = draw(waits())
    persistence = draw(st.integers(1, 5))
    adjusts = draw(st.booleans())
    action = "OPTIMIZER" if adjusts else "PAUSE"
    right = {
        "id": name,
        "action": action,
        "severity": draw(st.sampled_from(["HIGH", "CRITICAL"])),
        "text": "Something.",
        "for": persistence,
        "of": persistence + draw(st.integers(0, 3)),
        "cooldown": draw(st.integers(0, 9)),
        "scope": scope,
        "downgrade": adjusts,
        "conservative": not adjusts,
        "mode": draw(st.sampled_from(["act", "observe"])),
        "inhibits": ["last"],
        "parameters": {
            name: True if one.flag else 0.5
            for name, one in PARAMETERS.items()
            if action in one.actions
        },
    }
    return {field: right[field] for field in RULE_FIELDS} | when


@st.composite
def tables(draw):
    """A table that is right, with every field."""
    count = draw(st.integers(1, 3))
    last = {"id": "last", "metric": "loss", "above": 1, "severity": "NORMAL", "action": "PAUSE"}
    baseline = {"window": draw(st.integers(8, 64)), "warmup": draw(st.integers(1, 8))}
    record = {
        "window": draw(st.integers(16, 64)),
        "warmup": draw(st.integers(8, 16)),
        "false_alarm_steps": draw(st.integers(100, 9000)),
    }
    right = {
        "version": "one",
        "baseline": {field: baseline[field] for field in Baseline.__struct_fields__},
        "record": {field: record[field] for field in RecordSpan.__struct_fields__},
        "conservative": dict.fromkeys(Conservative.__struct_fields__, 9),
        "rules": [*(draw(rules(f"rule_{number}")) for number in range(count)), last],
    }
    return {field: right[field] for field in TOP_FIELDS}


few = settings(max_examples=40)
"""For mistakes of which there are few kinds."""


def written(table):
    """The table as text: each field, and each rule, on a line of its own."""
    lines = []
    for name, value in table.items():
        parts = [json.dumps(value)]
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            parts = ["[", *(f"{json.dumps(each)}," for each in value), "]"]
        lines += [f"{json.dumps(name)}: {parts[0]}", *(f"  {part}" for part in parts[1:])]
    return "\n".join(lines) + "\n"


def rewritten(table, parent, name, new_name, *values):
    """The table as text with ``name`` of ``parent`` called ``new_name``, once for each of
    ``values``, and the line that the last of them is on."""
    del parent[name]
    marks = [f"@{place}" for place in range(len(values))]
    parent |= zip(marks, values, strict=True)
    text = written(table)
    line = text[: text.index(json.dumps(marks[-1]))].count("\n") + 1
    for mark in marks:
        text = text.replace(json.dumps(mark), json.dumps(new_name))
    return text, line


def faults(text):
    try:
        parse(TableSource("thresholds.yaml", text.encode()))
    except TableError as error:
        return str(error).splitlines()
    return []


def named(text, line, path):
    """Whether a fault names the file, the line and the field, or what it is part of."""
    start = f"thresholds.yaml:{line}: {path}"
    return any(fault.startswith(start) for fault in faults(text))


@few
@given(tables())
def test_what_is_right_is_read(made):
    assert faults(written(made)) == []


def test_every_field_of_a_condition_is_tried():
    others = {"metric", "release", "baseline", "baseline_of", "rising"}
    assert others == CONDITION_FIELDS - OPERATORS


ANY_NUMBER = [True, "much", "1,5", "3 ms", None, [1], {"is": 1}, ".nan", "-.inf"]
WHOLE = [*ANY_NUMBER, 1.5, -3, 1e12]
COUNT = [*WHOLE, 0]
POSITIVE = [*ANY_NUMBER, 0, -2]
CHOICE = ["", "pauze", "high", "PAUSED", 3, None, ["PAUSE"], True]
FLAG = ["maybe", 1, 0, None, "", [True]]
NAME = ["los", "tolaria.loss", "", None, 7, ["loss"], {"loss": 1}]
TEXT = [[], {}, "", None]
MAPPING = [3, "window", [9], None, {"windows": 9}]
PARTS = [3, "loss", None, [], [3], [[]], {"metric": "loss", "above": 1}]

WRONG_OPERANDS = {
    Operand.BOUND: ANY_NUMBER,
    Operand.FACTOR: POSITIVE,
    Operand.AMOUNT: POSITIVE,
    Operand.COUNT: WHOLE,
    Operand.FLAG: [False, "true", 1, None, [True]],
}
WRONG = {
    **{operator.value: WRONG_OPERANDS[FORMS[operator].operand] for operator in Operator},
    **dict.fromkeys(("for", "of", "cooldown"), WHOLE),
    **dict.fromkeys(("window", "warmup", "clean_steps", "false_alarm_steps"), COUNT),
    **{
        name: WRONG_OPERANDS[Operand.FLAG] if one.flag else POSITIVE
        for name, one in PARAMETERS.items()
    },
    **dict.fromkeys(("severity", "action", "mode", "scope", "baseline"), CHOICE),
    **dict.fromkeys(("downgrade", "conservative", "rising"), FLAG),
    **dict.fromkeys(("metric", "baseline_of"), NAME),
    **dict.fromkeys(("version", "text"), TEXT),
    **dict.fromkeys(GROUPS, PARTS),
    "id": ["Loss", "a b", "1st", "nominal", "", None, ["a"], {"a": 1}],
    "inhibits": ["last", 3, None, {"last": 1}, ["nobody"], [3], [["last"]], ["rule_0", ""]],
    "rules": PARTS,
}
"""What people write into fields that is not what those take."""


def wrong_values(name, parent):
    """What is wrong as ``name`` of ``parent``."""
    if isinstance(parent[name], dict):
        return MAPPING
    if name == "release":
        return WRONG_OPERANDS[FORMS[operator_of(parent)].operand]
    return WRONG[name]


def operator_of(condition):
    (operator,) = OPERATORS & condition.keys()
    return Operator(operator)


def places(fields, path=""):
    """Every field: its parent, its name, and the path that errors call it by."""
    for name, value in fields.items():
        at = f"{path}.{name}" if path else name
        yield fields, name, at
        if isinstance(value, dict):
            yield from places(value, at)
        elif name in ("rules", *GROUPS):
            for place, part in enumerate(value):
                yield from places(part, f"{at}[{place}]")


def place_of(made, data):
    return data.draw(st.sampled_from(list(places(made))))


@settings(max_examples=15, deadline=None)
@given(tables(), st.data())
def test_a_wrong_value_is_named(made, data):
    """Of each field in turn, as chance would pick most of them too seldom."""
    for tried in sorted({name for _, name, _ in places(made)}):
        table = deepcopy(made)
        of_that_name = [place for place in places(table) if place[1] == tried]
        parent, name, path = data.draw(st.sampled_from(of_that_name))
        wrong = data.draw(st.sampled_from(wrong_values(name, parent)))
        assert named(*rewritten(table, parent, name, name, wrong), path)


@few
@given(tables(), st.data())
def test_a_misspelt_field_is_named(made, data):
    parent, name, path = place_of(made, data)
    place = data.draw(st.integers(0, len(name) - 1))
    misspelt = data.draw(
        st.sampled_from(
            [name[:place] + name[place + 1 :], name + "s", name.upper(), f"{name} "]
        )
    )
    text, line = rewritten(made, parent, name, misspelt, parent[name])
    assert named(text, line, path[: -len(name)] + misspelt.strip(" "))


@few
@given(tables(), st.data())
def test_a_missing_field_is_named(made, data):
    first = written(made).splitlines().index('"rules": [') + 2
    needed = [
        (rule, name, first + number, f"rules[{number}].{name}")
        for number, rule in enumerate(made["rules"])
        for name in ("id", "severity", "action")
    ]
    needed += [(made, name, 1, name) for name in ("version", "rules")]
    parent, name, line, path = data.draw(st.sampled_from(needed))
    del parent[name]
    assert named(written(made), line, f"{path}: missing")


@few
@given(tables(), st.data())
def test_a_field_given_twice_is_named(made, data):
    parent, name, path = place_of(made, data)
    text, line = rewritten(made, parent, name, name, parent[name], parent[name])
    assert named(text, line, f"{path}: given twice")


@few
@given(tables(), st.data())
def test_a_second_operator_is_named(made, data):
    holders = [(parent, path) for parent, name, path in places(made) if name == "metric"]
    parent, path = data.draw(st.sampled_from(holders))
    parent[data.draw(st.sampled_from(sorted(OPERATORS - parent.keys())))] = 2
    text, line = rewritten(made, parent, "metric", "metric", parent["metric"])
    assert named(text, line, f"{path.removesuffix('.metric')}: expected exactly one of ")


@few
@given(tables(), st.data())
def test_a_release_on_the_wrong_side_is_named(made, data):
    eased = [(parent, path) for parent, name, path in places(made) if name == "release"]
    if not eased:
        return
    parent, path = data.draw(st.sampled_from(eased))
    operator = operator_of(parent)
    wrong = parent[operator] - FORMS[operator].eases
    text, line = rewritten(made, parent, "release", "release", wrong)
    assert named(text, line, f"{path}: contradicts ")
