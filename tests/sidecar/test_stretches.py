"""A stretch is only quicker: what is judged in one is what judging step by step gives."""

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from esper_otel.leyline.decisions import Proposal, SeedOperation
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.wire import SilenceRequest
from esper_tamiyo.journaling.decision_log import DecisionLog
from esper_tamiyo.journaling.entries import Decided
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.history import History, Watched
from esper_tamiyo.judging.observations import Last, RollingMedian, Slope
from esper_tamiyo.judging.saved_state import put_rank_back, saved_rank
from esper_tamiyo.language.table_file import TableSource, load, parse
from esper_tamiyo.serving.connection import Trainer
from sidecar.frames_made import hello_of, set_client

SECOND = 1_000_000_000

LANGUAGE = """
version: %s
baseline: {window: %d, warmup: 6}
record: {window: 16, warmup: 8, false_alarm_steps: 100}
conservative: {clean_steps: 3}
rules:
  - {id: often, metric: loss, above: 1.6, release: 1.3, for: 2, of: 3, severity: HIGH,
     action: OPTIMIZER}
  - {id: sunk, metric: accuracy, below_baseline: 0.5, release: 0.9, severity: HIGH,
     action: PAUSE, conservative: true, inhibits: [often]}
  - {id: drift, metric: grad_var, above_baseline: 2, baseline: frozen, mode: observe,
     severity: HIGH, action: PAUSE}
  - {id: best, metric: loss, below_baseline: 0.9, baseline: lowest, severity: WARNING,
     action: CONTINUE, cooldown: 4}
  - {id: worst, metric: optimizer_lr, above_baseline: 1, baseline: highest, severity: WARNING,
     action: CONTINUE}
  - {id: gone, metric: samples_per_s, missing_for: 3, severity: WARNING, action: OPTIMIZER}
  - {id: out, metric: gpu_mem_free_gb, runs_out_within: 20, severity: HIGH, action: PAUSE}
  - {id: slow, metric: step_latency_ms, above_peers: 1.5, for: 2, severity: HIGH,
     action: PAUSE}
  - {id: mixed, for: 2, of: 2, severity: HIGH, action: OPTIMIZER, any: [
      {metric: forward_ms, below_peers: 0.5}, {metric: backward_ms, above: 50}]}
  - {id: beyond, metric: loss, above_record: 1, for: 2, of: 3, severity: WARNING,
     action: CONTINUE}
  - {id: rising, severity: HIGH, action: OPTIMIZER, all: [
      {metric: loss, above_record: 1.5, rising: true}, {metric: loss, above_baseline: 1}]}
  - {id: below, metric: gradient_norm, below_record: 1, severity: WARNING, action: CONTINUE}
  - {id: same, metric: loss, unchanged_for: 4, severity: WARNING, action: CONTINUE}
  - {id: still, metric: accuracy, unchanged_for: 400, severity: WARNING, action: CONTINUE}
  - {id: leaks, metric: kasmina.isolation.violations, rises_by: 1, severity: HIGH,
     action: PAUSE}
  - {id: up, metric: loss, risen_for: 9, severity: WARNING, action: CONTINUE, cooldown: 3}
  - {id: down, metric: accuracy, fallen_for: 12, severity: HIGH, action: OPTIMIZER}
  - {id: odd, nonfinite: true, severity: CRITICAL, action: PAUSE, conservative: true}
  - {id: lost, metric: gradient_norm, nonfinite: true, severity: WARNING, action: CONTINUE}
  - {id: under, metric: loss_delta, above_baseline: 3, baseline_of: loss_volatility,
     severity: WARNING, action: CONTINUE}
  - {id: signs, severity: WARNING, action: CONTINUE, any: [
      {metric: grad_var, below_baseline: 0.2}, {metric: loss_delta, at_most: -3},
      {metric: accuracy, above: 2}]}
  - {id: mine, metric: custom.a, above_baseline: 2, severity: WARNING, action: CONTINUE}
  - {id: stalled, severity: WARNING, action: CONTINUE, all: [
      {metric: kasmina.seed.stage, unchanged_for: 250}, {metric: kasmina.seed.alpha, above: 0}]}
  - {id: heavy, metric: kasmina.seed.last_kernel_latency_ms, above_baseline: 0.5,
     baseline_of: step_latency_ms, for: 2, severity: WARNING, action: PAUSE}
  - {id: conflict, metric: kasmina.seed.isolation.cosine, below: -0.5, release: 0,
     severity: HIGH, action: PAUSE}
  %s
  - {id: quiet, metric: step, missing_for: 3, severity: HIGH, action: CONTINUE}
"""
MIXES = """
  - {id: blend, severity: WARNING, action: CONTINUE, all: [
      {metric: kasmina.seed.alpha, above_record: 1}, {metric: loss, above_baseline: 1.1}]}
"""


