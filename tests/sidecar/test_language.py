"""Rules at work in the engine: seeds, ranks, inhibition, trials, silence, observers."""

import pytest
from msgspec import structs

from esper_otel.leyline.decisions import NOMINAL, Action, Proposal, SeedOperation
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.liveness import FLOOR_NS
from esper_tamiyo.judging.observer import RuleState
from esper_tamiyo.language.table_file import TableSource, parse
from sidecar.frames_made import frame

ALPHA, STAGE = "kasmina.seed.alpha", "kasmina.seed.stage"
PROPOSAL = Proposal("s7", SeedOperation.BLEND)
SECOND = 1_000_000_000


class Ledger:
    """An observer that writes all down."""

    def __init__(self):
        self.changes = []
        self.decisions = []
        self.frames = []

    def on_rule_change(self, change):
        self.changes.append(change)

    def on_frame(self, frame, decision):
        self.frames.append((frame.step, decision.reason))

    def on_decision(self, decision, frame):
        self.decisions.append((decision.step, decision.reason))

    def told(self, rule):
        """(step, before, after, seed) of each change of ``rule`` after the first."""
        return [
            (change.step, change.before.value, change.after.value, change.seed_id)
            for change in self.changes
            if change.rule == rule and change.since_step >= 0
        ]


def table(*rules, top=""):
    """Each rule in YAML flow; HIGH and PAUSE unless said."""
    lines = []
    for rule in rules:
        fields = [rule]
        fields += ["severity: HIGH"] if "severity:" not in rule else []
        fields += ["action: PAUSE"] if "action:" not in rule else []
        lines.append(f"  - {{{', '.join(fields)}}}")
    return parse(TableSource("t", "\n".join(["version: t", top, "rules:", *lines]).encode()))


def alphas(**values):
    return {seed: {ALPHA: value} for seed, value in values.items()}


def test_each_seed_persists_by_itself():
    engine = Engine(table(f"id: a, metric: {ALPHA}, above: 0.5, for: 2"))
    assert engine.observe(frame(0, alphas(x=0.9, y=0.1))).reason == NOMINAL
    assert engine.observe(frame(1, alphas(x=0.1, y=0.9))).reason == NOMINAL
    decision = engine.observe(frame(2, alphas(x=0.9, y=0.9)))
    assert (decision.reason, decision.target_seed) == ("a", "y")


def test_seeds_take_turns_while_others_cool_down():
    engine = Engine(table(f"id: a, metric: {ALPHA}, above: 0.5, cooldown: 2"))
    targets = [
        engine.observe(frame(step, alphas(x=0.9, y=0.1, z=0.9))).target_seed
        for step in range(6)
    ]
    assert targets == ["x", "z", None, "x", "z", None]


def test_a_seed_that_is_gone_is_unknown_and_begins_anew():
    ledger = Ledger()
    engine = Engine(table(f"id: a, metric: {ALPHA}, above: 0.5, for: 2"), observer=ledger)
    for step, seeds in enumerate([alphas(x=0.9), alphas(x=0.9), {}, alphas(x=0.9)]):
        engine.observe(frame(step, seeds))
    assert ledger.told("a") == [
        (1, "pending", "firing", "x"),
        (2, "firing", "unknown", "x"),
        (3, "unknown", "pending", "x"),
    ]


def test_conservative_mode_does_not_wait_for_a_seed_that_is_gone():
    engine = Engine(
        table(
            f"id: a, metric: {ALPHA}, above: 0.5, conservative: true",
            top="conservative: {clean_steps: 2}",
        )
    )
    modes = [
        engine.observe(frame(step, seeds)).conservative
        for step, seeds in enumerate([alphas(x=0.9), {}, {}, {}])
    ]
    assert modes == [True, True, False, False]


def test_a_rule_that_fired_and_is_unknown_is_not_over():
    engine = Engine(
        table(
            "id: a, metric: loss, above: 1, conservative: true",
            top="conservative: {clean_steps: 2}",
        )
    )
    losses = (2.0, None, None, None, 0.0, 0.0)
    told = [
        engine.observe(frame(step, **({} if loss is None else {"loss": loss})))
        for step, loss in enumerate(losses)
    ]
    assert [decision.reason for decision in told] == ["a", *[NOMINAL] * 5]
    assert [decision.conservative for decision in told] == [True] * 5 + [False]


