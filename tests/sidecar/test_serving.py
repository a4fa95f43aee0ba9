"""A real sidecar at its decision socket: what it answers, and what it withstands."""

import json
import os
import signal
import stat
import struct
import subprocess
import sys
from math import inf, nan

import pytest

from esper_otel.leyline.decisions import Action, Proposal, SeedOperation
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.leyline.wire import (
    MAX_BODY,
    PROTOCOL,
    Ask,
    Check,
    Goodbye,
    Guard,
    Hello,
    Refusal,
    SeedRow,
    Welcome,
    encode,
)
from esper_tamiyo.commands import print_json
from esper_tamiyo.serving.connection import MAX_BACKLOG
from sidecar.running import TAMIYO, Client, is_alive, sidecar, tamiyo, until
from testkit.patience import PATIENCE_S


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One sidecar for all tests that leave it as it is; each uses a run of its own."""
    path = tmp_path_factory.mktemp("s") / "t.sock"
    with sidecar(path, "--table", "prototype", is_forked=False) as running:
        yield running


@pytest.fixture
def client(shared):
    with shared.client() as client:
        yield client


@pytest.fixture
def bystander(shared):
    """Somebody else, who must get good answers before and after."""
    with shared.client() as client:
        client.hello(run="bystander", instance=os.urandom(4).hex())
        client.ask(0)
        yield client
        assert client.ask(1).reason == "nominal"


def test_a_trainer_is_welcomed_and_answered(client):
    welcome = client.hello(run="a")
    assert isinstance(welcome, Welcome)
    assert welcome.protocol == PROTOCOL
    assert welcome.table_version.startswith("prototype-1+")
    assert client.ask(0, loss=1.0).action is Action.CONTINUE
    spike = client.ask(1, loss_delta=0.5)
    assert (spike.action, spike.reason, spike.conservative) == (
        Action.PAUSE,
        "loss_spike",
        True,
    )
    assert spike.table_version == welcome.table_version
    assert client.latest("a") == spike


def test_a_proposal_is_granted(client):
    client.hello(run="b")
    proposal = Proposal("s1", SeedOperation.GERMINATE)
    for step in (0, 1):  # the first makes the run known, the second is answered at a glance
        decision = client.ask(step, loss_delta=0.0, proposal=proposal)
        assert (decision.action, decision.target_seed) == (Action.SEED, "s1")


def test_an_ask_may_come_right_behind_the_hello(client):
    hello = Hello(PROTOCOL, "c", "one", 0, 1, ["step", "loss_delta"], [])
    client.socket.sendall(encode(hello) + encode(Ask(7, 0, 0, [0.0, 0.2])))
    assert isinstance(client.receive(), Welcome)
    answer = client.receive()
    assert (answer.request_id, answer.decision.reason) == (7, "loss_spike")


def test_columns_may_come_in_any_order_and_unknown_ones_are_ignored(client):
    client.call(Hello(PROTOCOL, "d", "one", 0, 1, ["new", "loss_delta", "step"], ["x"]))
    ask = Ask(0, 0, 0, [99.0, 0.2, 0.0], [SeedRow("s", [1.0])])
    decision = client.call(ask).decision
    assert decision.reason == "loss_spike"
    assert decision.findings[0].values == {"loss_delta": 0.2}


def test_messages_may_come_in_pieces(client):
    for byte in encode(Hello(PROTOCOL, "e", "one", 0, 1, [], [])):
        client.socket.sendall(bytes([byte]))
    assert isinstance(client.receive(), Welcome)


@pytest.fixture(scope="module")
def guarding(tmp_path_factory):
    """A sidecar whose table has something to say about updates."""
    table = tmp_path_factory.mktemp("t") / "updates.yaml"
    table.write_text(
        """\
version: updates
baseline: {window: 4, warmup: 2}
rules:
  - {id: spike, metric: gradient_norm, above_baseline: 11, severity: HIGH, action: OPTIMIZER,
     parameters: {skip_step: true}}
  - {id: high, metric: loss, above: 4, severity: HIGH, action: OPTIMIZER,
     parameters: {lr_scale: 0.25}}