def table(name, window, more=""):
    return parse(TableSource(name, (LANGUAGE % (name, window, more)).encode()))


TABLES = {
    "short": table("short", 10),
    "long": table("long", 17, MIXES),
    "default": load("default"),
}


class Ledger:
    """An observer that writes all down, and has the decision log make entries of it."""

    def __init__(self):
        self.told = []
        self.entries = []
        self.log = DecisionLog(trace_every=7)

    def on_rule_change(self, change):
        self.told.append(change)
        self.log.on_rule_change(change)

    def on_frame(self, frame, decision):
        self.told.append((frame, decision))
        self.log.on_frame(frame, decision)

    def on_decision(self, decision, frame):
        self.told.append((decision, frame))
        self.log.on_decision(decision, frame)

    def on_end(self, frame):
        self.told.append(frame)
        self.log.on_end(frame)

    def journal(self):
        """All entries so far, but for when they were made, and what was counted."""
        for entry in self.log.make_entries(self.log.waiting, 0.0):
            timeless = {"decided_unix_nano": 0, "took_ms": 0.0}
            is_decision = isinstance(entry, Decided)
            self.entries.append(replace(entry, **timeless) if is_decision else entry)
        log = self.log
        return self.entries, log.decisions, log.missed, log.dropped, log.reports_pending


