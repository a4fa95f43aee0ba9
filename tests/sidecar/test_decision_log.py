"""From what the engine tells to the entries of the journal."""

import pytest

from esper_otel.leyline.decisions import Proposal, SeedOperation
from esper_otel.leyline.wire import PROTOCOL, Hello
from esper_tamiyo.journaling.decision_log import (
    MAX_QUEUED,
    DecisionLog,
)
from esper_tamiyo.journaling.entries import MAX_CONDITIONS, Changed, Decided, table_entry
from esper_tamiyo.journaling.field_reports import DueReport
from esper_tamiyo.journaling.journal_writer_child import MAX_MESSAGE
from esper_tamiyo.journaling.messages import pack
from esper_tamiyo.journaling.outcomes import OutcomeReports
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import TableSource, parse
from sidecar.frames_made import frame

RULES = """
version: test
rules:
  - {id: high, metric: loss, above: 10, for: 2, severity: HIGH, action: PAUSE, text: High.}
  - {id: rising, metric: loss_delta, above: 1, severity: WARNING, action: OPTIMIZER,
     parameters: {lr_scale: 0.5}, text: Rising.}
"""


@pytest.fixture
def decision_log():
    return DecisionLog()


@pytest.fixture
def engine(decision_log):
    return Engine(parse(TableSource("test", RULES.encode())), observer=decision_log)


def entries(decision_log, kind):
    return [
        entry for entry in decision_log.make_entries(10_000, 0.0) if isinstance(entry, kind)
    ]


def test_a_decision_is_noted_with_since_when_its_rules_hold(decision_log, engine):
    for step, loss in enumerate([1.0, 1.0, 20.0, 20.0]):
        decision_log.set_context(0, asked=True)
        engine.observe(frame(step, loss=loss, loss_delta=2.0 if step == 3 else 0.0))
    (entry,) = entries(decision_log, Decided)
    assert (entry.id, entry.action, entry.reason) == ("run/0/3", "PAUSE", "high")
    assert (entry.mode, entry.asked, entry.proposal) == ("", True, None)
    high, rising = entry.findings
    assert (high.rule, high.pending_since, high.firing_since) == ("high", 2, 3)
    assert (rising.rule, rising.firing_since) == ("rising", 3)
    assert high.values == {"loss": 20.0}


def test_every_change_of_a_rule_is_noted(decision_log, engine):
    for step, loss in enumerate([1.0, 20.0, 20.0, 1.0]):
        engine.observe(frame(step, loss=loss, loss_delta=0.0))
    told = [
        (entry.step, entry.rule, entry.after)
        for entry in entries(decision_log, Changed)
        if entry.rule == "high"
    ]
    assert told == [
        (0, "high", "inactive"),
        (1, "high", "pending"),
        (2, "high", "firing"),
        (3, "high", "inactive"),
    ]


def test_what_was_proposed_and_what_the_trainer_does_with_decisions_are_noted(
    decision_log, engine
):
    decision_log.on_hello(Hello(PROTOCOL, "run", "one", 0, 1, [], [], mode="enforce"))
    proposal = Proposal("s1", SeedOperation.BLEND)
    decision_log.set_context(0, asked=True, proposal=proposal)
    engine.observe(frame(0, loss=1.0), proposal)
    (entry,) = entries(decision_log, Decided)
    assert (entry.action, entry.mode) == ("SEED", "enforce")
    assert (entry.proposal.seed_id, entry.proposal.operation) == ("s1", "blend")


def test_a_check_is_noted_unless_it_changes_nothing(decision_log, engine):
    decision_log.on_hello(Hello(PROTOCOL, "run", "one", 0, 1, [], [], mode="enforce"))
    engine.observe(frame(0, loss=1.0, loss_delta=0.0))
    for delta in (0.0, 2.0):
        known = frame(1, loss=1.0, loss_delta=delta)
        decision_log.on_check(engine.check(known), known, 0)
    unknown = frame(1, rank=1)
    decision_log.on_check(engine.check(unknown), unknown, 0)
    (entry,) = entries(decision_log, Decided)
    assert (entry.id, entry.update, entry.step) == ("run/0/1/update", True, 1)
    assert (entry.mode, entry.asked, entry.parameters) == ("enforce", True, {"lr_scale": 0.5})
    assert entry.findings[0].values == {"loss_delta": 2.0}
    assert decision_log.checks == {"unchanged": 1, "smaller": 1, "skipped": 0, "unjudged": 1}
    assert sum(decision_log.decisions.values()) == 1, "a check is not a decision about a step"
    assert decision_log.reports_pending == 1


def test_a_field_report_follows(decision_log, engine):
    for step in range(80):
        engine.observe(frame(step, loss=20.0 if step in (40, 41) else 1.0))
    report = OutcomeReports().report(*entries(decision_log, DueReport))
    assert (report.decision, report.outcome) == ("run/0/41", "improved")


def test_a_silence_does_not_take_the_place_of_the_decision_before_it(engine):
    quiet = "- {id: quiet, metric: step, missing_for: 5, severity: HIGH, action: CONTINUE}"
    table = parse(TableSource("test", f"{RULES}  {quiet}\n".encode()))
    sampled = DecisionLog(trace_every=1)
    engine = Engine(table, observer=sampled)
    for step in range(80):
        last = frame(step, loss=20.0 if step in (40, 41) else 1.0)
        engine.observe(last)
        if step == 41:
            engine.tick(last.time_unix_nano + 3600 * 10**9)
    noted = sampled.make_entries(10_000, 0.0)
    about_41 = [each for each in noted if isinstance(each, Decided) and each.step == 41]
    assert [(each.action, each.findings[0].rule) for each in about_41] == [
        ("PAUSE", "high"),
        ("CONTINUE", "quiet"),
    ]
    (report,) = [each for each in noted if isinstance(each, DueReport)]
    assert (report.decision, report.action) == ("run/0/41", "PAUSE")