"""
    )
    path = tmp_path_factory.mktemp("g") / "t.sock"
    with sidecar(path, "--table", str(table), "--journal", str(path.parent / "j")) as running:
        yield running


LOSS_GUARD = Guard("loss", 4.0)


def test_a_trainer_that_applies_decisions_is_told_its_guards(guarding):
    with guarding.client() as client:
        client.hello(run="guards", mode="enforce")
        told = [client.answer(step, gradient_norm=2.0, loss=1.0).guards for step in range(6)]
        assert told == [
            [LOSS_GUARD],
            [Guard("gradient_norm", 20.0), LOSS_GUARD],
            None,
            *[None] * 3,
        ]
        assert client.answer(6, gradient_norm=2.0, loss=5.0).guards is None
        told = [client.answer(step, gradient_norm=4.0, loss=1.0).guards for step in range(7, 9)]
        assert [guard and guard[0].above for guard in told] == [None, 30.0]
        client.hello(run="guards", mode="enforce")  # it has forgotten them
        assert client.answer(9, gradient_norm=4.0, loss=1.0).guards[1] == LOSS_GUARD


@pytest.mark.parametrize("mode", ["advise", ""])
def test_a_trainer_that_applies_nothing_is_told_no_guards(guarding, mode):
    with guarding.client() as client:
        client.hello(run=f"none{mode}", mode=mode)
        assert [client.answer(step, loss=1.0).guards for step in range(3)] == [None] * 3


def test_a_table_without_anything_for_updates_says_so(client):
    client.hello(run="unguarded", mode="enforce")
    assert [client.answer(step, loss_delta=0.0).guards for step in range(3)] == [[], None, None]


def test_guards_are_those_behind_the_step_that_is_answered(guarding):
    """Also where the answer itself was plain: the bound has moved beyond what was told."""
    with guarding.client() as client:
        client.hello(run="behind", mode="enforce")
        for step, norm in enumerate((9.0, 9.0, 9.0, 1.0, 1.0)):
            answer = client.answer(step, gradient_norm=norm, loss=1.0)
        assert answer.decision.reason == "nominal"
        (norm, _) = answer.guards
        assert norm.above == pytest.approx(5 + 0.9 * 50)  # the median of 9, 9, 1, 1


def test_an_update_is_checked_before_it_is_made(guarding):
    before = guarding.status()["checks"]
    with guarding.client() as client:
        client.hello(run="checked", mode="enforce")
        unknown = client.check(1, gradient_norm=50.0)
        assert (unknown.action, unknown.reason) == (Action.CONTINUE, "protocol_error")
        for step in range(4):
            client.ask(step, gradient_norm=2.0, loss=1.0)
        assert client.check(4, gradient_norm=20.0).reason == "nominal"
        spike = client.check(4, gradient_norm=50.0, loss=5.0)
        assert spike.id == "checked/0/4/update"
        assert spike.parameters == {"skip_step": 1.0, "lr_scale": 0.25}
        assert client.check(4, loss=5.0).parameters == {"lr_scale": 0.25}
        assert client.latest("checked").step == 3
        assert client.ask(4, gradient_norm=50.0, update_skipped=1.0).reason == "spike"
        after = client.status()["checks"]
    assert {name: count - before[name] for name, count in after.items()} == {
        "unchanged": 1,
        "smaller": 1,
        "skipped": 1,
        "unjudged": 1,
    }
    told = tamiyo("status", "--socket", guarding.socket).stdout
    assert "checks: unchanged " in told


def test_a_check_is_by_the_columns_of_the_hello(guarding):
    with guarding.client() as client:
        columns = ["new", "loss", "step"]
        client.call(Hello(PROTOCOL, "columns", "one", 0, 1, columns, [], "enforce"))
        client.call(Ask(0, 0, 1, [99.0, 1.0, 0.0]))
        answer = client.call(Check(7, 1, 2, [99.0, 5.0, float("nan")]))
        assert (answer.request_id, answer.decision.reason) == (7, "high")
        assert answer.decision.findings[0].values == {"loss": 5.0}
        infinite = client.call(Check(8, 1, 2, [0.0, float("inf"), 0.0]))
        assert infinite.decision.reason == "nominal"  # what is not finite is absent


def test_what_was_decided_of_an_update_and_what_became_of_it(guarding):
    """From the journal, in words."""
    journal = ("--journal", guarding.socket.parent / "j")
    with guarding.client() as client:
        client.hello(run="told", mode="enforce")
        for step in range(45):
            values = {"gradient_norm": 2.0, "loss": 1.0, "lr_scale": 1.0, "update_skipped": 0.0}
            if step == 5:
                values |= {"gradient_norm": 50.0}
                client.check(5, gradient_norm=50.0, loss=1.0)
                values |= {"update_skipped": 1.0}
            client.ask(step, **values)

    def told():
        return tamiyo("explain", "told/0/5/update", *journal).stdout

    until(lambda: "Afterwards (32 of 32 steps)" in told())
    assert told().startswith(
        "told/0/5/update: OPTIMIZER (HIGH)\nabout the update of step 5, before it was made\n"
    )
    assert "spike decided: gradient_norm above 11 × its baseline\n" in told()
    assert "The trainer is in enforce mode.\nThe update of step 5 was skipped.\n" in told()
    lines = tamiyo("journal", "--run", "told", *journal).stdout
    assert "told/0/5/update  update of step 5 to be skipped: spike (OPTIMIZER, HIGH)\n" in lines
    assert "told/0/5/update  afterwards, 32 steps: neutral (" in lines
    assert "; update of step 5 skipped; spike saw gradient_norm 50 (baseline 2, " in lines


def test_a_restarted_trainer_starts_anew(client):
    client.hello(run="f", instance="one")
    client.ask(500)
    client.hello(run="f", instance="two")
    assert client.ask(0).observed_step == 0


HELLO = encode(Hello(PROTOCOL, "x", "x", 0, 1, list(STEP_KEYS), list(SEED_KEYS)))
NARROW = encode(Hello(PROTOCOL, "x", "x", 0, 1, ["step"], ["kasmina.seed.alpha"]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<I", 5) + b"\xc1junk", "not a message of protocol 1"),
        (b"GET / HTTP/1.1\r\n\r\n", f"a message may have {MAX_BODY} bytes"),
        (struct.pack("<I", MAX_BODY + 1), f"a message may have {MAX_BODY} bytes"),
        (encode(Refusal("?")), "not a message of protocol 1"),
        (encode(Ask(1, 1, 1, [1.0])), "an Ask came before a Hello"),
        (encode(Check(1, 1, 1, [1.0])), "a Check came before a Hello"),
        (HELLO + encode(Check(1, 1, 1, [1.0])), "columns were named, a row has 1"),
        (
            encode(Hello(PROTOCOL + 1, "x", "x", 0, 1, [], [])),
            f"this is protocol {PROTOCOL}, not {PROTOCOL + 1}",
        ),
        (HELLO + encode(Ask(1, 1, 1, [1.0])), "columns were named, a row has 1"),
        (
            NARROW + encode(Ask(1, 1, 1, [1.0], [SeedRow("s", [])])),
            "1 columns were named, a row has 0",
        ),
    ],
)
def test_what_is_no_message_ends_that_connection_only(shared, bystander, data, message):
    malformed = shared.status()["connections"].get("malformed", 0)
    with shared.client() as client:
        client.socket.sendall(data)
        replies = []
        while (reply := client.receive()) is not None:
            replies.append(reply)
    assert isinstance(replies[-1], Refusal)
    assert message in replies[-1].message
    assert shared.status()["connections"]["malformed"] == malformed + 1


def test_a_truncated_message_is_forgotten_with_its_connection(shared, bystander):
    before = shared.status()["connections"]["open"]
    with shared.client() as client:
        client.socket.sendall(HELLO[:20])
        until(lambda: shared.status()["connections"]["open"] == before + 1)
    until(lambda: shared.status()["connections"]["open"] == before)


def test_a_client_that_does_not_read_is_given_up(shared, bystander):
    with shared.client() as client:
        client.hello(run="deaf")
        flood = encode(Ask(1, 1, 1, [1.0] * len(STEP_KEYS))) * 50
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            client.socket.sendall(flood * (100 * MAX_BACKLOG // len(flood)))
    assert shared.status()["connections"]["gave_up"] >= 1


def test_a_pipelined_flood_is_answered_in_order(client):
    client.hello(run="flood")
    asks = [encode(Ask(n, n, n, [0.0] * len(STEP_KEYS))) for n in range(300)]
    client.socket.sendall(b"".join(asks))
    assert [client.receive().request_id for _ in range(300)] == list(range(300))


def test_findings_too_long_to_send_are_answered_all_the_same(tmp_path):
    table = tmp_path / "t.yaml"
    rules = "\n".join(
        f"  - {{id: r{n}, metric: kasmina.seed.alpha, above: 0, severity: HIGH, action: PAUSE}}"
        for n in range(4)
    )
    table.write_text(f"version: t\nrules:\n{rules}\n")
    with sidecar(tmp_path / "t.sock", "--table", table) as running, running.client() as client:
        client.call(Hello(PROTOCOL, "r", "i", 0, 1, [], ["kasmina.seed.alpha"]))
        decision = client.call(Ask(1, 1, 1, [], [SeedRow("s" * 30_000, [1.0])])).decision
        assert decision.reason == "protocol_error"
        assert running.status()["engine"]["frames"]["bad"] == 1


def test_the_socket_and_its_new_folder_are_private(tmp_path):
    path = tmp_path / "esper" / "t.sock"
    with sidecar(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_stale_socket_is_replaced(tmp_path):
    path = tmp_path / "t.sock"
    with sidecar(path) as running:
        running.process.kill()
        running.process.wait()
        assert path.exists()
        with sidecar(path) as next_one, next_one.client() as client:
            assert isinstance(client.hello(), Welcome)


def test_a_living_one_is_not(shared, bystander):
    second = tamiyo("serve", "--no-ingest", "--socket", shared.socket)
    assert second.returncode == 1
    assert second.stderr == (
        f"tamiyo: {shared.socket}: in use by a running sidecar; stop it or choose another "
        "--socket\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly(tmp_path, number):
    path = tmp_path / "t.sock"
    with sidecar(path) as running:
        with running.client() as client:
            client.hello()
            running.process.send_signal(number)
            assert client.receive() is None
        assert running.process.wait(PATIENCE_S) == 0
        assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--table", "nope.yaml"), "nope.yaml: cannot be read: No such file or directory"),
        (
            ("--otlp-http", "0.0.0.0:0"),
            "--otlp-http 0.0.0.0:0: 0.0.0.0 is reachable from other",
        ),
        (("--otlp-grpc", "[::]:1"), "--otlp-grpc [::]:1: :: is reachable from other machines"),
        (("--otlp-grpc", "example.org:1"), 'expected an IP address or localhost, got "example'),
        (("--otlp-grpc", "4317"), '--otlp-grpc 4317: expected HOST:PORT, got "4317"'),
        (("--otlp-grpc", "127.0.0.1:99999"), 'expected HOST:PORT, got "127.0.0.1:99999"'),
    ],
)
def test_mistakes_at_the_start(tmp_path, arguments, message):
    ended = tamiyo("serve", "--socket", tmp_path / "t.sock", *arguments)
    assert ended.returncode == 1
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "t.sock").exists()


def test_check(tmp_path):
    good = tamiyo("check", "default")
    assert (good.returncode, good.stderr) == (0, "")
    assert "loss_diverging" in good.stdout
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nrules:\n- {id: a, metric: los, above: x}\n")
    ended = tamiyo("check", bad)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 4
    assert all(line.startswith(f"{bad}:3: rules[0].") for line in ended.stderr.splitlines())


def test_ask_and_status(shared, client):
    nobody = tamiyo("ask", "--socket", shared.socket, "--run", "nobody")
    assert (nobody.returncode, nobody.stderr) == (
        1,
        "tamiyo: no step of run nobody, rank 0, has been seen\n",
    )
    client.hello(run="asked", rank=2)
    client.ask(4, loss_delta=0.5)
    told = tamiyo("ask", "--socket", shared.socket, "--run", "asked", "--rank", "2")
    assert told.stdout.startswith("PAUSE  HIGH  loss_spike\nrun asked, step 4, table prototype")
    assert "loss_spike: The loss jumped. (loss_delta 0.5)" in told.stdout
    plain = tamiyo("ask", "--socket", shared.socket, "--run", "asked", "--rank", "2", "--json")
    assert '"reason": "loss_spike"' in plain.stdout
    status = tamiyo("status", "--socket", shared.socket)
    assert "asked/2: step 4, PAUSE (loss_spike), conservative" in status.stdout
    assert '"last_frame_age_s"' in tamiyo("status", "--socket", shared.socket, "--json").stdout


def test_what_is_infinite_is_null_in_json(capsys):
    print_json({"lag": inf, "of": [nan, 0.5, "\u202e"]})
    told = capsys.readouterr().out
    assert told.isascii()
    assert json.loads(told) == {"lag": None, "of": [None, 0.5, "\u202e"]}


def test_a_sidecar_that_has_seen_nothing_says_so(tmp_path):
    with sidecar(tmp_path / "t.sock") as running:
        assert "it has no step yet" in tamiyo("status", "--socket", running.socket).stdout
        nothing = tamiyo("ask", "--socket", running.socket)
        assert nothing.stderr == "tamiyo: no step of any run, rank 0, has been seen\n"


@pytest.mark.parametrize("command", ["ask", "status"])
def test_tools_say_when_nobody_is_there(tmp_path, command):
    ended = tamiyo(command, "--socket", tmp_path / "none.sock")
    assert ended.returncode == 1
    assert ended.stderr == (
        f"tamiyo: {tmp_path / 'none.sock'}: no sidecar listens there; "
        "start one with `tamiyo serve`\n"
    )


def test_the_command_stays_light():
    """Neither torch nor what only the receivers or a table need."""
    heavy = ("torch", "grpc", "aiohttp", "google.protobuf", "numpy", "yaml", "asyncio")
    code = f"""