def test_a_seed_s_metric_against_its_rank_s_baseline():
    key = "kasmina.seed.last_kernel_latency_ms"
    engine = Engine(
        table(
            f"id: a, metric: {key}, above_baseline: 0.5, baseline_of: step_latency_ms",
            top="baseline: {window: 4, warmup: 2}",
        )
    )
    for step in range(2):
        engine.observe(frame(step, {"x": {key: 9.0}}, step_latency_ms=10.0))
    decision = engine.observe(frame(2, {"x": {key: 5.1}}, step_latency_ms=99.0))
    assert decision.findings[0].values == {key: 5.1, "baseline(step_latency_ms)": 10.0}


@pytest.mark.parametrize(
    ("dot", "host", "seed", "cosine"),
    [
        (-0.6, 1.0, 1.0, -0.6),
        (-9.0, 1.0, 1.0, -1.0),  # rounding, or norms of another moment
        (-0.1, 1.0, 0.0, None),
        (-0.6, None, 1.0, None),
        (0.6, 1.0, 1.0, 0.6),
    ],
)
def test_the_cosine_is_worked_out(dot, host, seed, cosine):
    engine = Engine(table("id: a, metric: kasmina.seed.isolation.cosine, below: 2"))
    values = {"dot": dot, "host_norm": host, "seed_norm": seed}
    values = {
        f"kasmina.seed.isolation.{name}": value
        for name, value in values.items()
        if value is not None
    }
    decision = engine.observe(frame(0, {"x": values}))
    expected = [] if cosine is None else [{"kasmina.seed.isolation.cosine": cosine}]
    assert [finding.values for finding in decision.findings] == expected


STRAGGLER = "id: slow, metric: step_latency_ms, above_peers: 1.5, for: 2, action: CONTINUE"


def slowly(step, at=None, **values):
    """A frame of a run of so slow steps that each is old enough to be compared at the next."""
    time_ns = (step if at is None else at) * 2 * SECOND
    return structs.replace(frame(step, **values), time_unix_nano=time_ns)


def ranks(engine, order, latency):
    """The ranks that are named, by step, when frames come in ``order`` of the ranks."""
    named = set()
    for step in range(8):
        for rank in order(step):
            decision = engine.observe(
                slowly(step, rank=rank, step_latency_ms=latency(rank, step))
            )
            if decision.findings:
                named.add((rank, step))
    return named


@pytest.mark.parametrize(
    "order", [lambda step: (0, 1, 2), lambda step: (2, 1, 0), lambda step: (step % 3, 1, 2, 0)]
)
def test_a_straggler_is_named_whoever_s_frame_comes_first(order):
    slow = ranks(
        Engine(table(STRAGGLER)), order, lambda rank, step: 16.0 if rank == 1 else 10.0
    )
    # From step 1 on the others are known; steps 1 and 2 are told behind 3, and count from 4.
    assert slow == {(1, step) for step in range(4, 8)}


def test_a_pause_of_all_ranks_makes_no_straggler():
    stops = ranks(
        Engine(table(STRAGGLER)),
        lambda step: (0, 1, 2),
        lambda rank, step: 500.0 if step in (3, 4) else 10.0,
    )
    assert stops == set()


def test_ranks_of_other_runs_are_no_peers():
    engine = Engine(table(STRAGGLER))
    for step in range(5):
        for run, latency in (("a", 10.0), ("b", 99.0)):
            assert not engine.observe(slowly(step, run=run, step_latency_ms=latency)).findings


def test_a_rank_that_began_anew_is_compared_anew():
    engine = Engine(table(STRAGGLER))
    for step in range(5):
        for rank in (0, 1):
            engine.observe(slowly(step, rank=rank, step_latency_ms=10.0))
    told = [
        engine.observe(
            slowly(
                step,
                at=5 + step,
                instance="two",
                rank=rank,
                step_latency_ms=30.0 if rank else 10.0,
            )
        ).findings
        for step in range(5)
        for rank in (0, 1)
    ]
    assert [bool(findings) for findings in told] == [False] * 7 + [True, False, True]


def test_a_rule_inhibits_lesser_ones_of_the_same_run():
    ledger = Ledger()
    engine = Engine(
        table(
            "id: spike, metric: loss_delta, above: 1, conservative: true",
            "id: nan, nonfinite: true, inhibits: [spike], action: OPTIMIZER",
        ),
        observer=ledger,
    )
    both = engine.observe(frame(0, loss_delta=2.0, nonfinite=1.0))
    other = engine.observe(frame(0, run="other", loss_delta=2.0, nonfinite=0.0))
    assert (both.reason, both.conservative) == ("nan", False)
    assert [finding.rule for finding in both.findings] == ["nan"]
    assert other.reason == "spike"
    alone = engine.observe(frame(1, loss_delta=2.0, nonfinite=0.0))
    assert (alone.reason, alone.conservative) == ("spike", True)
    told = [
        (change.step, change.before.value, change.after.value, change.silenced_by)
        for change in ledger.changes
        if change.rule == "spike" and change.run == "run"
    ]
    assert told == [(0, "unknown", "firing", "nan"), (1, "firing", "firing", "")]


