"""Updates that are not made yet: what is decided of them, and that nothing is remembered."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.decisions import (
    NOMINAL,
    PROTOCOL_ERROR,
    Action,
    Proposal,
    SeedOperation,
)
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table import KNOWN_BEFORE_UPDATE
from esper_tamiyo.language.table_file import TableSource, load, parse
from sidecar.frames_made import NUMBERS, frame, runs
from sidecar.test_decide_fast import Ledger
from sidecar.test_engine import engine

PROPOSAL = Proposal("s7", SeedOperation.BLEND)

TABLE = parse(
    TableSource(
        "updates",
        b"""
version: updates
baseline: {window: 4, warmup: 2}
conservative: {clean_steps: 2}
rules:
  - {id: low, metric: loss, below: 0.1, for: 2, severity: HIGH, action: OPTIMIZER,
     parameters: {lr_scale: 0.5}}
  - {id: jump, metric: loss, above_baseline: 2, cooldown: 3, severity: HIGH, action: PAUSE,
     conservative: true, parameters: {max_norm: 1}}
  - {id: often, metric: loss, above: 0.15, release: 0.05, for: 2, of: 3, severity: HIGH,
     action: OPTIMIZER, parameters: {lr_scale: 0.25, max_norm: 2}}
  - {id: lost, nonfinite: true, severity: CRITICAL, action: PAUSE, inhibits: [often],
     parameters: {skip_step: true}}
  - {id: gone, metric: gradient_norm, nonfinite: true, severity: HIGH, action: PAUSE,
     parameters: {max_norm: 1}}
  - {id: same, metric: optimizer_lr, unchanged_for: 2, severity: WARNING, action: OPTIMIZER,
     parameters: {lr_scale: 2}}
  - {id: rise, metric: gradient_norm, rises_by: 0.1, severity: WARNING, action: OPTIMIZER,
     parameters: {skip_step: true}}
  - {id: calm, metric: grad_var, below_baseline: 0.5, release: 0.9, severity: HIGH,
     action: CONTINUE, inhibits: [same, rise]}
  - {id: sunk, metric: gradient_norm, below_baseline: 0.5, severity: HIGH, action: OPTIMIZER,
     parameters: {lr_scale: 3}}
  - {id: out, metric: loss, runs_out_within: 3, severity: HIGH, action: OPTIMIZER,
     parameters: {max_norm: 3}}
  - {id: both, severity: HIGH, action: OPTIMIZER, parameters: {lr_scale: 0.1}, any: [
      {metric: loss, above_baseline: 3, baseline: highest},
      {all: [{metric: gradient_norm, above: 1}, {metric: loss_delta, above: 0}]}]}
  - {id: tried, metric: loss, above: 0, mode: observe, severity: HIGH, action: OPTIMIZER,
     parameters: {skip_step: true}}
  - {id: later, metric: loss, above: 0, downgrade: true, severity: HIGH, action: OPTIMIZER,
     parameters: {lr_scale: 0.5}}
  - {id: plain, metric: loss, above: 0, severity: CRITICAL, action: PAUSE}
  - {id: seed, metric: kasmina.seed.alpha, above: 0.5, severity: HIGH, action: OPTIMIZER,
     parameters: {lr_scale: 0.5}}