class Both:
    """The same for two engines, one of which has stretches."""

    def __init__(self, table):
        self.ledgers = Ledger(), Ledger()
        self.quick, self.plain = (Engine(table, observer=each) for each in self.ledgers)
        self.plain._book.together = 0
        self.steps = self.together = 0

    def stream(self, frame):
        self.steps += 1
        assert self.quick.observe(frame) == self.plain.observe(frame)
        state = self.quick.roster.ranks.get((frame.run, frame.rank))
        self.together += state is not None and state.stretch.behind

    def ask(self, frame, proposal=None):
        """As the server does: at a glance where that is possible."""
        trainer = Trainer(hello_of(frame))
        found = []
        for engine in (self.quick, self.plain):
            ask = set_client(frame, proposal)
            decision = engine.decide_fast(trainer.key, trainer.instance, ask)
            found.append(decision)
            asked = trainer.frame_of_ask(ask)
            if decision is None:
                found.append(engine.observe(asked, proposal, asked=True))
            else:
                engine.commit(asked, decision)
        assert found[: len(found) // 2] == found[len(found) // 2 :]

    def check(self, frame):
        assert self.quick.check(frame) == self.plain.check(frame)
        key = (frame.run, frame.rank)
        guards = [each.update_guards(key, frame.instance) for each in (self.quick, self.plain)]
        assert [one and [bound() for _, bound in one.moving] for one in guards[:1]] == [
            one and [bound() for _, bound in one.moving] for one in guards[1:]
        ]

    def tick(self, now_ns):
        self.quick.tick(now_ns)
        self.plain.tick(now_ns)

    def reload(self, table):
        assert self.quick.reload(table) == self.plain.reload(table)
        self.plain._book.together = 0

    def silence(self, rule, steps):
        request = SilenceRequest("run", rule, steps)
        assert self.quick.silence(request) == self.plain.silence(request)

    def saved(self, key):
        return saved_rank(self.quick, key), saved_rank(self.plain, key)

    def are_alike(self):
        quick, plain = self.ledgers
        assert quick.told == plain.told
        assert quick.journal() == plain.journal()
        for key in list(self.plain.roster.ranks):
            mine, others = self.saved(key)
            assert mine == others
        assert self.quick.overview() == self.plain.overview()


def steady(draw, step, rank, mood):
    """The values of a step of a healthy run, all with some noise but for what stands still."""
    noise = draw.gauss
    free = 40.0 - 0.01 * step + 0.001 * draw.random()
    values = {
        "step": float(step),
        "loss": 1.0 + (0.0 if mood == "constant" else noise(0, 0.05)),
        "gradient_norm": 2.0 + noise(0, 0.1),
        "loss_delta": noise(0, 0.3),
        "loss_volatility": 0.3 + noise(0, 0.02),
        "accuracy": 0.5,
        "optimizer_lr": 0.1 * 0.999**step if mood == "falling" else 0.1,
        "optimizer_momentum": 0.9,
        "samples_per_s": 100.0 + noise(0, 1),
        "step_latency_ms": 10.0 + noise(0, 0.5) + (8.0 if mood == "slow" and rank else 0.0),
        "forward_ms": 3.0 + noise(0, 0.2),
        "backward_ms": 5.0,
        "grad_var": 0.2 + noise(0, 0.01),
        "gpu_mem_free_gb": free if mood != "leak" else max(0.5, 40.0 - 0.5 * step),
        "kasmina.isolation.violations": 0.0,
        "kasmina.apply_ms": 0.0,
        "hook_latency_ms": 0.2 + 0.01 * draw.random(),
        "nonfinite": 0.0,
    }
    if mood == "rare":
        del values["samples_per_s"]
    if mood == "custom":
        values["custom.a"] = 1.0 + 0.1 * draw.random()
    if mood == "below zero":
        values["loss"] -= 5.0
    return values


def disturbed(draw, values):
    """The same with one thing out of the ordinary."""
    key = draw.choice([*values][1:])
    what = draw.randrange(6)
    if what == 0:
        del values[key]
    elif what == 1:
        values[key] *= draw.choice([-1.0, 0.0, 1.3, 1.8, 2.5, 10.0, 1e6, 1e300])
    elif what == 2:
        values["loss"] = draw.choice([0.2, 1.15, 1.3, 1.7, 3.0, 1e308, -1e308])
    elif what == 3:
        del values[key]
        values["nonfinite"] = 1.0
    elif what == 4:
        values["kasmina.isolation.violations"] = float(draw.randrange(3))
    else:
        values["phase"] = float(draw.randrange(2))
    return values


def seed_values(draw, mood):
    values = {
        "kasmina.seed.stage": 3.0 + (draw.random() < 0.005),
        "kasmina.seed.alpha": 0.5 if mood == "constant" else draw.random(),
        "kasmina.seed.last_kernel_latency_ms": 0.3 if draw.random() < 0.99 else 6.0,
        "kasmina.seed.isolation.dot": draw.gauss(0, 0.1),
        "kasmina.seed.isolation.host_norm": 1.0,
        "kasmina.seed.isolation.seed_norm": 0.5,
        "kasmina.seed.fallback_used": 0.0,
        "kasmina.seed.kernel_attached": 1.0,
    }
    if draw.random() < 0.005:
        del values[draw.choice([*values])]
    return values


MOODS = ["", "", "", "constant", "falling", "slow", "rare", "custom", "leak", "below zero"]

PASSAGES = st.lists(
    st.tuples(
        st.sampled_from(["stream"] * 6 + ["ask", "mixed"]),
        st.sampled_from([1, 5, 30, 60, 90]),
        st.sampled_from(MOODS),
        st.sampled_from([0.0, 0.0, 0.01, 0.05]),  # share of steps with something odd
        st.sampled_from([0, 0, 0, 1, 2]),  # seeds
        st.sampled_from([0.01, 0.3, 1.0, 20.0]),  # seconds between steps
        st.sampled_from(
            [
                *("", "", "", "reload", "silence", "tick"),
                *("restart", "check", "other_process", "gap"),
            ]
        ),
    ),
    min_size=1,
    max_size=8,
)


class Passage:
    """Goes through passages of a run, and lets things happen between them."""

    def __init__(self, both, tables, draw, ranks):
        self.both, self.tables, self.draw, self.ranks = both, tables, draw, ranks
        self.step, self.now, self.instance, self.reloads = 0, SECOND, 0, 0

    def go(self, how, count, mood, odd, seeds, pause_s, event):
        for _ in range(count):
            self.now += int(pause_s * SECOND)
            for rank in range(self.ranks):
                self.tell(rank, how, mood, odd, seeds)
            self.step += 1
        getattr(self, event or "nothing")()
        self.both.are_alike()

    def tell(self, rank, how, mood, odd, seeds):
        draw, both = self.draw, self.both
        values = steady(draw, self.step, rank, mood)
        if draw.random() < odd:
            values = disturbed(draw, values)
        grown = {f"s{place}": seed_values(draw, mood) for place in range(seeds)}
        made = self.frame(rank, values, grown)
        if how == "ask" or (how == "mixed" and draw.random() < 0.3):
            if draw.random() < 0.5:
                both.check(made)
            both.ask(made, draw.choice([None, Proposal("s0", SeedOperation.BLEND)]))
        else:
            both.stream(made)
        if draw.random() < 0.05:
            both.stream(made)  # it comes twice

    def frame(self, rank, values, seeds=None):
        whose = ("run", f"i{self.instance}", rank, self.step, self.now + rank)
        return StepFrame(*whose, values, seeds or {})

    def nothing(self):
        pass

    def reload(self):
        self.reloads += 1
        self.both.reload(self.tables[self.reloads % len(self.tables)])

    def silence(self):
        rules = [rule.id for rule in self.both.quick.table.rules]
        self.both.silence(self.draw.choice(rules), self.draw.choice([None, 5]))

    def tick(self):
        self.now += 100 * SECOND
        self.both.tick(self.now)

    def restart(self):
        for key in list(self.both.plain.roster.ranks):
            saved, others = self.both.saved(key)
            assert saved == others
            heard = self.both.plain.roster.ranks[key].pace.heard_ns
            for engine in (self.both.quick, self.both.plain):
                put_rank_back(saved, engine, key, heard)

    def check(self):
        self.both.check(self.frame(0, {"loss": 9.0}))

    def other_process(self):
        self.instance += 1

    def gap(self):
        self.step += self.draw.choice([1, 3, 70])


@settings(max_examples=60)
@given(st.permutations(sorted(TABLES)), PASSAGES, st.integers(0, 1 << 30), st.integers(1, 3))
def test_steps_in_a_stretch_are_judged_as_each_alone(names, passages, seed, ranks):
    tables = [TABLES[name] for name in names]
    passage = Passage(Both(tables[0]), tables, Random(seed), ranks)
    for one in passages:
        passage.go(*one)


@pytest.mark.parametrize("name", sorted(TABLES))
@pytest.mark.parametrize(("ranks", "seeds"), [(1, 0), (1, 2), (3, 0)])
def test_most_steps_of_a_healthy_run_are_in_a_stretch(name, ranks, seeds):
    both = Both(TABLES[name])
    passage = Passage(both, [TABLES[name]], Random(7), ranks)
    passage.go("stream", 110, "", 0.0, seeds, 0.3, "")
    both.steps = both.together = 0
    passage.go("stream", 90, "", 0.0, seeds, 0.3, "")
    assert both.together > 0.4 * both.steps


def test_a_run_of_values_does_not_end_a_stretch_before_it_is_long():
    """``risen_for: 8`` leaves room for seven; values beyond the end come one in five."""
    engine = Engine(
        parse(
            TableSource(
                "up",
                b"""
version: up
baseline: {window: 64, warmup: 6}
rules: [{id: up, metric: loss, risen_for: 8, severity: WARNING, action: CONTINUE}]
""",
            )
        )
    )
    draw = Random(3)
    carried = []
    for step in range(400):
        values = {"step": float(step), "loss": draw.gauss(1.0, 0.05)}
        engine.observe(StepFrame("run", "one", 0, step, SECOND + step * SECOND, values))
        carried.append(engine._runs["run", 0].stretch._left)
    assert max(carried) >= engine._book.together - 1
    assert sum(left > 0 for left in carried[200:]) > 150
    for step in range(400, 407):
        values = {"step": float(step), "loss": 2.0}
        engine.observe(StepFrame("run", "one", 0, step, SECOND + step * SECOND, values))
        assert not engine._runs["run", 0].acting
    engine.observe(StepFrame("run", "one", 0, 407, 408 * SECOND, {**values, "step": 407.0}))
    assert engine._runs["run", 0].acting


NUMBERS = st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, -1.0, 7.0]), max_size=40)