def test_a_rule_that_cools_down_still_inhibits():
    engine = Engine(
        table(
            "id: spike, metric: loss, above: 1",
            "id: nan, nonfinite: true, cooldown: 9, inhibits: [spike], severity: CRITICAL",
        )
    )
    told = [engine.observe(frame(step, loss=2.0, nonfinite=1.0)).reason for step in range(3)]
    assert told == ["nan", NOMINAL, NOMINAL]


def test_a_rule_on_trial_changes_nothing_and_is_told():
    rule = "metric: loss, above: 1, conservative: true, severity: CRITICAL, inhibits: [other]"
    ledger = Ledger()
    engine = Engine(
        table(f"id: trial, mode: observe, {rule}", "id: other, metric: loss, above: 3"),
        observer=ledger,
    )
    decision = engine.observe(frame(0, loss=2.0), PROPOSAL)
    assert (decision.action, decision.reason) == (Action.SEED, NOMINAL)
    assert not decision.conservative
    (finding,) = decision.findings
    assert (finding.rule, finding.action) == ("trial", Action.CONTINUE)
    assert engine.observe(frame(1, loss=4.0)).reason == "other"
    assert [change.after for change in ledger.changes if change.rule == "trial"] == [
        RuleState.FIRING
    ]


QUIET = "id: quiet, metric: step, missing_for: 30, action: CONTINUE"


def timed(step, seconds):
    made = frame(step)
    return type(made)(
        made.run, made.instance, made.rank, step, int(seconds * SECOND), made.values
    )


@pytest.mark.parametrize(("pace", "patience"), [(0.125, 10), (1, 30), (30, 900)])
def test_a_rank_is_quiet_after_so_many_of_its_own_steps(pace, patience):
    ledger = Ledger()
    engine = Engine(table(QUIET), observer=ledger)
    for step in range(5):
        engine.observe(timed(step, 1000 + pace * step))
    last = 1000 + 4 * pace
    engine.tick(int((last + patience) * SECOND))
    assert engine.latest("run").reason == NOMINAL
    engine.tick(int((last + patience + 1) * SECOND))
    engine.tick(int((last + patience + 2) * SECOND))
    decision = engine.latest("run")
    assert (decision.step, decision.action, decision.reason) == (4, Action.CONTINUE, "quiet")
    assert decision.findings[0].values == {"step": 4.0, "silent(s)": patience}
    assert ledger.told("quiet") == [(4, "inactive", "firing", None)]
    assert ledger.changes[-1].time_unix_nano == int((last + patience) * SECOND)
    assert ledger.decisions[-1] == (4, "quiet")
    assert engine.observe(timed(5, int(last + 999))).reason == NOMINAL
    assert ledger.told("quiet")[1:] == [(5, "firing", "inactive", None)]


def test_after_one_step_nobody_knows_how_long_the_next_takes():
    engine = Engine(table(QUIET))
    engine.observe(timed(0, 1000))
    engine.tick(1600 * SECOND)
    assert engine.latest("run").reason == NOMINAL
    engine.tick(1601 * SECOND)
    assert engine.latest("run").reason == "quiet"


def test_a_silence_is_told_alike_with_a_clock_and_without():
    """So a replay, which has no clock, tells what the live sidecar told."""
    live, replayed = Ledger(), Ledger()
    ticking, silent = (Engine(table(QUIET), observer=ledger) for ledger in (live, replayed))
    for step, second in enumerate([1, 2, 3, 4, 90, 91, 92]):
        for now in range(second):
            ticking.tick(now * SECOND)
        assert ticking.observe(timed(step, second)) == silent.observe(timed(step, second))
    assert live.changes == replayed.changes
    assert live.decisions == replayed.decisions
    assert [change.after for change in live.changes] == ["inactive", "firing", "inactive"]


