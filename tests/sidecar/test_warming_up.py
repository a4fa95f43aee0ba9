"""While rules that act have no past to compare with, a step is not called nominal."""

import pytest
from msgspec import structs

from esper_otel.leyline.decisions import (
    NOMINAL,
    UNJUDGED,
    WARMING_UP,
    Action,
    Proposal,
    SeedOperation,
)
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.rulebook import Rulebook
from esper_tamiyo.language.table_file import TableSource, load, parse
from esper_tamiyo.replaying.replay import replay
from esper_tamiyo.serving.connection import Trainer
from sidecar.frames_made import frame, hello_of, set_client

HEAD = "version: t\nbaseline: {window: 8, warmup: 4}\nrecord: {window: 16, warmup: 8}\nrules: "
ACTS = "severity: HIGH, action: OPTIMIZER"


def table(*rules):
    text = HEAD + "[" + ", ".join(f"{{id: r{n}, {rule}}}" for n, rule in enumerate(rules)) + "]"
    return parse(TableSource("t", text.encode()))


def reasons(engine, steps, **values):
    return [engine.observe(frame(step, **{"loss": 1.0} | values)).reason for step in steps]


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (f"metric: loss, above: 9, {ACTS}", 0),
        (f"metric: loss, rises_by: 9, {ACTS}", 0),
        (f"metric: loss, above_baseline: 9, {ACTS}", 4),
        (f"metric: loss, above_baseline: 9, baseline: highest, {ACTS}", 4),
        (f"metric: loss, above_baseline: 9, baseline: frozen, {ACTS}", 12),
        (f"metric: loss, above_record: 9, {ACTS}", 32),
        (f"metric: accuracy, above_baseline: 9, {ACTS}", 4),  # which never comes
        (f"metric: loss, above_baseline: 9, mode: observe, {ACTS}", 0),
        (f"metric: loss, above_baseline: 9, downgrade: true, {ACTS}", 0),
        ("metric: loss, above_baseline: 9, severity: HIGH, action: CONTINUE", 0),
        (f"metric: kasmina.seed.alpha, above_baseline: 9, {ACTS}", 0),
    ],
)
def test_it_lasts_until_each_rule_that_acts_can_have_a_past(rule, steps):
    assert Rulebook(table(rule)).warm_after == steps
    found = reasons(Engine(table(rule)), range(100, 140))
    assert found == [WARMING_UP] * steps + [NOMINAL] * (40 - steps)


def test_no_table_that_comes_with_the_package_warms_up_for_longer_than_its_longest_span():
    assert Rulebook(load("default")).warm_after == 84  # baseline: window and warmup
    assert Rulebook(load("prototype")).warm_after < 84


def test_a_rule_that_needs_no_past_is_heard_meanwhile():
    rules = f"metric: loss, above_baseline: 9, {ACTS}", f"metric: loss, above: 5, {ACTS}"
    engine = Engine(table(*rules))
    assert reasons(engine, (1, 2)) == [WARMING_UP] * 2
    assert reasons(engine, (3,), loss=6.0) == ["r1"]
    assert reasons(engine, (4, 5)) == [WARMING_UP, NOMINAL]


def test_a_proposal_is_granted_with_a_reason_that_says_so():
    engine = Engine(table(f"metric: loss, above_baseline: 9, {ACTS}"))
    decision = engine.observe(frame(1), Proposal("s", SeedOperation.TRAIN))
    assert (decision.action, decision.reason) == (Action.SEED, WARMING_UP)


def test_a_phase_of_the_training_begins_anew():
    engine = Engine(table(f"metric: loss, above_baseline: 9, {ACTS}"))
    reasons(engine, range(10))
    assert reasons(engine, range(10, 16), phase=1.0) == [WARMING_UP] * 4 + [NOMINAL] * 2


def test_a_process_that_begins_anew_has_no_past():
    engine = Engine(table(f"metric: loss, above_baseline: 9, {ACTS}"))
    reasons(engine, range(10))
    assert engine.observe(frame(20, instance="two")).reason == WARMING_UP


def test_another_table_warms_up_only_where_it_needs_another_past():
    engine = Engine(table(f"metric: loss, above_baseline: 9, {ACTS}"))
    reasons(engine, range(10))
    engine.reload(table(f"metric: loss, above_baseline: 8, {ACTS}"))
    assert reasons(engine, (10,)) == [NOMINAL]
    engine.reload(table(f"metric: accuracy, above_baseline: 8, {ACTS}"))
    assert reasons(engine, range(11, 16)) == [WARMING_UP] * 4 + [NOMINAL]


def test_a_glance_a_judgement_and_a_replay_say_the_same():
    phases = [0.0] * 8 + [1.0] * 8 + [None] * 8 + [float("inf")] * 2
    frames = []
    for step, phase in enumerate(phases):
        values = {} if phase is None else {"phase": phase}
        frames.append(frame(step, loss=1.0, nonfinite=0.0, **values))
    deciding = table(f"metric: loss, above_baseline: 9, {ACTS}")
    glancing, found, glances = Engine(deciding), [], 0
    for one in frames:
        trainer, ask = Trainer(hello_of(one)), set_client(one)
        decision = glancing.decide_fast(trainer.key, trainer.instance, ask)
        if decision is None:
            decision = glancing.observe(trainer.frame_of_ask(ask), asked=True)
        else:
            glances += 1
            glancing.commit(trainer.frame_of_ask(ask), decision)
        found.append(decision.reason)
    assert glances > 12
    assert found == ([WARMING_UP] * 4 + [NOMINAL] * 4) * 3 + [NOMINAL] * 2
    finite = [
        structs.replace(one, values={k: v for k, v in one.values.items() if v != float("inf")})
        for one in frames
    ]
    replayed = [
        each.decision.reason for each in replay(((one, None) for one in finite), deciding)
    ]
    assert replayed == found


def test_such_a_step_is_none_that_a_trainer_counts_as_clean():
    assert WARMING_UP in UNJUDGED
    assert NOMINAL not in UNJUDGED
