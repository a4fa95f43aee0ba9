"""A rule that somebody silenced for one run: judged and told, and not heard."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_otel.leyline.decisions import NOMINAL, Action
from esper_otel.leyline.wire import (
    Refusal,
    SilenceReply,
    SilenceRequest,
    decode_to_client,
    decode_to_server,
    encode,
)
from esper_tamiyo import cli
from esper_tamiyo.commands import sidecar as command
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.liveness import FLOOR_NS
from esper_tamiyo.judging.silences import SILENCED, SilenceError
from esper_tamiyo.language.table_file import TableSource, load, parse
from sidecar.frames_made import frame
from sidecar.running import sidecar, tamiyo, until

TABLE = """
version: t
rules:
  - {id: high, metric: loss, above: 10, severity: HIGH, action: PAUSE, conservative: true,
     inhibits: [rising], parameters: {skip_step: true}}
  - {id: rising, metric: loss, above: 5, severity: WARNING, action: OPTIMIZER,
     parameters: {lr_scale: 0.5}}
  - {id: low, metric: loss, below: 0, severity: WARNING, action: CONTINUE}
  - {id: conflict, metric: kasmina.seed.alpha, above: 0.5, severity: HIGH, action: PAUSE}
  - {id: quiet, metric: step, missing_for: 5, severity: HIGH, action: CONTINUE}