@given(NUMBERS, st.lists(st.integers(1, 9), max_size=12), st.integers(2, 9))
def test_rows_of_observations_are_as_one_after_the_other(values, cuts, window):
    alone = RollingMedian(window, 2), Last(), Slope(window, 3)
    rows = RollingMedian(window, 2), Last(), Slope(window, 3)
    for cut in [*cuts, 40]:
        row, values = values[:cut], values[cut:]
        if not row:
            break
        spans = rows[0].range_in(len(row)), rows[0].range_on_the_way(row)
        for value in row:
            for one in alone:
                one.add(value)
            for low, high in filter(None, spans):
                assert low <= alone[0].value <= high
        for one in rows:
            one.add_row(row)
        for one, other in zip(alone, rows, strict=True):
            for field in ("value", "_ordered", "_arrived", "repeats", "total", "_values"):
                assert getattr(one, field, None) == getattr(other, field, None), field


def test_a_slope_is_told_by_its_floor():
    slope = Slope(8, 0)
    for value in (50.0, 49.0, 50.0, 49.5, 49.0, 49.0, 49.5, 49.0):
        slope.add(value)
    floor = slope.floor(51.0, 10.0)
    assert 0 < floor < 49
    for value in (floor, 51.0, floor, floor, 50.0, floor, floor, floor, floor, floor):
        assert slope.within(value, 10.0) is False
        slope.add(value)
    assert slope.within(floor / 2, 10.0) is True


def test_nothing_is_put_off_of_metrics_that_are_not_watched():
    past = History(Watched(lasts=("loss",)))
    past.absorb_together({"loss": [1.0, 2.0]}, 2)
    past.absorb_together({}, 3)
    last = past.lasts["loss"]
    assert (last.value, last.total, last.missed) == (2.0, 2, 3)
    assert past.put_off == ("loss",)
    assert msgspec.to_builtins(past.own_excursions) == ()
