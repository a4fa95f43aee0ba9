"""Decisions at a glance are those of judging, on any history and with any table."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from esper_otel.leyline.decisions import Proposal, SeedOperation
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.guards import AskGuards, plan
from esper_tamiyo.judging.history import History, Watched
from esper_tamiyo.language.table_file import TableSource, load, parse
from esper_tamiyo.serving.connection import Trainer
from sidecar.frames_made import frame, hello_of, runs, set_client
from sidecar.records_made import KNOWN_AFTER, record_tables, steady

PROPOSAL = Proposal("s7", SeedOperation.BLEND)

TABLES = {name: load(name) for name in ("default", "prototype")} | {
    "short": parse(
        TableSource(
            "short",
            b"""
version: short
baseline: {window: 4, warmup: 2}
conservative: {clean_steps: 2}
rules:
  - {id: low, metric: loss, below: 0.1, for: 2, severity: HIGH, action: OPTIMIZER}
  - {id: least, metric: accuracy, at_most: 0.0, severity: HIGH, action: CONTINUE}
  - {id: jump, metric: loss, above_baseline: 2, cooldown: 3, severity: HIGH, action: PAUSE,
     conservative: true}
  - {id: rise, metric: grad_var, rises_by: 0.1, severity: WARNING, action: OPTIMIZER}
  - {id: same, metric: optimizer_lr, unchanged_for: 2, severity: WARNING, action: OPTIMIZER}
  - {id: risen, metric: loss, risen_for: 2, severity: WARNING, action: OPTIMIZER}
  - {id: fallen, metric: grad_var, fallen_for: 2, severity: WARNING, action: OPTIMIZER}
  - {id: lost, metric: loss, nonfinite: true, severity: CRITICAL, action: PAUSE}
  - {id: seed, severity: HIGH, action: PAUSE, any: [
      {metric: kasmina.seed.alpha, above: 0.5}, {metric: kasmina.seed.stage, rises_by: 1}]}
""",
        )
    ),
    "language": parse(
        TableSource(
            "language",
            b"""
version: language
baseline: {window: 4, warmup: 2}
conservative: {clean_steps: 2}
rules:
  - {id: often, metric: loss, above: 0.15, release: 0.05, for: 2, of: 3, severity: HIGH,
     action: OPTIMIZER}
  - {id: sunk, metric: accuracy, below_baseline: 0.5, release: 0.9, severity: HIGH,
     action: PAUSE, conservative: true, inhibits: [often]}
  - {id: drift, metric: grad_var, above_baseline: 2, baseline: frozen, mode: observe,
     severity: HIGH, action: PAUSE}
  - {id: worst, metric: optimizer_lr, above_baseline: 1, baseline: highest, severity: WARNING,
     action: CONTINUE}
  - {id: gone, metric: samples_per_s, missing_for: 2, severity: WARNING, action: OPTIMIZER}
  - {id: out, metric: gpu_mem_free_gb, runs_out_within: 3, severity: HIGH, action: PAUSE}
  - {id: slow, metric: step_latency_ms, above_peers: 2, severity: HIGH, action: PAUSE}
  - {id: mixed, any: [{metric: forward_ms, below_peers: 0.5}, {metric: backward_ms, above: 50}],
     severity: HIGH, action: OPTIMIZER, for: 2, of: 2}
  - {id: conflict, metric: kasmina.seed.isolation.cosine, below: 0, severity: HIGH,
     action: PAUSE}
  - {id: quiet, metric: step, missing_for: 2, severity: HIGH, action: CONTINUE}
""",
        )
    ),
    "custom": parse(
        TableSource(
            "custom",
            b"""
version: custom
baseline: {window: 4, warmup: 2}
rules:
  - {id: high, metric: custom.a, above: 0.15, release: 0.05, severity: HIGH, action: PAUSE}
  - {id: jump, metric: custom.b, above_baseline: 2, severity: WARNING, action: OPTIMIZER}
  - {id: gone, metric: custom.a, missing_for: 2, severity: WARNING, action: CONTINUE}
  - {id: both, severity: HIGH, action: OPTIMIZER, all: [
      {metric: loss, above: 0.1}, {metric: custom.b, rises_by: 0.05}]}
  - {id: either, severity: HIGH, action: OPTIMIZER, any: [
      {metric: grad_var, above: 50}, {metric: custom.a, unchanged_for: 2}]}