""",
    )
)
TABLES = {"updates": TABLE, "default": load("default"), "prototype": load("prototype")}
ON_UPDATES = {"low", "jump", "often", "lost", "gone", "same", "rise", "sunk", "out", "both"}

TOLD_VALUES = st.fixed_dictionaries(
    dict.fromkeys(sorted(KNOWN_BEFORE_UPDATE - {"step"}), NUMBERS)
)
"""All that a check may tell."""


def checks(known=TOLD_VALUES):
    """What is known of a step before its update: the loss, or the gradients, maybe not."""
    missing = st.sets(st.sampled_from(["loss", "gradient_norm"]))
    return st.builds(
        lambda values, gone: {key: one for key, one in values.items() if key not in gone},
        known,
        missing,
    )


@given(
    runs(),
    st.lists(st.tuples(st.integers(0, 3), checks()), max_size=30),
    st.sampled_from(sorted(TABLES)),
)
def test_nothing_is_remembered_of_a_check(frames, made, table):
    books = Ledger(), Ledger()
    plain, checked = (Engine(TABLES[table], observer=book) for book in books)
    for place, one in enumerate(frames):
        proposal = PROPOSAL if place % 3 == 0 else None
        for ahead, values in made[place : place + 2]:
            checked.check(frame(one.step + ahead, **values))
        assert checked.observe(one, proposal) == plain.observe(one, proposal)
    assert checked.overview() == plain.overview()
    assert books[0].told == books[1].told


@given(runs(), checks())
def test_a_check_decides_as_judging_the_step_would(frames, values):
    """As to the rules that act on updates, where the update itself is beyond their bounds."""
    checking, judging = Engine(TABLE), Engine(TABLE)
    for one in frames:
        one.seeds.clear()
        checking.observe(one)
        judging.observe(one)
    step = frames[-1].step + 1
    found = checking.check(frame(step, **values)).findings
    judged = judging.observe(frame(step, **values)).findings
    firing = {
        rule["rule"]
        for rule in judging.overview()["runs"][0]["rules"]
        if rule["state"] == "firing"
    }
    assert found == [each for each in judged if each.rule in ON_UPDATES and each.rule in firing]


def checked(*rules, before=(1.0,), top="", **values):
    """The decision about an update, behind steps with these losses."""
    deciding = engine(*rules, top=top)
    for step, loss in enumerate(before):
        deciding.observe(frame(step, loss=loss))
    return deciding.check(frame(len(before), **values))


SKIP = "action: OPTIMIZER, parameters: {skip_step: true}"
QUARTER = "action: OPTIMIZER, parameters: {lr_scale: 0.25}"


def test_nothing_fires():
    decision = checked(f"metric: loss, above: 2, {SKIP}", loss=2.0)
    assert (decision.id, decision.action, decision.reason, decision.parameters) == (
        "run/0/1/update",
        Action.CONTINUE,
        NOMINAL,
        {},
    )
    assert (decision.step, decision.observed_step) == (1, 0)
    assert decision.table_version.startswith("test+")


def test_a_finding_says_what_it_saw():
    decision = checked(
        f"metric: loss, above_baseline: 2, text: Up., {SKIP}",
        top="baseline: {window: 2, warmup: 1}",
        loss=9.0,
    )
    (finding,) = decision.findings
    assert (finding.rule, finding.text) == ("r0", "Up.")
    assert finding.values == {"loss": 9.0, "baseline(loss)": 1.0}
    assert decision.parameters == {"skip_step": 1.0}


@pytest.mark.parametrize(
    ("rules", "action", "reason", "parameters"),
    [
        (("HIGH OPTIMIZER lr_scale: 0.5",), "OPTIMIZER", "r0", {"lr_scale": 0.5}),
        # to leave it out wins over all; the rest is for a trainer that leaves out no more
        (
            ("CRITICAL PAUSE max_norm: 1", "WARNING OPTIMIZER skip_step: true"),
            "OPTIMIZER",
            "r1",
            {"skip_step": 1.0, "max_norm": 1.0},
        ),
        (
            ("WARNING OPTIMIZER skip_step: true", "HIGH PAUSE skip_step: true"),
            "PAUSE",
            "r1",
            {"skip_step": 1.0},
        ),
        # a snapshot in its place wins over that, and the rest is for one that has none
        (
            ("CRITICAL PAUSE skip_step: true", "HIGH OPTIMIZER 'restore: true, lr_scale: 0.5'"),
            "OPTIMIZER",
            "r1",
            {"lr_scale": 0.5, "skip_step": 1.0, "restore": 1.0},
        ),
        (
            ("CRITICAL PAUSE max_norm: 2", "HIGH OPTIMIZER 'restore: true, lr_scale: 0.5'"),
            "OPTIMIZER",
            "r1",
            {"lr_scale": 0.5, "max_norm": 2.0, "restore": 1.0},
        ),
        # of factors that of the strongest rule, of norms the smallest
        (
            ("HIGH OPTIMIZER lr_scale: 0.5", "CRITICAL OPTIMIZER lr_scale: 0.75"),
            "OPTIMIZER",
            "r1",
            {"lr_scale": 0.75},
        ),
        (
            ("HIGH OPTIMIZER lr_scale: 0.5", "HIGH OPTIMIZER lr_scale: 0.25"),
            "OPTIMIZER",
            "r0",
            {"lr_scale": 0.5},
        ),
        (
            (
                "HIGH OPTIMIZER lr_scale: 0.5",
                "HIGH PAUSE max_norm: 3",
                "WARNING OPTIMIZER 'max_norm: 2, lr_scale: 0.1'",
            ),
            "PAUSE",
            "r1",
            {"lr_scale": 0.5, "max_norm": 2.0},
        ),
    ],
)
def test_of_several_rules(rules, action, reason, parameters):
    rows = []
    for rule in rules:
        severity, what, asked = rule.split(maxsplit=2)
        rows.append(
            f"metric: loss, above: 1, severity: {severity}, action: {what}, "
            f"parameters: {{{asked.strip(chr(39))}}}"
        )
    decision = checked(*rows, loss=2.0)
    assert (decision.action, decision.reason, decision.parameters) == (
        action,
        reason,
        parameters,
    )
    assert [finding.rule for finding in decision.findings] == [
        f"r{place}" for place in range(len(rules))
    ]


@pytest.mark.parametrize(
    ("rule", "before", "fires"),
    [
        ("for: 2", (1, 2), True),  # the update would be the second
        ("for: 2", (2, 1), False),
        ("for: 3", (1, 2), False),
        ("for: 2, of: 3", (2, 1), True),
        ("for: 2, of: 3", (2, 2, 1, 1), False),
        ("cooldown: 2", (2,), False),
        ("cooldown: 2", (2, 1), False),
        ("cooldown: 2", (2, 1, 1), True),
        ("mode: observe", (1,), False),
        ("downgrade: true", (1,), False),
    ],
)
def test_persistence_and_cooldown_count_as_usual(rule, before, fires):
    decision = checked(f"metric: loss, above: 1, {rule}, {SKIP}", before=before, loss=2.0)
    assert (decision.reason == "r0") is fires


def test_a_rule_on_its_way_back_leaves_an_update_alone_that_is_within_its_bounds():
    rule = f"metric: loss, above: 4, release: 2, {QUARTER}"
    assert checked(rule, before=(1, 5), loss=3.0).reason == NOMINAL
    assert checked(rule, before=(1, 5), loss=4.5).reason == "r0"


@pytest.mark.parametrize(
    ("inhibitor", "before", "inhibited"),
    [
        ("metric: loss, above: 1", (1,), True),
        ("metric: loss, above: 3", (1,), False),
        ("metric: loss, above: 3, release: 1", (4,), True),  # has fired, and still holds
        ("metric: loss, above: 3, release: 2.5", (4,), False),
        ("metric: loss, above: 1, for: 2", (1,), False),
        ("metric: loss, above: 1, mode: observe", (1,), False),
    ],
)
def test_inhibitions_count_as_usual(inhibitor, before, inhibited):
    decision = checked(
        f"{inhibitor}, inhibits: [r1]",
        f"metric: loss, above: 1, {SKIP}",
        before=before,
        loss=2.0,
    )
    assert (decision.reason == NOMINAL) is inhibited


def test_what_a_check_cannot_tell_inhibits_as_it_last_did():
    deciding = engine(
        "metric: step_latency_ms, above: 9, inhibits: [r1]", f"metric: loss, above: 1, {SKIP}"
    )
    for step, (latency, reason) in enumerate([(5.0, "r1"), (10.0, NOMINAL), (5.0, "r1")]):
        deciding.observe(frame(step, step_latency_ms=latency, loss=1.0))
        assert deciding.check(frame(step + 1, loss=2.0)).reason == reason


@pytest.mark.parametrize(
    ("condition", "values"),
    [
        # not told, which is neither "not finite" nor "absent for another step"
        ("metric: accuracy, nonfinite: true", {"nonfinite": 1.0}),
        ("metric: accuracy, missing_for: 1", {}),
        ("metric: loss, missing_for: 1", {}),
        ("metric: step_latency_ms, above: 0", {"step_latency_ms": 9.0}),
    ],
)
def test_what_a_check_does_not_tell_is_unknown(condition, values):
    deciding = engine(f"{condition}, {SKIP}")
    deciding.observe(frame(0, accuracy=1.0, loss=1.0))
    assert deciding.check(frame(1, **values)).reason == NOMINAL


@pytest.mark.parametrize("key", ["nonfinite", "loss", "gradient_norm"])
def test_what_is_not_finite_is_known_before_the_update(key):
    rule = f"metric: {key}, nonfinite: true, {SKIP}"
    assert checked(rule, nonfinite=1.0).reason == "r0"
    assert checked(rule, nonfinite=0.0, loss=1.0, gradient_norm=1.0).reason == NOMINAL


def test_where_nobody_can_judge_the_check_says_so():
    deciding = engine(f"metric: loss, above: 1, {SKIP}")
    assert deciding.check(frame(0, loss=2.0)).reason == PROTOCOL_ERROR
    deciding.observe(frame(4, loss=1.0))
    for one in (
        frame(4, loss=2.0),  # seen already
        frame(3, loss=2.0),
        frame(5, rank=1, loss=2.0),
        frame(5, run="another", loss=2.0),
        frame(5, instance="two", loss=2.0),
    ):
        decision = deciding.check(one)
        assert (decision.action, decision.reason) == (Action.CONTINUE, PROTOCOL_ERROR)
    assert deciding.check(frame(9, loss=2.0)).reason == "r0"
    assert deciding.check(frame(5, instance="", loss=2.0)).reason == "r0"
    assert deciding.overview()["frames"]["judged"] == 1


def test_a_check_never_raises(caplog):
    deciding = engine(f"metric: loss, above: 1, {SKIP}")
    deciding.observe(frame(0, loss=1.0))
    assert deciding.check(frame(1, loss="much")).reason == PROTOCOL_ERROR
    assert "could not evaluate step 1" in caplog.text
    assert deciding.check(frame(1, loss=2.0)).reason == "r0"


def test_a_rank_on_its_way_to_another_table_is_checked_by_the_one_before():
    deciding = engine(f"metric: loss, above: 1, {SKIP}")
    deciding.observe(frame(0, loss=1.0))
    before = deciding.table.version
    deciding.reload(engine(f"metric: loss, above: 9, {SKIP}").table)
    decision = deciding.check(frame(1, loss=2.0))
    assert (decision.reason, decision.table_version) == ("r0", before)
    deciding.observe(frame(1, loss=1.0))
    assert deciding.check(frame(2, loss=2.0)).reason == NOMINAL


def test_conservative_mode_is_told_and_neither_entered_nor_left():
    deciding = engine(
        f"metric: loss, above: 1, conservative: true, {SKIP}",
        top="conservative: {clean_steps: 2}",
    )
    deciding.observe(frame(0, loss=1.0))
    assert not deciding.check(frame(1, loss=2.0)).conservative
    assert not deciding.observe(frame(1, loss=1.0)).conservative
    deciding.observe(frame(2, loss=2.0))
    for step in (3, 3, 3):
        assert deciding.check(frame(step, loss=1.0)).conservative


def run_of(count, *, factor=1.0, since=0):
    """Steps of a steady run, whose gradients are so many times as large from one on."""
    for step in range(count):
        norm = (2.0 + 0.1 * (step % 5)) * (factor if step >= since else 1.0)
        yield step, {"loss": 1.0 - 0.001 * step, "gradient_norm": norm, "nonfinite": 0.0}


def test_the_default_table_leaves_out_what_is_not_finite():
    deciding = Engine(TABLES["default"])
    for step, usual in run_of(60):
        assert deciding.check(frame(step, **usual)).action is Action.CONTINUE
        deciding.observe(frame(step, **usual))
    assert deciding.check(frame(60, nonfinite=1.0)).parameters == {"skip_step": 1.0}


def test_the_default_table_makes_one_bad_update_with_the_usual_norm():
    """That is the level of the norm and its scatter: what it is at most, as a rule."""
    deciding = Engine(TABLES["default"])
    for step, usual in run_of(60):
        deciding.observe(frame(step, **usual))
    decision = deciding.check(frame(60, loss=0.94, gradient_norm=1e4, nonfinite=0.0))
    assert (decision.action, decision.reason) == (Action.OPTIMIZER, "gradient_spike")
    (finding,) = decision.findings
    seen = finding.values
    usual_norm = seen["level(gradient_norm)"] + seen["scatter(gradient_norm)"]
    assert decision.parameters == {"max_norm": usual_norm}
    assert 2.0 <= usual_norm <= 2.8


def test_gradients_that_stay_large_are_made_with_a_norm_that_does_not_drift():
    """As those that a loss scale is no longer taken out of: training goes on as before."""
    deciding = Engine(TABLES["default"])
    asked = []
    for step, values in run_of(700, factor=5000.0, since=60):
        asked.append(deciding.check(frame(step, **values)).parameters)
        deciding.observe(frame(step, **values))
    assert asked[:60] == [{}] * 60
    norms = [parameters.get("max_norm") for parameters in asked[60:]]
    assert None not in norms
    assert max(norms) == min(norms) <= 2.8


def test_gradients_that_come_back_are_the_usual_ones_again():
    deciding = Engine(TABLES["default"])
    for step, values in run_of(100, factor=5000.0, since=60):
        deciding.observe(frame(step, **values))
    for step, values in run_of(200):
        if step >= 100:
            assert deciding.check(frame(step, **values)).action is Action.CONTINUE
            deciding.observe(frame(step, **values))


def test_the_usual_norm_of_a_rule_on_a_baseline_is_the_baseline():
    norm = "parameters: {usual_norm: true}, action: OPTIMIZER"
    deciding = engine(
        f"metric: gradient_norm, above_baseline: 10, {norm}",
        top="baseline: {window: 4, warmup: 2}",
    )
    for step in range(8):
        deciding.observe(frame(step, gradient_norm=3.0))
    assert deciding.check(frame(8, gradient_norm=50.0)).parameters == {"max_norm": 3.0}
    assert deciding.observe(frame(8, gradient_norm=50.0)).parameters == {"max_norm": 3.0}


def test_a_usual_norm_that_nobody_knows_is_not_asked_for():
    """The rule fires by another metric, and the run has no gradient norm."""
    norm = "parameters: {usual_norm: true}, action: OPTIMIZER"
    deciding = engine(
        f"any: [{{metric: loss, above: 5}}, "
        f"{{metric: gradient_norm, above_baseline: 10}}], {norm}"
    )
    deciding.observe(frame(0, loss=1.0))
    decision = deciding.check(frame(1, loss=9.0))
    assert (decision.reason, decision.parameters) == ("r0", {})