import sys, esper_tamiyo.cli, esper_tamiyo.serving.server, esper_otel.leyline.tool_requests
print([name for name in {heavy!r} if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "['yaml']" or found.stdout.strip() == "[]"


def test_the_fixture_s_sidecar_is_the_installed_command(shared):
    assert TAMIYO.endswith("tamiyo")
    assert is_alive(shared.process.pid)
    client = Client(shared.socket)
    assert client.status()["pid"] == shared.process.pid
    client.close()


def test_a_trainer_that_says_goodbye_has_finished(shared, client):
    client.hello(run="leaving", instance="one")
    client.ask(1)
    client.send(Goodbye(1, 2, "done"))
    client.close()

    def state():
        runs = shared.status()["engine"]["runs"]
        return next(run for run in runs if run["run"] == "leaving")

    assert until(lambda: state()["state"] == "finished")
    assert state()["ended"] == "done"


def test_goodbyes_are_heard_of_the_connection_s_own_trainer_only(shared, client, bystander):
    client.hello(run="staying", instance="one")
    client.ask(1)
    with shared.client() as stranger:
        stranger.hello(run="staying", instance="another")
        stranger.send(Goodbye(1, 2, "exception", "ValueError"))
        # Its connection is as good as before.
        assert stranger.latest("staying").step == 1
    (found,) = (run for run in shared.status()["engine"]["runs"] if run["run"] == "staying")
    assert (found["state"], found["instance"]) == ("healthy", "one")


def test_who_goes_on_after_a_goodbye_is_answered_as_before(shared, client):
    client.hello(run="back", instance="one")
    client.ask(1)
    client.send(Goodbye(1, 2, "interrupted", "KeyboardInterrupt"))
    client.send(Goodbye(1, 2, "in a way that later versions know"))
    assert client.ask(2).reason == "nominal"
    (found,) = (run for run in shared.status()["engine"]["runs"] if run["run"] == "back")
    assert found["state"] == "healthy"


def test_a_goodbye_before_a_hello_is_refused(shared, client, bystander):
    assert isinstance(client.call(Goodbye(1, 2, "done")), Refusal)
    assert client.receive() is None
