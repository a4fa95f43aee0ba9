"""Another table without a restart: what is the same goes on as if nothing had happened."""

from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.decisions import NOMINAL
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import TableSource, load, parse
from sidecar.frames_made import frame, runs

KEPT = "id: kept, metric: loss, above: 1, for: 3"
SLOW = "id: slow, metric: loss, above_baseline: 2"
SEEDS = "id: seeds, metric: kasmina.seed.alpha, above: 0.5, for: 3"


class Ledger:
    def __init__(self):
        self.changes = []

    def on_rule_change(self, change):
        self.changes.append((change.rule, change.step, change.before, change.after))

    def on_frame(self, frame, decision):
        pass

    on_decision = on_frame


def table(*rules, top="", version="t"):
    lines = [f"  - {{{rule}, severity: HIGH, action: PAUSE}}" for rule in rules]
    text = "\n".join([f"version: {version}", top, "rules:", *lines])
    return parse(TableSource("t", text.encode()))


def reasons(engine, losses, start=0):
    return [
        engine.observe(frame(step, loss=loss)).reason for step, loss in enumerate(losses, start)
    ]


def test_a_rule_that_is_the_same_keeps_counting_wherever_it_stands():
    engine = Engine(table(KEPT, "id: other, metric: accuracy, above: 1"))
    reasons(engine, [2.0, 2.0])
    report = engine.reload(table("id: new, metric: grad_var, above: 1", KEPT, version="u"))
    assert reasons(engine, [2.0], start=2) == ["kept"]
    assert (report.kept, report.changed) == (("kept",), ())
    assert (report.added, report.removed) == (("new",), ("other",))
    assert report.before.startswith("t+")
    assert report.version == engine.table.version
    assert report.baselines_kept


def test_a_rule_that_differs_in_any_field_begins_anew():
    engine = Engine(table(KEPT))
    reasons(engine, [2.0, 2.0])
    report = engine.reload(table(f"{KEPT}, text: Other words."))
    assert reasons(engine, [2.0], start=2) == [NOMINAL]
    assert (report.kept, report.changed) == ((), ("kept",))


def test_cool_downs_and_releases_go_on():
    rule = "id: a, metric: loss, above: 3, release: 1, cooldown: 4"
    engine = Engine(table(rule))
    assert reasons(engine, [4.0, 2.0]) == ["a", NOMINAL]
    engine.reload(table(rule, KEPT))
    assert reasons(engine, [2.0, 2.0, 2.0, 2.0, 0.5], start=2) == [
        *(NOMINAL, NOMINAL, "kept", "a", NOMINAL)
    ]


def test_baselines_go_on_unless_their_window_changed():
    top = "baseline: {window: 8, warmup: 4}"
    engine = Engine(table(SLOW, top=top))
    reasons(engine, [1.0] * 4)
    engine.reload(table(KEPT, SLOW, top=top))
    assert reasons(engine, [2.5], start=4) == ["slow"]
    report = engine.reload(table(KEPT, SLOW, top="baseline: {window: 9, warmup: 4}"))
    assert not report.baselines_kept
    assert reasons(engine, [9.0] * 4, start=5)[0] == NOMINAL
    assert reasons(engine, [99.0], start=9) == ["kept"]


def test_a_frozen_baseline_stays_frozen():
    rule = "id: a, metric: loss, above_baseline: 2, baseline: frozen"
    top = "baseline: {window: 2, warmup: 1}"
    engine = Engine(table(rule, top=top))
    reasons(engine, [1.0] * 3)
    engine.reload(table(rule, KEPT, top=top))
    assert reasons(engine, [1.9] * 9 + [2.1], start=3)[-1] in ("a", "kept")
    assert "a" in {finding.rule for finding in engine.latest("run").findings}


def test_seeds_keep_theirs():
    engine = Engine(table(SEEDS))
    seeds = {"x": {"kasmina.seed.alpha": 0.9}}
    engine.observe(frame(0, seeds))
    engine.observe(frame(1, seeds))
    engine.reload(table(KEPT, SEEDS))
    assert engine.observe(frame(2, seeds)).target_seed == "x"


def test_conservative_mode_goes_on():
    engine = Engine(table("id: a, metric: loss, above: 1, conservative: true"))
    reasons(engine, [2.0])
    engine.reload(table(KEPT))
    assert engine.observe(frame(1, loss=0.0)).conservative


def test_a_rule_that_is_gone_while_it_fires_is_told():
    ledger = Ledger()
    rule = "id: a, metric: loss, above: 1"
    engine = Engine(table(rule, KEPT), observer=ledger)
    reasons(engine, [2.0])
    engine.reload(table(KEPT))
    engine.tick(0)  # without a frame of its own, a rank goes over with the clock
    assert ledger.changes[-1] == ("a", 0, "firing", "unknown")


def test_of_many_silent_ranks_some_go_over_with_each_tick():
    ledger = Ledger()
    engine = Engine(table("id: a, metric: loss, above: 1", KEPT), observer=ledger)
    for rank in range(20):
        engine.observe(StepFrame("r", "i", rank, 0, 1, {"loss": 2.0}))
    engine.reload(table(KEPT))
    gone = []
    for _ in range(4):
        before = len(ledger.changes)
        engine.tick(0)
        gone.append(len(ledger.changes) - before)
    assert gone == [8, 8, 4, 0]


TABLES = {name: load(name) for name in ("default", "prototype")}


@given(runs(), st.sets(st.integers(0, 30)), st.sampled_from(sorted(TABLES)))
def test_the_same_table_again_changes_no_decision(frames, reloads, name):
    steady, reloading = Engine(TABLES[name]), Engine(TABLES[name])
    for place, one in enumerate(frames):
        if place in reloads:
            report = reloading.reload(TABLES[name])
            assert len(report.kept) == len(steady.table.rules)
        assert reloading.observe(one) == steady.observe(one)
    assert reloading.overview() == steady.overview()