"""


class Ledger:
    """An observer that writes all down."""

    def __init__(self):
        self.changes = []
        self.decisions = []

    def on_rule_change(self, change):
        self.changes.append((change.rule, change.step, change.after.value, change.silenced_by))

    def on_frame(self, frame, decision):
        pass

    def on_decision(self, decision, frame):
        self.decisions.append((decision.step, decision.reason))

    def told(self, rule):
        return [change[1:] for change in self.changes if change[0] == rule]


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def engine(ledger):
    engine = Engine(parse(TableSource("t", TABLE.encode())), observer=ledger)
    engine.observe(frame(0, loss=1.0))
    return engine


def silence(engine, rule, run="run", **how):
    return engine.silence(SilenceRequest(run, rule, **how))


def reasons(engine, losses, start, **of):
    return [
        engine.observe(frame(step, loss=loss, **of)).reason
        for step, loss in enumerate(losses, start)
    ]


def test_a_silenced_rule_is_told_and_neither_acts_nor_is_found(engine, ledger):
    silence(engine, "low")
    decision = engine.observe(frame(1, loss=-1.0))
    assert (decision.action, decision.reason, decision.findings) == ("CONTINUE", NOMINAL, [])
    assert ledger.told("low") == [(0, "inactive", ""), (1, "firing", SILENCED)]


def test_it_inhibits_nobody_and_enters_no_mode(engine):
    silence(engine, "high")
    decision = engine.observe(frame(1, loss=20.0))
    assert (decision.reason, [found.rule for found in decision.findings]) == (
        "rising",
        ["rising"],
    )
    assert not decision.conservative
    silence(engine, "rising")
    assert engine.observe(frame(2, loss=20.0)).findings == []


def test_steps_are_clean_while_the_only_trouble_is_silenced():
    """Conservative mode ends as if nothing fired."""
    text = TABLE.replace("version: t", "version: t\nconservative: {clean_steps: 3}")
    engine = Engine(parse(TableSource("t", text.encode())))
    engine.observe(frame(0, loss=20.0))
    silence(engine, "high")
    silence(engine, "rising")
    modes = [engine.observe(frame(step, loss=20.0)).conservative for step in range(1, 5)]
    assert modes == [True, True, False, False]


def test_it_lasts_for_so_many_steps(engine, ledger):
    order = silence(engine, "high", steps=2)
    assert (order.after_step, order.until_step) == (0, 2)
    assert reasons(engine, [20.0] * 4, start=1) == ["rising", "rising", "high", "high"]
    assert ledger.told("high")[1:] == [(1, "firing", SILENCED), (3, "firing", "")]
    assert ledger.told("rising")[1:] == [(1, "firing", ""), (3, "firing", "high")]


def test_it_can_be_undone(engine):
    silence(engine, "high")
    assert reasons(engine, [20.0], start=1) == ["rising"]
    assert silence(engine, "high", undo=True).undone
    assert reasons(engine, [20.0], start=2) == ["high"]
    with pytest.raises(SilenceError, match="high is not silenced for run run; silenced: none"):
        silence(engine, "high", undo=True)


def test_it_is_of_one_run_and_all_its_ranks(engine):
    engine.observe(frame(0, run="other", loss=1.0))
    silence(engine, "high")
    assert reasons(engine, [20.0], start=1) == ["rising"]
    assert reasons(engine, [20.0], start=1, rank=1) == ["rising"], "a rank that is new"
    assert reasons(engine, [20.0], start=1, run="other") == ["high"]
    assert reasons(engine, [20.0], start=0, instance="two") == ["rising"], "started again"


def test_seeds_and_ranks_that_send_nothing(engine, ledger):
    silence(engine, "conflict")
    silence(engine, "quiet")
    seeds = {"s1": {"kasmina.seed.alpha": 0.9}}
    assert engine.observe(frame(1, seeds, loss=1.0)).findings == []
    decided = len(ledger.decisions)
    engine.tick(1000 * FLOOR_NS)
    assert len(ledger.decisions) == decided, "a silenced silence is no decision"
    assert ledger.told("quiet") == [(0, "inactive", ""), (1, "firing", "")]


def test_an_update_is_not_changed_by_a_silenced_rule(engine):
    known = frame(1, loss=20.0)
    assert engine.check(known).parameters == {"skip_step": 1.0}
    silence(engine, "high", steps=1)
    assert engine.check(known).parameters == {"lr_scale": 0.5}
    silence(engine, "rising")
    assert engine.check(known).action is Action.CONTINUE
    assert engine.check(frame(2, loss=20.0)).reason == "high"


def test_guards_follow(engine):
    key = ("run", 0)
    before = engine.update_guards(key, "one").plan
    silence(engine, "high")
    engine.observe(frame(1, loss=1.0))
    plan = engine.update_guards(key, "one").plan
    assert [edge.fixed for edge in before.edges] == [edge.fixed for edge in plan.edges] == [5.0]
    silence(engine, "rising")
    engine.observe(frame(2, loss=1.0))
    assert engine.update_guards(key, "one").plan.edges == ()
    silence(engine, "rising", undo=True)
    engine.observe(frame(3, loss=1.0))
    assert engine.update_guards(key, "one").plan.edges == plan.edges


def test_a_trainer_that_cannot_ask_leaves_no_update_out():
    engine = Engine(load("default"))
    engine.observe(frame(0, loss=1.0))
    assert engine.update_guards(("run", 0), "one").plan.skips
    silence(engine, "nonfinite_loss")
    engine.observe(frame(1, loss=1.0))
    assert not engine.update_guards(("run", 0), "one").plan.skips


def test_it_survives_another_table_that_has_the_rule(engine):
    silence(engine, "high")
    engine.reload(parse(TableSource("t", TABLE.replace("above: 10", "above: 9").encode())))
    assert reasons(engine, [20.0, 20.0], start=1) == ["rising", "rising"]


@pytest.mark.parametrize(
    ("run", "rule", "steps", "message"),
    [
        ("rum", "high", None, "run rum is not known; did you mean run\\? runs: run$"),
        (
            "run",
            "hihg",
            None,
            "no rule is called hihg; did you mean high\\? rules: high, rising, low, conflict,",
        ),
        ("run", "high", 0, "expected at least one step, got 0"),
    ],
)
def test_what_there_is_not_cannot_be_silenced(engine, run, rule, steps, message):
    with pytest.raises(SilenceError, match=message):
        silence(engine, rule, run, steps=steps)


def test_without_a_run_there_is_none_to_silence():
    engine = Engine(parse(TableSource("t", TABLE.encode())))
    with pytest.raises(SilenceError, match="run run is not known; there is no run yet"):
        silence(engine, "high")


def test_an_overview_has_what_lasts(engine):
    silence(engine, "high", steps=1)
    silence(engine, "low")
    assert engine.overview()["silences"] == [
        {"run": "run", "rule": "high", "until_step": 1},
        {"run": "run", "rule": "low", "until_step": None},
    ]
    engine.observe(frame(1, loss=1.0))
    assert [each["rule"] for each in engine.overview()["silences"]] == ["low"]


def test_what_is_forgotten_is_not_silenced():
    engine = Engine(parse(TableSource("t", TABLE.encode())))
    engine.roster.capacity = engine.roster.capacity._replace(ranks=1)
    engine.observe(frame(0, loss=1.0))
    silence(engine, "high")
    engine.observe(frame(0, run="other", loss=1.0))
    assert reasons(engine, [20.0], start=5) == ["high"]
    assert engine.overview()["silences"] == []


@settings(deadline=None)
@given(
    losses=st.lists(st.sampled_from([1.0, 7.0, 20.0, -1.0]), min_size=1, max_size=20),
    start=st.integers(1, 20),
    steps=st.integers(1, 20),
)
def test_outside_of_a_silence_all_is_as_without(losses, start, steps):
    """And within it the other rules find what they would in a table without the rule."""
    table = parse(TableSource("t", TABLE.encode()))
    without = parse(
        TableSource(
            "t",
            TABLE.replace(", severity: HIGH, action: PAUSE, conservative: true", "")
            .replace(
                "inhibits: [rising], parameters: {skip_step: true}",
                "mode: observe, severity: HIGH, action: PAUSE",
            )
            .encode(),
        )
    )
    silenced, plain, observed = Engine(table), Engine(table), Engine(without)
    for step, loss in enumerate([1.0, *losses]):
        found = [
            {each.rule for each in engine.observe(frame(step, loss=loss)).findings}
            for engine in (silenced, plain, observed)
        ]
        if step == start - 1:
            silence(silenced, "high", steps=steps)
        if start <= step < start + steps:
            assert found[0] == found[2] - {"high"}
        else:
            assert found[0] == found[1]


# Over the socket.


@pytest.fixture
def serving(tmp_path):
    table = tmp_path / "t.yaml"
    table.write_text(TABLE)
    options = ("--table", table, "--journal", tmp_path / "j")
    with sidecar(tmp_path / "t.sock", *options) as running, running.client() as client:
        client.hello(run="run one")
        client.ask(0, loss=1.0)
        yield running, client


def test_the_command(serving, tmp_path):
    running, client = serving
    socket = ("--socket", running.socket)
    done = tamiyo("silence", "run one", "high", "--steps", 2, *socket)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "run run one: high is silenced until step 2\n"
    assert client.ask(1, loss=20.0).reason == "rising"
    shown = tamiyo("status", *socket)
    assert "silenced for run run one: high, until step 2\n" in shown.stdout
    done = tamiyo("silence", "run one", "high", "--undo", *socket)
    assert done.stdout == "run run one: high is heard again\n"
    assert client.ask(2, loss=20.0).reason == "high"
    done = tamiyo("silence", "run one", "low", "--until-end", *socket)
    assert done.stdout == "run run one: low is silenced until the run ends\n"

    def lines():
        return tamiyo("journal", "--run", "run one", "--journal", tmp_path / "j").stdout

    until(lambda: "low is silenced until the run ends, by user" in lines())
    assert "run one  high is silenced until step 2, by user" in lines()
    assert "run one  high is heard again, by user" in lines()
    assert "high: inactive → firing, silenced for the run" in lines()
    told = tamiyo("explain", "run one", "1", "--journal", tmp_path / "j").stdout
    assert "  high: silenced for the run\n" in told


def test_mistakes(serving):
    running, _ = serving
    socket = ("--socket", running.socket)
    for arguments, message in (
        (("nobody", "high"), "run nobody is not known; runs: run one"),
        (("run one", "nothing"), "no rule is called nothing; rules: high, rising, low, "),
        (("run one", "high", "--undo"), "high is not silenced for run run one"),
    ):
        refused = tamiyo("silence", *arguments, *socket)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith(f"tamiyo: {message}")
    for arguments in (("--steps", "0"), ("--steps", "x"), ("--steps", "1", "--undo")):
        assert tamiyo("silence", "run one", "high", *arguments, *socket).returncode == 2
    gone = tamiyo("silence", "run one", "high", "--socket", running.socket.with_name("no"))
    assert (gone.returncode, "no sidecar listens there" in gone.stderr) == (1, True)


def test_a_sidecar_of_before_there_were_silences_is_a_mistake_not_a_traceback(monkeypatch):
    monkeypatch.setattr(command, "reply", lambda request, path: Refusal("not a message"))
    assert cli.main(["silence", "run", "high"]) == 1


def test_messages_travel():
    for request in (SilenceRequest("r", "a", 3), SilenceRequest("r", "a", undo=True)):
        assert decode_to_server(encode(request)[4:]) == request
    reply = SilenceReply("", "no such rule")
    assert decode_to_client(encode(reply)[4:]) == reply
