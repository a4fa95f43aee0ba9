"""From frames to decisions: persistence, force, proposals, modes, copies, memory."""

import logging
import math
import random

import pytest
from msgspec import structs

from esper_otel.leyline.decisions import (
    CONSERVATIVE_MODE,
    NOMINAL,
    PROTOCOL_ERROR,
    SUPERSEDED,
    Action,
    Proposal,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.frames import MAX_NAME, StepFrame
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.rule_status import MAX_SEEDS
from esper_tamiyo.language.table_file import TableSource, load, parse
from sidecar.frames_made import frame

PROPOSAL = Proposal("s7", SeedOperation.BLEND)


def engine(*rules, top=""):
    """An engine with these rules, each in YAML flow; HIGH and PAUSE unless said."""
    lines = []
    for number, rule in enumerate(rules):
        fields = [f"id: r{number}"] if "id:" not in rule else []
        fields += [rule]
        fields += ["severity: HIGH"] if "severity:" not in rule else []
        fields += ["action: PAUSE"] if "action:" not in rule else []
        lines.append(f"  - {{{', '.join(fields)}}}")
    text = "\n".join(["version: test", top, "rules:", *lines])
    return Engine(parse(TableSource("test", text.encode())))


def reasons(engine, *losses, start=0):
    """The reason of the decision at each step; None leaves the loss out."""
    return [
        engine.observe(frame(step, **({} if loss is None else {"loss": loss}))).reason
        for step, loss in enumerate(losses, start)
    ]


def test_nothing_fired_is_nominal():
    decision = engine("metric: loss, above: 1").observe(frame(3, loss=1.0))
    assert decision.id == "run/0/3"
    assert (decision.run, decision.step, decision.observed_step) == ("run", 3, 3)
    assert (decision.action, decision.severity, decision.reason) == (
        Action.CONTINUE,
        Severity.NORMAL,
        NOMINAL,
    )
    assert decision.findings == []
    assert decision.table_version.startswith("test+")


def test_a_finding_carries_what_the_rule_saw():
    deciding = engine(
        "id: up, all: [{metric: loss, above_baseline: 2}, {metric: accuracy, rises_by: 0.1}], "
        "action: OPTIMIZER, parameters: {lr_scale: 0.5}, text: Up.",
        top="baseline: {window: 4, warmup: 2}",
    )
    deciding.observe(frame(0, loss=1.0, accuracy=0.5))
    deciding.observe(frame(1, loss=2.0, accuracy=0.5))
    decision = deciding.observe(frame(2, loss=9.0, accuracy=0.75))
    (finding,) = decision.findings
    assert (finding.rule, finding.text, finding.seed_id) == ("up", "Up.", None)
    assert finding.values == {
        "loss": 9.0,
        "baseline(loss)": 1.5,
        "accuracy": 0.75,
        "previous(accuracy)": 0.5,
    }
    assert (decision.action, decision.reason) == (Action.OPTIMIZER, "up")
    assert decision.parameters == {"lr_scale": 0.5}


@pytest.mark.parametrize(
    ("options", "losses", "fires_at"),
    [
        ("for: 1", (2, 2, 0, 2), (0, 1, 3)),
        ("for: 3", (2, 2, 2, 2, 0, 2, 2, 2), (2, 3, 7)),
        # unknown neither advances nor starts anew
        ("for: 2", (2, None, 2, None, 0, None, 2), (2,)),
        ("cooldown: 2", (2, 2, 2, 2, 2, 2, 2), (0, 3, 6)),
        ("cooldown: 2", (2, 0, 0, 2), (0, 3)),
        ("for: 2, cooldown: 1", (2, 2, 2, 2, 0, 2, 2), (1, 3, 6)),
    ],
)
def test_persistence_and_cooldown(options, losses, fires_at):
    found = reasons(engine(f"metric: loss, above: 1, {options}"), *losses)
    assert tuple(step for step, reason in enumerate(found) if reason == "r0") == fires_at


@pytest.mark.parametrize(
    ("options", "fires_at"),
    [
        # the event is reported, and again when it has been over for as long as that
        ("cooldown: 3", (7, 11)),
        ("", (3, 4, 5, 7, 8, 9, 10, 11)),
        # an action that is held back is not taken
        ("cooldown: 3, action: OPTIMIZER", (3, 7, 11)),
    ],
)
def test_a_report_that_is_inhibited_cools_down_as_if_it_were_made(options, fires_at):
    """Of one event: the second rule goes on where the first has ended."""
    plain = "" if "action" in options else "action: CONTINUE"
    rules = ", ".join(part for part in ("metric: loss, above: 1", options, plain) if part)
    deciding = engine("metric: loss, above: 5, action: CONTINUE, inhibits: [r1]", rules)
    losses = (9, 9, 9, 2, 2, 2, 0, 2, 2, 2, 2, 2)
    found = [
        [finding.rule for finding in deciding.observe(frame(step, loss=float(loss))).findings]
        for step, loss in enumerate(losses)
    ]
    assert tuple(step for step, rules in enumerate(found) if "r1" in rules) == fires_at


@pytest.mark.parametrize(
    ("shape", "fires_after"),
    [
        (lambda step, noise: 1 + 0.2 * noise, range(6, 14)),
        (lambda step, noise: 2 - 0.005 * step + 0.2 * noise, range(6, 17)),
        (lambda step, noise: 1 + math.sin(step / 9) + 0.01 * noise, range(20, 33)),
    ],
)
def test_a_metric_that_wanders_has_to_stay_above_for_longer(shape, fires_after):
    """Up to four times as long as one whose values are independent."""
    source = random.Random(1)
    deciding = engine("metric: loss, risen_for: 8")
    before = [shape(step, source.gauss(0, 1)) for step in range(130)]
    assert "r0" not in reasons(deciding, *before)
    found = reasons(deciding, *([9.0] * 40), start=130)
    assert found.index("r0") + 1 in fires_after


def test_cooldown_counts_steps_also_those_not_seen():
    deciding = engine("metric: loss, above: 1, cooldown: 5")
    assert deciding.observe(frame(10, loss=2.0)).reason == "r0"
    assert deciding.observe(frame(15, loss=2.0)).reason == NOMINAL
    assert deciding.observe(frame(16, loss=2.0)).reason == "r0"


@pytest.mark.parametrize(
    ("rules", "winner"),
    [
        (("NORMAL PAUSE", "CRITICAL OPTIMIZER"), 0),
        (("CRITICAL OPTIMIZER", "NORMAL PAUSE"), 1),
        (("CRITICAL CONTINUE", "NORMAL OPTIMIZER"), 1),
        (("WARNING PAUSE", "HIGH PAUSE"), 1),
        (("HIGH PAUSE", "CRITICAL PAUSE", "HIGH PAUSE"), 1),
        (("HIGH PAUSE", "HIGH PAUSE"), 0),
        (("HIGH OPTIMIZER", "HIGH OPTIMIZER"), 0),
    ],
)
def test_force_then_severity_then_table_order(rules, winner):
    rows = []
    for rule in rules:
        severity, action = rule.split()
        rows.append(f"metric: loss, above: 1, severity: {severity}, action: {action}")
    decision = engine(*rows).observe(frame(0, loss=2.0))
    severity, action = rules[winner].split()
    assert decision.reason == f"r{winner}"
    assert (decision.severity, decision.action) == (Severity(severity), Action(action))
    assert [finding.rule for finding in decision.findings] == [
        f"r{n}" for n in range(len(rules))
    ]


@pytest.mark.parametrize(
    ("rule", "proposal", "action", "reason", "findings"),
    [
        ("above: 1, downgrade: true, action: OPTIMIZER", None, Action.CONTINUE, NOMINAL, 0),
        ("above: 1, downgrade: true, action: OPTIMIZER", PROPOSAL, Action.OPTIMIZER, "r0", 1),
        ("above: 1", PROPOSAL, Action.PAUSE, "r0", 1),
        ("above: 1, action: CONTINUE", PROPOSAL, Action.SEED, NOMINAL, 1),
        ("above: 1, action: CONTINUE", None, Action.CONTINUE, "r0", 1),
        ("above: 9", PROPOSAL, Action.SEED, NOMINAL, 0),
    ],
)
def test_what_a_proposal_changes(rule, proposal, action, reason, findings):
    decision = engine(f"metric: loss, {rule}").observe(frame(0, loss=2.0), proposal)
    assert (decision.action, decision.reason) == (action, reason)
    assert len(decision.findings) == findings
    granted = action is Action.SEED
    assert decision.target_seed == ("s7" if granted else None)
    assert decision.seed_operation == (SeedOperation.BLEND if granted else None)


CONSERVATIVE = "metric: loss, above: 1, conservative: true"


RESTORES = (
    "metric: loss, above: 1, action: OPTIMIZER, parameters: {restore: true, lr_scale: 0.5}"
)


@pytest.mark.parametrize(
    ("other", "action", "parameters"),
    [
        (
            "metric: loss, above: 1, severity: CRITICAL, parameters: {skip_step: true}",
            Action.PAUSE,
            {"skip_step": 1.0, "restore": 1.0, "lr_scale": 0.5},
        ),
        (
            "metric: loss, above: 1, severity: CRITICAL, action: OPTIMIZER, "
            "parameters: {lr_scale: 0.25}",
            Action.OPTIMIZER,
            {"lr_scale": 0.25, "restore": 1.0},
        ),
        (
            "metric: loss, above: 2",
            Action.OPTIMIZER,
            {"restore": 1.0, "lr_scale": 0.5},
        ),
    ],
)
def test_weights_are_to_be_put_back_whichever_rule_wins(other, action, parameters):
    decision = engine(other, RESTORES).observe(frame(1, loss=2.0))
    assert (decision.action, decision.parameters) == (action, parameters)


def test_a_rule_that_only_observes_has_no_weights_put_back():
    decision = engine("metric: loss, above: 1", f"{RESTORES}, mode: observe").observe(
        frame(1, loss=2.0)
    )
    assert (decision.action, decision.parameters) == (Action.PAUSE, {})


def test_conservative_mode_pauses_seeds_until_enough_clean_steps():
    deciding = engine(
        CONSERVATIVE,
        "id: other, metric: accuracy, above: 1, action: OPTIMIZER",
        "id: down, metric: grad_var, above: 1, action: OPTIMIZER, downgrade: true",
        top="conservative: {clean_steps: 3}",
    )

    def at(step, proposal=PROPOSAL, **values):
        values = {"loss": 0.0, "accuracy": 0.0, "grad_var": 0.0} | values
        decision = deciding.observe(frame(step, **values), proposal)
        return decision.action, decision.reason, decision.conservative

    assert at(0) == (Action.SEED, NOMINAL, False)
    assert at(1, loss=2.0) == (Action.PAUSE, "r0", True)
    assert at(2) == (Action.PAUSE, CONSERVATIVE_MODE, True)
    assert at(3, proposal=None) == (Action.CONTINUE, NOMINAL, True)
    assert at(4, accuracy=2.0) == (Action.OPTIMIZER, "other", True)  # not clean
    assert at(5) == (Action.PAUSE, CONSERVATIVE_MODE, True)
    assert at(6, grad_var=2.0) == (Action.OPTIMIZER, "down", True)  # clean: a downgrade
    assert at(7) == (Action.SEED, NOMINAL, False)


def test_what_is_only_told_does_not_keep_conservative_mode_on():
    drift = "id: drift, metric: accuracy, above: 1, severity: WARNING, action: CONTINUE"
    deciding = engine(CONSERVATIVE, drift, top="conservative: {clean_steps: 3}")
    deciding.observe(frame(0, loss=2.0))
    told = [deciding.observe(frame(step, loss=0.0, accuracy=2.0)) for step in range(1, 5)]
    assert [each.reason for each in told] == ["drift"] * 4
    assert [each.conservative for each in told] == [True, True, False, False]


def test_conservative_mode_can_be_all_that_a_rule_does():
    """It must not count as clean the very step at which it enters the mode."""
    tells = "metric: loss, above: 1, action: CONTINUE, conservative: true"
    deciding = engine(tells, top="conservative: {clean_steps: 2}")
    losses = (0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0)
    modes = [
        deciding.observe(frame(step, loss=loss)).conservative
        for step, loss in enumerate(losses)
    ]
    assert modes == [False, False, False, True, True, True, False]


def test_a_rule_that_holds_during_its_cooldown_is_not_clean():
    deciding = engine(f"{CONSERVATIVE}, cooldown: 100", top="conservative: {clean_steps: 2}")
    modes = [
        deciding.observe(frame(step, loss=loss)).conservative
        for step, loss in enumerate((2.0, 2.0, 2.0, 2.0, 0.0, 0.0))
    ]
    assert modes == [True, True, True, True, True, False]


def test_a_rule_about_seeds_names_the_first_that_satisfies_it():
    deciding = engine("metric: kasmina.seed.alpha, above: 0.5")
    seeds = {
        "a": {"kasmina.seed.alpha": 0.1},
        "b": {"kasmina.seed.alpha": 0.7},
        "c": {"kasmina.seed.alpha": 0.9},
    }
    decision = deciding.observe(frame(0, seeds))
    assert decision.target_seed == "b"
    assert decision.findings[0].seed_id == "b"
    assert decision.findings[0].values == {"kasmina.seed.alpha": 0.7}
    assert deciding.observe(frame(1)).reason == NOMINAL


def test_conditions_of_one_rule_speak_of_the_same_seed():
    deciding = engine(
        "all: [{metric: kasmina.seed.alpha, above: 0.5}, "
        "{metric: kasmina.seed.fallback_used, above: 0}, {metric: loss, above: 1}]"
    )
    alpha, fallback = "kasmina.seed.alpha", "kasmina.seed.fallback_used"
    apart = {"a": {alpha: 0.9, fallback: 0.0}, "b": {alpha: 0.1, fallback: 1.0}}
    together = {**apart, "c": {alpha: 0.9, fallback: 1.0}}
    assert deciding.observe(frame(0, apart, loss=2.0)).reason == NOMINAL
    assert deciding.observe(frame(1, together, loss=2.0)).target_seed == "c"
    assert deciding.observe(frame(2, together, loss=0.0)).reason == NOMINAL


def test_each_seed_has_a_past_of_its_own():
    deciding = engine("metric: kasmina.seed.isolation_violations, rises_by: 1")
    key = "kasmina.seed.isolation_violations"
    deciding.observe(frame(0, {"a": {key: 5.0}, "b": {key: 0.0}}))
    assert deciding.observe(frame(1, {"a": {key: 5.0}, "b": {key: 0.0}})).reason == NOMINAL
    assert deciding.observe(frame(2, {"a": {key: 5.0}, "b": {key: 1.0}})).target_seed == "b"


def test_pasts_of_seeds_are_bounded():
    deciding = engine("metric: kasmina.seed.alpha, rises_by: 1")
    for step in range(MAX_SEEDS + 10):
        deciding.observe(frame(step, {f"s{step}": {"kasmina.seed.alpha": 0.0}}))
    assert len(deciding._runs["run", 0]._seeds) <= MAX_SEEDS


def test_what_is_known_of_runs_and_of_replaced_processes_is_bounded(monkeypatch):
    monkeypatch.setattr("esper_tamiyo.judging.roster.MAX_RETIRED", 3)
    deciding = Engine(load("prototype"))
    deciding.roster.capacity = deciding.roster.capacity._replace(ranks=2)
    for number in range(9):
        deciding.observe(frame(0, run=f"run{number}", loss=1.0))
        deciding.observe(frame(0, run="again", instance=f"p{number}", loss=1.0))
    roster = deciding.roster
    assert (len(roster.ranks), len(roster._boards), len(roster._retired)) == (2, 2, 3)


def test_the_second_copy_of_a_step_changes_nothing():
    deciding = engine("metric: loss, above: 1, for: 2")
    first = deciding.observe(frame(0, loss=2.0))
    assert deciding.observe(frame(0, loss=2.0)) == first
    assert deciding.observe(frame(1, loss=2.0)).reason == "r0"
    assert deciding.overview()["frames"]["duplicate"] == 1


def test_an_ask_about_a_streamed_step_gets_that_step_s_findings_and_its_own_proposal():
    deciding = engine("metric: loss, above: 1, downgrade: true, action: OPTIMIZER")
    assert deciding.observe(frame(5, loss=2.0)).reason == NOMINAL
    asked = deciding.observe(frame(5, loss=2.0), PROPOSAL)
    assert (asked.step, asked.observed_step, asked.reason) == (5, 5, "r0")
    assert deciding.latest("run") == asked


def test_the_streamed_copy_does_not_hide_what_was_answered():
    deciding = engine("metric: loss, above: 9")
    asked = deciding.observe(frame(5, loss=2.0), PROPOSAL)
    deciding.observe(frame(5, loss=2.0))
    assert asked.action is Action.SEED
    assert deciding.latest("run") == asked


def test_a_late_step_gets_the_latest_findings():
    deciding = engine("metric: loss, above: 1")
    deciding.observe(frame(5, loss=0.0))
    deciding.observe(frame(9, loss=2.0))
    decision = deciding.observe(frame(7, loss=0.0))
    assert (decision.id, decision.step, decision.observed_step) == ("run/0/7", 7, 9)
    assert decision.reason == "r0"
    for step in (3, 7, 9, 5):
        deciding.observe(frame(step, loss=0.0))
    frames = deciding.overview()["frames"]
    assert (frames["judged"], frames["late"], frames["duplicate"]) == (2, 3, 2)
    assert deciding.latest("run").step == 9


def test_a_restarted_process_starts_anew_and_its_predecessor_does_not_come_back():
    deciding = engine("metric: loss, above: 1, for: 2")
    assert deciding.observe(frame(100, loss=2.0)).reason == NOMINAL
    later = [
        structs.replace(frame(step, instance="two", loss=2.0), time_unix_nano=102 + step)
        for step in (3, 4)
    ]
    assert deciding.observe(later[0]).reason == NOMINAL
    stale = deciding.observe(frame(101, loss=2.0))
    assert (stale.action, stale.reason) == (Action.CONTINUE, SUPERSEDED)
    assert deciding.observe(later[1]).reason == "r0"
    assert deciding.overview()["frames"]["superseded"] == 1


def test_a_producer_without_an_instance_shares_the_state_of_the_one_with():
    deciding = engine("metric: loss, above: 1, for: 2")
    deciding.observe(frame(0, instance="", loss=2.0))
    assert deciding.observe(frame(1, instance="one", loss=2.0)).reason == "r0"
    assert deciding.observe(frame(2, instance="", loss=2.0)).reason == "r0"


def test_runs_and_ranks_are_apart():
    deciding = engine("metric: loss, above: 1, for: 2")
    for run, rank in (("a", 0), ("a", 1), ("b", 0)):
        assert deciding.observe(frame(0, run=run, rank=rank, loss=2.0)).reason == NOMINAL
    assert deciding.latest().run == "b"
    assert deciding.latest("a", 1).id == "a/1/0"
    assert deciding.latest("a", 2) is None
    assert Engine(load("default")).latest() is None


def test_the_rank_not_heard_of_for_longest_is_forgotten():
    deciding = Engine(load("prototype"))
    deciding.roster.capacity = deciding.roster.capacity._replace(ranks=2)
    for run in ("a", "b", "a", "c"):
        deciding.observe(frame(0, run=run))
    assert deciding.latest("b") is None
    assert deciding.latest("a") is not None
    report = deciding.overview()
    assert report["ranks"] == 2
    assert report["frames"]["runs_forgotten"] == 1


def test_a_name_too_long_to_answer_with_is_a_bad_frame():
    deciding = Engine(load("prototype"))
    decision = deciding.observe(frame(0, run="x" * (MAX_NAME + 1)))
    assert decision.reason == PROTOCOL_ERROR
    assert deciding.overview()["frames"]["bad"] == 1


def test_a_frame_that_breaks_a_rule_is_counted_and_the_next_is_judged(caplog):
    deciding = engine("metric: loss, above: 1")
    broken = StepFrame("run", "one", 0, 1, 1, {"step": 1.0, "loss": "much"})
    with caplog.at_level(logging.CRITICAL, "tamiyo"):
        decision = deciding.observe(broken)
    assert (decision.action, decision.reason) == (Action.CONTINUE, PROTOCOL_ERROR)
    assert deciding.overview()["frames"]["bad"] == 1
    assert deciding.observe(frame(2, loss=2.0)).reason == "r0"