def test_counts_are_of_everything(decision_log, engine):
    for step in (0, 1, 5, 6):
        engine.observe(frame(step, loss=1.0, loss_delta=2.0 if step == 6 else 0.0))
    decision_log.make_entries(10_000, 0.0)
    assert decision_log.missed == 3
    assert decision_log.decisions == {
        ("CONTINUE", "NORMAL", "nominal"): 3,
        ("OPTIMIZER", "WARNING", "rising"): 1,
    }


def test_a_sample_of_what_is_nominal_can_be_noted_as_well(engine):
    sampled = DecisionLog(trace_every=10)
    engine = Engine(engine.table, observer=sampled)
    for step in range(30):
        engine.observe(frame(step, loss=1.0))
    assert [entry.step for entry in entries(sampled, Decided)] == [0, 10, 20]


def test_it_writes_a_little_at_a_time_and_holds_only_so_much(decision_log, engine):
    for step in range(MAX_QUEUED):
        engine.observe(frame(step, loss=1.0))
    assert decision_log.waiting == MAX_QUEUED
    assert decision_log.dropped > 0
    decision_log.make_entries(32, 0.0)
    assert decision_log.waiting == MAX_QUEUED - 32


def test_a_restarted_process_does_not_inherit_since_when(decision_log, engine):
    for step in range(5):
        engine.observe(frame(step, loss=20.0 if step > 2 else 1.0))
    engine.observe(frame(0, instance="two", loss=20.0))
    engine.observe(frame(1, instance="two", loss=20.0))
    messages = entries(decision_log, Decided)
    assert (messages[-1].id, messages[-1].instance) == ("run/0/1", "two")
    (high,) = messages[-1].findings
    assert (high.pending_since, high.firing_since) == (0, 1)
    assert decision_log.missed == 0


def test_a_rule_that_fires_again_fires_since_then(decision_log, engine):
    for step, loss in enumerate([20.0, 20.0, None, 20.0]):
        engine.observe(frame(step, **({} if loss is None else {"loss": loss})))
    (high,) = entries(decision_log, Decided)[-1].findings
    assert high.pending_since <= high.firing_since == 3


def test_a_restarted_process_does_not_inherit_what_was_silenced(decision_log):
    rules = RULES.replace("severity: HIGH", "severity: HIGH, inhibits: [rising]")
    engine = Engine(parse(TableSource("test", rules.encode())), observer=decision_log)
    for step in range(2):
        engine.observe(frame(step, loss=20.0, loss_delta=2.0))
    for step in range(2):
        engine.observe(frame(step, instance="two", loss=20.0))
    old, new = entries(decision_log, Decided)[-2:]
    assert [(each.rule, each.by) for each in old.silenced] == [("rising", "high")]
    assert (new.instance, new.silenced) == ("two", [])


@pytest.mark.parametrize(("rules", "has"), [(10, True), (MAX_CONDITIONS + 1, False)])
def test_a_table_fits_one_message_to_the_journal_writer(rules, has):
    row = "{id: r%d, metric: loss, above: 10, severity: HIGH, action: PAUSE}"
    text = "version: t\nrules:\n" + "".join(f"- {row % place}\n" for place in range(rules))
    entry = table_entry(parse(TableSource("test", text.encode())), "t.yaml")
    assert {rule.condition is not None for rule in entry.rules} == {has}
    assert len(pack([entry])) < MAX_MESSAGE


NOTICES = """
version: test
rules:
  - {id: told, metric: loss, above: 10, severity: WARNING, action: CONTINUE, text: Told.}
  - {id: tried, metric: loss, above: 30, mode: observe, severity: HIGH, action: PAUSE}
"""


def noticed(decision_log, losses, **of):
    engine = Engine(parse(TableSource("test", NOTICES.encode())), observer=decision_log)
    for step, loss in enumerate(losses):
        engine.observe(frame(step, loss=loss, **of))
    return [
        (entry.step, [found.rule for found in entry.findings])
        for entry in entries(decision_log, Decided)
    ]


def test_a_notice_is_noted_once_for_as_long_as_it_is_repeated(decision_log):
    losses = [1.0, 20.0, 20.0, 40.0, 40.0, 20.0, 1.0, 20.0, 1.0]
    assert noticed(decision_log, losses) == [
        (1, ["told"]),
        (3, ["told", "tried"]),
        (5, ["told"]),
        (7, ["told"]),
    ]
    assert decision_log.reports_pending == 4


def test_another_process_has_notices_of_its_own(decision_log):
    assert noticed(decision_log, [1.0, 20.0, 20.0]) == [(1, ["told"])]
    engine = Engine(parse(TableSource("test", NOTICES.encode())), observer=decision_log)
    engine.observe(frame(2, loss=20.0, instance="two"))
    (entry,) = entries(decision_log, Decided)
    assert (entry.instance, entry.step) == ("two", 2)


def test_a_notice_has_a_report(decision_log):
    engine = Engine(parse(TableSource("test", NOTICES.encode())), observer=decision_log)
    for step in range(80):
        loss = 20.0 if step == 40 else 1.0
        engine.observe(frame(step, loss=loss, lr_scale=1.0))
    report = OutcomeReports().report(*entries(decision_log, DueReport))
    assert (report.decision, report.outcome) == ("run/0/40", "came_back")
    assert (report.action, report.rule, report.saw) == ("CONTINUE", "told", {"loss": 20.0})
