"""Faults of a rule: each is told with its file, line and field."""

import pytest

from sidecar.tables_made import REST, errors, table

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