@pytest.mark.parametrize("trainer_is_off_by", [-86_400, -15, 15])
def test_a_clock_that_is_wrong_silences_nobody_and_hides_no_silence(trainer_is_off_by):
    ledger = Ledger()
    engine = Engine(table(QUIET), observer=ledger)
    sent = 100_000 + trainer_is_off_by
    for step in range(20):
        engine.observe(timed(step, sent + step), at_ns=(100_000 + step) * SECOND)
        engine.tick((100_000 + step) * SECOND + SECOND // 2)
    assert engine.overview(100_020 * SECOND)["runs"][0]["state"] == "healthy"
    assert ledger.told("quiet") == []
    engine.tick((100_019 + 30) * SECOND)
    assert engine.latest("run").reason == NOMINAL
    engine.tick((100_019 + 31) * SECOND)
    assert engine.latest("run").reason == "quiet"
    assert ledger.changes[-1].time_unix_nano == (sent + 19 + 30) * SECOND  # as a replay says
    (run,) = engine.overview((100_019 + 31) * SECOND)["runs"]
    assert (run["state"], run["silent_s"]) == ("stale", 31.0)


def test_a_long_pause_makes_a_rank_a_little_more_patient_and_not_for_hours():
    engine = Engine(table(QUIET))
    for step in range(200):
        engine.observe(timed(step, 1000 + step))
    engine.observe(timed(200, 3000))  # half an hour of evaluation
    patience = 30 * (1 + 0.2 * 9)
    engine.tick(int((3000 + patience) * SECOND))
    assert engine.latest("run").reason == NOMINAL
    engine.tick(int((3001 + patience) * SECOND))
    assert engine.latest("run").reason == "quiet"


def test_a_rank_not_heard_of_is_stale_in_the_report():
    engine = Engine(table("id: a, metric: loss, above: 1"))
    for step in range(3):
        engine.observe(timed(step, 1000 + step))

    def told(seconds):
        (run,) = engine.overview(seconds * SECOND)["runs"]
        return run["state"], run["silent_s"]

    assert told(1002) == ("healthy", 0.0)
    assert told(1000) == ("healthy", 0.0)  # a clock that is behind
    assert told(1032) == ("healthy", 30.0)
    assert told(1033) == ("stale", 31.0)
    assert "state" not in engine.overview()["runs"][0]
    assert FLOOR_NS == 10 * SECOND


def test_a_report_names_the_rules_that_are_not_at_rest():
    engine = Engine(
        table(
            "id: a, metric: loss, above: 1",
            "id: b, metric: loss, above: 1, for: 3, severity: NORMAL",
            "id: c, metric: loss, above: 9",
            "id: d, metric: accuracy, above: 9",
            f"id: e, metric: {ALPHA}, above: 0.5",
        )
    )
    for step in range(2):
        engine.observe(frame(step, alphas(x=0.9, y=0.1), loss=2.0))
    assert engine.overview()["runs"][0]["rules"] == [
        {"rule": "a", "state": "firing", "since_step": 0},
        {"rule": "b", "state": "pending", "since_step": 0},
        {"rule": "e", "state": "firing", "since_step": 0, "seed_id": "x"},
    ]


def test_a_report_says_who_inhibits_a_rule_as_long_as_it_does():
    engine = Engine(
        table(
            "id: spike, metric: loss, above: 1, for: 2",
            "id: nan, nonfinite: true, inhibits: [spike]",
        )
    )

    def silenced_by(step, loss, nonfinite):
        engine.observe(frame(step, loss=loss, nonfinite=nonfinite))
        rules = engine.overview()["runs"][0]["rules"]
        return [one.get("silenced_by") for one in rules if one["rule"] == "spike"]

    assert silenced_by(0, 2.0, 0.0) == [None]
    assert silenced_by(1, 2.0, 1.0) == ["nan"]
    assert silenced_by(2, 0.0, 0.0) == []
    assert silenced_by(3, 2.0, 0.0) == [None]


def test_a_witness_is_told_once_of_each_frame_and_of_each_newest_decision():
    ledger = Ledger()
    engine = Engine(table("id: a, metric: loss, above: 1, for: 2"), observer=ledger)
    engine.observe(frame(0, loss=2.0))
    engine.observe(frame(0, loss=2.0))
    engine.observe(frame(0, loss=2.0), PROPOSAL)
    engine.observe(frame(1, loss=2.0))
    assert ledger.frames == [(0, NOMINAL), (1, "a")]
    assert ledger.decisions == [(0, NOMINAL), (0, NOMINAL), (1, "a")]
    first, second = ledger.changes
    assert (first.before, first.after, first.since_step) == ("unknown", "pending", -1)
    assert (second.before, second.after, second.since_step) == ("pending", "firing", 0)
    assert (second.run, second.rank, second.step, second.time_unix_nano) == ("run", 0, 1, 2)
    assert (second.severity, second.values) == ("HIGH", {"loss": 2.0})


def test_a_witness_that_fails_disturbs_nothing():
    class Broken:
        def on_rule_change(self, change):
            raise OSError

        judged = decided = lambda self, one, other: 1 / 0

    engine = Engine(table("id: a, metric: loss, above: 1"), observer=Broken())
    assert engine.observe(frame(0, loss=2.0)).reason == "a"
    assert engine.overview()["witness_failed"] == 2
    assert engine.overview()["frames"]["bad"] == 0