""",
        )
    ),
}
ANY_TABLE = st.sampled_from(sorted(TABLES))
PROPOSALS = st.none() | st.just(PROPOSAL)


class Ledger:
    """An observer that writes all down."""

    def __init__(self):
        self.told = []

    def on_rule_change(self, change):
        self.told.append(change)

    def on_frame(self, frame, decision):
        self.told.append((frame, decision))

    def on_decision(self, decision, frame):
        self.told.append((decision, frame))


@given(
    ANY_TABLE,
    st.lists(
        st.tuples(
            runs(max_size=1), PROPOSALS, st.integers(0, 1), st.sampled_from([0, 1, 2, 20])
        ),
        max_size=40,
    ),
)
def test_a_glance_says_what_judging_says(table, steps):
    """Glance and settle together are observe, on any history of one rank or two."""
    a_glance_is_judging(TABLES[table], steps)


NEAR = st.sampled_from([0.2, 0.9, 1.0, 1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 40.0])


@given(
    record_tables(),
    st.lists(st.tuples(NEAR, NEAR, st.sampled_from([0.105, 0.11, 0.12, 0.5])), max_size=40),
)
def test_a_glance_at_records_that_are_known_says_what_judging_says(table, steps):
    """Also within an excursion, at its end, and behind it."""
    values = [
        {"loss": loss, "gradient_norm": 2 * norm, "optimizer_lr": rate, "nonfinite": 0.0}
        for loss, norm, rate in steps
    ]
    made = [frame(step, **one) for step, one in enumerate(values, KNOWN_AFTER)]
    drawn = [((one,), None, 0, 1) for one in made]
    a_glance_is_judging(table, drawn, steady(KNOWN_AFTER), ranks=1)


def a_glance_is_judging(table, steps, before=(), ranks=2):
    books = Ledger(), Ledger()
    glancing, judging = (Engine(table, observer=book) for book in books)
    for one in before:
        assert glancing.observe(one) == judging.observe(one)
    now = 0
    for step, ((made,), proposal, rank, seconds) in enumerate(steps):
        now += seconds * 1_000_000_000
        values = {key: value for key, value in made.values.items() if key != "step"}
        one = frame(len(before) + step // ranks, made.seeds, rank=rank, **values)
        one = structs.replace(one, time_unix_nano=now + step)
        trainer = Trainer(hello_of(one))
        ask = set_client(one, proposal)
        judged = judging.observe(one, proposal)
        glanced = glancing.decide_fast(trainer.key, trainer.instance, ask)
        if glanced is None:
            assert glancing.observe(trainer.frame_of_ask(ask), proposal) == judged
        else:
            assert glanced == judged
            glancing.commit(trainer.frame_of_ask(ask), glanced)
        assert glancing.latest("run", rank) == judging.latest("run", rank)
    assert glancing.overview() == judging.overview()
    assert books[0].told == books[1].told


def test_a_steady_run_is_answered_at_a_glance():
    deciding = Engine(load("default"))
    glances = 0
    for step in range(100):
        one = frame(
            step,
            loss=1.0 - 0.0001 * step,
            loss_delta=-0.0001,
            loss_volatility=0.05,
            gradient_norm=1.0,
            optimizer_lr=0.1,
            optimizer_momentum=0.9,
            lr_scale=1.0,
            nonfinite=0.0,
        )
        trainer = Trainer(hello_of(one))
        ask = set_client(one)
        glanced = deciding.decide_fast(trainer.key, trainer.instance, ask)
        glances += glanced is not None
        if glanced is None:
            deciding.observe(one)
        else:
            deciding.commit(one, glanced)
    assert glances == 99  # all but the one that made the run known


def test_of_several_factors_of_one_reference_the_one_crossed_first_is_a_guard():
    rules = (
        "above_baseline: 5",
        "above_baseline: 3",
        "above_baseline: 4, baseline: highest",
        "below_baseline: 0.2",
        "below_baseline: 0.5",
        "above_record: 2",
        "above_record: 1",
        "above_record: 1.5, rising: true",
        "below_record: 3",
        "below_record: 2",
    )
    lines = [
        f"  - {{id: r{place}, metric: loss, {rule}, severity: HIGH, action: PAUSE}}"
        for place, rule in enumerate(rules)
    ]
    text = "\n".join(["version: several", "rules:", *lines])
    made = plan(parse(TableSource("several", text.encode())))
    assert [each.number for each in made.moving] == [3, 4, 0.5, 1, 1.5, 2]


def test_guards_of_a_table_without_conditions_on_steps_cross_nothing():
    seeds_only = parse(
        TableSource(
            "t",
            b"version: t\nrules: [{id: a, metric: kasmina.seed.alpha, above: 1, "
            b"severity: HIGH, action: PAUSE}]",
        )
    )
    assert not AskGuards(plan(seeds_only), History(Watched())).crossed([1e9] * 31)


@given(runs(), st.randoms(use_true_random=False))
def test_second_copies_and_late_ones_change_no_decision(frames, rng):
    plain, disturbed = Engine(TABLES["short"]), Engine(TABLES["short"])
    for place, one in enumerate(frames):
        expected = plain.observe(one)
        assert disturbed.observe(one) == expected
        disturbed.observe(frames[rng.randint(0, place)])
        assert disturbed.latest("run") == expected
