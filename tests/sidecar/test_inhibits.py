"""Which rules a rule may inhibit, and the word by which that was called before."""

from esper_tamiyo.language.table_file import load
from sidecar.tables_made import REST, errors, parsed, table


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
