"""Custom values in the sidecar: keys of tables, judged alike from a request and the stream."""

import pytest

from esper_otel.leyline.frames import MAX_CUSTOM, MAX_CUSTOM_NAME
from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.leyline.wire import Ask, WireError
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.lint import doubts
from esper_tamiyo.language.table_file import TableError, TableSource, parse
from esper_tamiyo.receiving.harvest import AMOUNT, NAME, NO_STEP
from esper_tamiyo.receiving.otlp_frames import frames_of
from esper_tamiyo.replaying.table_test_file import load_tests
from esper_tamiyo.serving.connection import Trainer
from ops.generate.alerts.promql import Translator
from sidecar.frames_made import add_point, frame, hello_of, otlp_of, put, set_client

RULES = """
version: own
rules:
  - {id: worse, metric: custom.val_loss, above: 2, severity: HIGH, action: PAUSE}
  - {id: far, metric: custom.kl / step, above_baseline: 3, severity: WARNING,
     action: OPTIMIZER}
"""


def table(text=RULES):
    return parse(TableSource("own", text.encode()))


def test_any_text_behind_the_prefix_is_a_metric_of_a_table():
    made = table()
    assert [str(rule.when) for rule in made.rules] == [
        "custom.val_loss above 2",
        "custom.kl / step above 3 × its baseline",
    ]
    assert doubts(made) == []


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (
            "metric: val_loss, above: 1",
            'unknown metric "val_loss"; did you mean loss?; a custom value is custom.val_loss',
        ),
        ("metric: custom., above: 1", 'unknown metric "custom."'),
        (
            "metric: custom.kl, nonfinite: true",
            "no record says which custom value was not finite; expected custom_nonfinite "
            "above 0",
        ),
    ],
)
def test_what_is_no_condition_on_one_is_said(field, expected):
    with pytest.raises(TableError) as caught:
        table(f"version: v\nrules:\n  - {{id: a, {field}, severity: HIGH, action: PAUSE}}\n")
    assert expected in str(caught.value)


def test_a_rule_fires_on_one_at_the_step_that_brings_it():
    engine = Engine(table())
    reasons = []
    for step in range(1, 40):
        values = {"loss": 1.0, "custom.kl / step": 0.1 if step != 35 else 0.9}
        if step % 10 == 0:
            values["custom.val_loss"] = 1.0 if step < 30 else 2.5
        decision = engine.observe(frame(step, **values))
        reasons.append(decision.reason)
    fired = {step for step, reason in enumerate(reasons, 1) if reason in ("worse", "far")}
    assert fired == {30, 35}
    assert {reasons[29], reasons[34]} == {"worse", "far"}


def test_steps_without_one_are_answered_at_a_glance_and_those_with_one_where_no_rule_asks():
    engine, other = Engine(table()), Engine(table(RULES.replace("custom.", "custom.not_")))
    for step in range(1, 6):
        for each in (engine, other):
            each.observe(frame(step, loss=1.0))
    bare, own = frame(6, loss=1.0), frame(6, loss=1.0, **{"custom.val_loss": 9.0})
    key = ("run", 0)
    assert engine.decide_fast(key, "one", set_client(bare)) is not None
    assert engine.decide_fast(key, "one", set_client(own)) is None
    assert other.decide_fast(key, "one", set_client(own)) is not None


def test_both_copies_of_a_step_are_one_frame():
    made = frame(3, loss=1.0, **{"custom.val_loss": 2.5, "custom.größe": -1.0})
    asked = Trainer(hello_of(made)).frame_of_ask(set_client(made))
    harvest = frames_of(otlp_of(made))
    assert harvest.frames == [asked] == [made]
    assert (harvest.used, harvest.unusable) == (4, 0)


def test_an_ask_beyond_the_limits_is_no_message_of_a_trainer():
    trainer = Trainer(hello_of(frame(1)))
    row = [0.0] * len(STEP_KEYS)
    for custom in ({str(n): 1.0 for n in range(MAX_CUSTOM + 1)}, {"x" * 101: 1.0}):
        with pytest.raises(WireError, match="64 custom values, with names of 100"):
            trainer.frame_of_ask(Ask(1, 1, 1, row, [], None, custom))
    values = trainer.frame_of_ask(Ask(1, 1, 1, row, [], None, {"nan": float("nan")})).values
    assert "custom.nan" not in values


def test_points_without_a_name_too_long_or_too_many_are_counted():
    request = otlp_of(frame(1, **{f"custom.n{n}": 1.0 for n in range(MAX_CUSTOM + 2)}))
    scope = request.resource_metrics[0].scope_metrics[0]
    add_point(scope, "tolaria.custom", 2, 1.0)
    put(add_point(scope, "tolaria.custom", 2, 1.0).attributes, "name", "x" * 101)
    harvest = frames_of(request)
    assert harvest.reasons == {AMOUNT: 2, NO_STEP: 1, NAME: 1}
    (made,) = harvest.frames
    assert len(made.values) == 1 + MAX_CUSTOM
    assert max(map(len, made.values)) <= len("custom.") + MAX_CUSTOM_NAME


def test_tests_of_tables_make_them_up(tmp_path):
    (tmp_path / "own.yaml").write_text(RULES)
    tests = tmp_path / "own.test.yaml"
    tests.write_text("""
table: own.yaml
tests:
  - name: an evaluation that is worse
    metrics:
      loss: 1x5
      custom.val_loss: _x3 3 1
    expect:
      - {step: 4, action: PAUSE, reason: worse}
""")
    made, found = load_tests(tests)
    assert [failure for test in found for failure in test.failures(made)] == []


def test_alerts_ask_prometheus_by_the_name():
    made = table()
    translator = Translator(made.baseline)
    texts = [translator.translate(rule).text for rule in made.rules]
    assert texts[0] == "max_over_time(esper:tolaria_custom_custom_val_loss[5m]) > 2"
    recorded = {one.record: one.expr for one in translator.recordings.values()}
    assert recorded["esper:tolaria_custom_custom_kl___step"] == (
        'tolaria_custom{name="kl / step"}'
    )
