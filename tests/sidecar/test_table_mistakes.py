"""Every field of a table, wrong in the ways people get it wrong: file, line and field."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from esper_tamiyo.language.table_file import TableError, TableSource, parse

METRICS = st.sampled_from(["loss", "step_latency_ms", "optimizer_lr", "gradient_norm"])
BOUNDS = st.integers(-9, 9)
FACTORS = st.integers(2, 9)
COUNTS = st.integers(2, 9)


@st.composite
def conditions(draw):
    """A condition that is right, with everything that may stand beside its operator."""
    metric = draw(METRICS)
    match draw(st.sampled_from(["above", "below", "baseline", "peers", "count", "rises_by"])):
        case "above":
            number = draw(BOUNDS)
            return {"metric": metric, "above": number, "release": number - 1}
        case "below":
            number = draw(BOUNDS)
            return {"metric": metric, "at_most": number, "release": number + 1}
        case "baseline":
            number = draw(FACTORS)
            kind = draw(st.sampled_from(["rolling", "frozen", "lowest", "highest"]))
            also = {"baseline": kind, "baseline_of": draw(METRICS), "release": number - 1}
            return {"metric": metric, "above_baseline": number, **also}
        case "peers":
            return {"metric": metric, "below_peers": draw(FACTORS)}
        case "rises_by":
            return {"metric": metric, "rises_by": draw(FACTORS)}
        case _:
            operator = draw(st.sampled_from(["unchanged_for", "missing_for"]))
            return {"metric": metric, operator: draw(COUNTS)}


@st.composite
def rules(draw, name):
    """A rule that is right, with every field that it may have."""
    persistence = draw(st.integers(1, 5))
    rule = {
        "id": name,
        "for": persistence,
        "of": persistence + draw(st.integers(0, 3)),
        "cooldown": draw(st.integers(0, 9)),
        "severity": draw(st.sampled_from(["HIGH", "CRITICAL"])),
        "mode": draw(st.sampled_from(["act", "observe"])),
        "text": "Something.",
        "silences": ["last"],
    }
    if draw(st.booleans()):
        rule |= {"action": "OPTIMIZER", "parameters": {"lr_scale": 0.5}, "downgrade": True}
    else:
        rule |= {"action": "PAUSE", "conservative": True}
    if draw(st.booleans()):
        return rule | draw(conditions())
    return rule | {"any": draw(st.lists(conditions(), min_size=1, max_size=3))}


@st.composite
def tables(draw):
    """Rules that are right; each is on a line of its own, from line 2 on."""
    count = draw(st.integers(1, 3))
    last = {"id": "last", "metric": "loss", "above": 1, "severity": "NORMAL", "action": "PAUSE"}
    return [draw(rules(f"rule_{number}")) for number in range(count)] + [last]


few = settings(max_examples=40)
"""For mistakes of which there are few kinds."""


def written(rules):
    return "version: one\nrules: [\n" + ",\n".join(json.dumps(rule) for rule in rules) + "]\n"


def faults(text):
    try:
        parse(TableSource("thresholds.yaml", text.encode()))
    except TableError as error:
        return str(error).splitlines()
    return []


@few
@given(tables())
def test_what_is_right_is_read(made):
    assert faults(written(made)) == []


NUMBERS = frozenset(
    [
        *("above", "at_most", "above_baseline", "below_peers", "release", "lr_scale"),
        *("rises_by", "unchanged_for", "missing_for", "for", "of", "cooldown"),
    ]
)
WHOLE = frozenset(["unchanged_for", "missing_for", "for", "of", "cooldown"])
POSITIVE = frozenset(["above_baseline", "below_peers", "rises_by", "lr_scale"])
CHOICES = frozenset(["severity", "action", "mode", "baseline"])
FLAGS = frozenset(["downgrade", "conservative"])
NAMES = frozenset(["metric", "baseline_of"])


def wrong_values(field):
    """What people write into ``field`` that is not what it takes."""
    if field in NUMBERS:
        wrong = [True, "much", "1,5", "3 ms", None, [1], {"is": 1}, ".nan", "-.inf"]
        wrong += [1.5, -3, 1e12] if field in WHOLE else []
        return wrong + ([0, -2] if field in POSITIVE else [])
    if field in CHOICES:
        return ["", "pauze", "high", "PAUSED", 3, None, ["PAUSE"], True]
    if field in FLAGS:
        return ["maybe", 1, 0, None, "", [True]]
    if field in NAMES:
        return ["los", "tolaria.loss", "", None, 7, ["loss"], {"loss": 1}]
    if field == "id":
        return ["Loss", "a b", "1st", "nominal", "", None, ["a"], {"a": 1}]
    if field == "silences":
        return ["last", 3, None, {"last": 1}, ["nobody"], [3], [["last"]], ["rule_0", ""]]
    if field == "parameters":
        return [3, "lr_scale", [0.5], {"lr": 0.5}]
    if field in ("any", "all"):
        return [3, "loss", None, [], [3], [[]], {"metric": "loss", "above": 1}]
    return [[], {}, "", None]  # text


def places(rules):
    """Every field: rule, its parent, name, and the path that errors call it by."""
    for number, rule in enumerate(rules):
        for name, value in rule.items():
            yield number, rule, name, f"rules[{number}].{name}"
            if name == "parameters":
                yield number, value, "lr_scale", f"rules[{number}].parameters.lr_scale"
            if name == "any":
                for place, part in enumerate(value):
                    for inner in part:
                        yield number, part, inner, f"rules[{number}].any[{place}].{inner}"


def named(rules, number, path):
    """Whether a fault names the file, the line and the field, or what it is part of."""
    start = f"thresholds.yaml:{number + 3}: {path}"
    return any(line.startswith(start) for line in faults(written(rules)))


@settings(max_examples=120)
@given(tables(), st.data())
def test_a_wrong_value_is_named(made, data):
    number, parent, name, path = data.draw(st.sampled_from(list(places(made))))
    parent[name] = data.draw(st.sampled_from(wrong_values(name)))
    assert named(made, number, path)


@few
@given(tables(), st.data())
def test_a_misspelt_field_is_named(made, data):
    number, parent, name, path = data.draw(st.sampled_from(list(places(made))))
    place = data.draw(st.integers(0, len(name) - 1))
    misspelt = data.draw(
        st.sampled_from(
            [name[:place] + name[place + 1 :], name + "s", name.upper(), f"{name} "]
        )
    )
    parent[misspelt] = parent.pop(name)
    assert named(made, number, path[: -len(name)] + misspelt.strip(" "))


@few
@given(tables(), st.data())
def test_a_missing_field_is_named(made, data):
    number = data.draw(st.integers(0, len(made) - 1))
    name = data.draw(st.sampled_from(["id", "severity", "action"]))
    del made[number][name]
    assert named(made, number, f"rules[{number}].{name}: missing")


@few
@given(tables(), st.data())
def test_a_field_given_twice_is_named(made, data):
    number, parent, name, path = data.draw(st.sampled_from(list(places(made))))
    value = parent.pop(name)
    parent["@1"] = parent["@2"] = value
    text = written(made).replace('"@1"', f'"{name}"').replace('"@2"', f'"{name}"')
    start = f"thresholds.yaml:{number + 3}: {path}: given twice"
    assert any(line.startswith(start) for line in faults(text))


@few
@given(tables(), st.data())
def test_a_second_operator_is_named(made, data):
    holders = [(number, parent, path) for number, parent, name, path in places(made)]
    holders = [entry for entry in holders if "metric" in entry[1]]
    number, parent, path = data.draw(st.sampled_from(holders))
    operators = ["above", "below", "rises_by", "missing_for", "above_peers"]
    parent[data.draw(st.sampled_from([name for name in operators if name not in parent]))] = 2
    assert named(made, number, f"{path.rsplit('.', 1)[0]}: expected exactly one of ")


@few
@given(tables(), st.data())
def test_a_release_on_the_wrong_side_is_named(made, data):
    eased = [entry for entry in places(made) if entry[2] == "release"]
    if not eased:
        return
    number, parent, name, path = data.draw(st.sampled_from(eased))
    parent[name] += 100 if "at_most" not in parent else -100
    assert named(made, number, f"{path}: contradicts ")
