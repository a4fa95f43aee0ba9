"""A real sidecar with its journal writer: what survives a kill, and what never waits for it."""

import json
import os
import select
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from contextlib import suppress

import pytest

from esper_otel.leyline.decisions import Action
from esper_tamiyo.journaling import reporter as reporter_module
from esper_tamiyo.journaling.entries import Decided, Gap, Reported
from esper_tamiyo.journaling.field_reports import DueReport
from esper_tamiyo.journaling.journal import Damage, files_of, read
from esper_tamiyo.journaling.journal_writer import HealthEndpoint
from esper_tamiyo.journaling.journal_writer_child import JournalWriterChild, Orders
from esper_tamiyo.journaling.messages import (
    Heartbeat,
    JournalWriterStatus,
    Message,
    decode_messages,
    pack,
)
from esper_tamiyo.journaling.reporter import GATHER_S, WRITTEN_PER_TURN, Reporter
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import load
from sidecar.entries_made import decided
from sidecar.frames_made import frame
from sidecar.running import TAMIYO, is_alive, sidecar, tamiyo, until
from testkit.patience import PATIENCE_S

SPIKE = {"loss_delta": 0.5, "loss": 1.0}


def journal_of(path):
    """The entries beside a socket, none while there is no journal yet."""
    folder = path.with_suffix(".journal")
    return list(read(folder)) if folder.exists() else []


def status_of(path):
    return json.loads(tamiyo("status", "--json", "--socket", path).stdout)


def decisions_of(path):
    return [entry for entry in journal_of(path) if isinstance(entry, Decided)]


def test_every_decision_is_written_down_and_told_of_afterwards(tmp_path):
    path = tmp_path / "t.sock"
    with sidecar(path, "--table", "prototype") as running, running.client() as client:
        client.hello(run="r")
        for step in range(100):
            client.ask(step, loss=1.0, loss_delta=0.5 if step == 40 else 0.0)
        until(lambda: any(isinstance(entry, Reported) for entry in journal_of(path)))
        status = running.status()
        assert status["scribe"]["journal"] == str(path.with_suffix(".journal"))
        assert {"action": "PAUSE", "severity": "HIGH", "rule": "loss_spike", "count": 1} in (
            status["decisions"]
        )
        assert status["answer_ms"]["p50_at_most"] is not None
        live = tamiyo("explain", "r/0/40", "--socket", path)
        shown = tamiyo("status", "--socket", path)
    assert shown.returncode == 0, "a run that is silent is no fault of the sidecar's"
    assert "r/0: step 99, CONTINUE (nominal)" in shown.stdout
    assert "unknown" not in shown.stdout  # its steps are of 1970, and yet it was just heard
    (entry,) = decisions_of(path)
    assert (entry.id, entry.reason, entry.asked) == ("r/0/40", "loss_spike", True)
    kinds = [type(entry).__name__ for entry in journal_of(path)]
    assert kinds[0] == "Opened"
    assert kinds[-1] == "Closed"
    assert live.stdout == tamiyo("explain", "latest", "--socket", path).stdout
    assert "loss_spike decided: The loss jumped." in live.stdout
    assert "Afterwards (32 of 32 steps): neutral" in live.stdout


def test_after_kill_9_the_journal_is_there_and_intact(tmp_path):
    path = tmp_path / "t.sock"
    with sidecar(path, "--table", "prototype") as running, running.client() as client:
        client.hello(run="r")
        for step in range(200):
            client.ask(step, **SPIKE)
        writer = until(lambda: (s := running.status()["scribe"])["notes_waiting"] == 0 and s)[
            "pid"
        ]
        running.process.kill()
        until(lambda: not is_alive(writer))
    entries = journal_of(path)
    assert [entry.step for entry in decisions_of(path)] == list(range(200))
    assert type(entries[-1]).__name__ == "Closed", (
        "the journal writer outlived it and wrote the rest"
    )


def test_after_kill_9_of_both_what_was_written_is_whole(tmp_path):
    path = tmp_path / "t.sock"
    with sidecar(path, "--table", "prototype") as running, running.client() as client:
        client.hello(run="r")
        writer = running.status()["scribe"]["pid"]
        until(lambda: journal_of(path))
        for step in range(200):
            client.ask(step, **SPIKE)
        until(lambda: decisions_of(path))
        os.kill(writer, signal.SIGKILL)
        running.process.kill()
        running.process.wait()
    steps = [entry.step for entry in decisions_of(path)]
    assert steps == list(range(len(steps))), "without a hole"
    *whole, _ = journal_of(path)
    assert not any(isinstance(entry, Damage) for entry in whole), "only the last may be cut"


def test_a_journal_writer_that_is_killed_is_started_again_and_the_hole_is_told(tmp_path):
    path = tmp_path / "t.sock"
    with sidecar(path, "--table", "prototype") as running, running.client() as client:
        client.hello(run="r")
        writer = until(lambda: (s := running.status()["scribe"])["state"] == "working" and s)[
            "pid"
        ]
        client.ask(0, **SPIKE)
        until(lambda: decisions_of(path))
        os.kill(writer, signal.SIGSTOP)
        for step in range(1, 20):
            assert client.ask(step, **SPIKE).reason == "loss_spike"
        os.kill(writer, signal.SIGKILL)
        until(lambda: running.status()["scribe"]["state"] == "down")
        for step in range(20, 40):
            assert client.ask(step, **SPIKE).reason == "loss_spike"
        ended = tamiyo("status", "--socket", path)
        until(lambda: running.status()["scribe"]["restarts"] == 1)
        until(lambda: running.status()["scribe"]["state"] == "working")
        client.ask(40, **SPIKE)
        until(lambda: any(isinstance(entry, Gap) for entry in journal_of(path)))
        until(lambda: decisions_of(path)[-1].step == 40)
        lost = running.status()["scribe"]["lost"]
    if ended.returncode:  # it may have been started again by then
        assert ended.returncode == 3
        assert "the journal is not written: the journal writer is" in ended.stderr
    gaps = [entry.lost for entry in journal_of(path) if isinstance(entry, Gap)]
    missing = 41 - len(decisions_of(path))
    assert sum(gaps) == lost >= missing >= 19, "those that died in the pipe count as well"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_does_not_end_the_journal_writer(tmp_path, number):
    path = tmp_path / "t.sock"
    with sidecar(path) as running:
        writer = until(lambda: (s := running.status()["scribe"])["state"] == "working" and s)
        os.kill(writer["pid"], number)
        beats = running.status()["uptime_s"] + 0.2
        until(lambda: running.status()["uptime_s"] > beats)
        assert running.status()["scribe"]["pid"] == writer["pid"]


def test_a_folder_that_cannot_be_written_is_told_once_and_answers_go_on(tmp_path):
    path, blocked = tmp_path / "t.sock", tmp_path / "file"
    blocked.write_text("mine")
    serve = [TAMIYO, "serve", "--socket", path, "--no-ingest", "--table", "prototype"]
    process = subprocess.Popen(
        [*serve, "--journal", blocked / "j"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline().startswith("tamiyo ready ")
        journal = "the journal cannot be written"
        assert until(lambda: journal in tamiyo("status", "--socket", path).stderr)
        status = tamiyo("status", "--socket", path)
        assert status.returncode == 3
        assert f"the journal cannot be written: {blocked / 'j'}: not a directory" in (
            status.stderr
        )
        # Some standings later it has still been said once.
        until(lambda: status_of(path)["uptime_s"] > 3)
    finally:
        process.terminate()
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert stderr.count("the journal cannot be written") == 1
    assert blocked.read_text() == "mine"


def test_without_anything_to_write_there_is_no_journal_writer(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    with sidecar(tmp_path / "t.sock", "--no-journal") as running:
        assert running.status()["scribe"] is None
        assert tamiyo("status", "--socket", running.socket).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--health", "8080"), '--health 8080: expected HOST:PORT, got "8080"'),
        (("--health", "nowhere:1"), "expected an IP address or localhost"),
        (("--journal-files", "0"), "expected a whole number above 0, got '0'"),
        (("--journal-file-mb", "much"), "expected a number above 0, got 'much'"),
        (("--trace-every", "-1"), "expected a whole number above 0, got '-1'"),
    ],
)
def test_mistakes_at_the_start(tmp_path, arguments, message):
    ended = tamiyo("serve", "--socket", tmp_path / "t.sock", "--no-ingest", *arguments)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def asked(address, path):
    """(status, body) of a question after our health."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=PATIENCE_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


NOT_DECIDING = {
    "deciding": False,
    "reason": "no heartbeat of the decide process for 3 s",
}


def test_health_says_whether_the_decide_process_beats(tmp_path):
    with sidecar(tmp_path / "t.sock", "--health", "127.0.0.1:0") as running:
        address = running.words["health"]
        until(lambda: asked(address, "/livez")[0] == 200)
        assert asked(address, "/livez") == (200, {"status": "ok", "deciding": True})
        assert asked(address, "/readyz")[1] == {
            "status": "ok",
            "deciding": True,
            "receiving": True,
        }
        assert asked(address, "/")[0] == 404
        os.kill(running.process.pid, signal.SIGSTOP)
        until(lambda: asked(address, "/livez") == (503, {"status": "failing", **NOT_DECIDING}))
        os.kill(running.process.pid, signal.SIGCONT)
        until(lambda: asked(address, "/livez")[0] == 200)


def test_who_does_not_receive_what_it_should_is_alive_and_not_ready():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        health = HealthEndpoint(listening.detach())
    assert health.checks("/livez") == {"deciding": False}
    for ingest, receives, reason in (
        ({"listening": True, "state": "working"}, True, ""),
        ({"listening": False, "state": "down"}, False, "the ingest process is being started"),
        ({"listening": False, "state": "silent"}, False, "the ingest process does not respond"),
        (None, True, ""),
    ):
        health.on_heartbeat({"ingest": ingest})
        assert health.reason(health.checks("/readyz")) == reason
        assert health.checks("/livez") == {"deciding": True}
        assert health.checks("/readyz") == {"deciding": True, "receiving": receives}
    health._server.server_close()


def test_the_health_port_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        ended = tamiyo("serve", "--socket", tmp_path / "t.sock", "--health", address)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"tamiyo: --health {address}: cannot listen: address already in use\n"
    )


class Frozen(JournalWriterChild):
    """A journal writer that never reads: a pipe without a process."""

    def _launch(self, arguments, inherited=()):
        self.pipe, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pipe.setblocking(False)
        return self.pipe


def test_a_full_pipe_loses_whole_messages_and_counts_them():
    writer = Frozen(Orders())
    writer.start()
    with writer.pipe, writer.other:
        told = 0
        while writer.send([decided(told)]):
            told += 1
        assert writer.lost == 1
        assert not writer.send([decided(0), decided(1)])
        assert writer.lost == 3
        received = []
        for _ in range(told):
            received += decode_messages(writer.other.recv(1 << 20))
        assert [message.step for message in received] == list(range(told))
        heartbeat = Heartbeat(beat=1, began_unix_nano=0, report={}, distributions={})
        messages: list[Message] = [decided(step) for step in range(400)]
        assert writer.send([*messages, heartbeat]), (
            "too long for one message, so it goes in several"
        )
        again = []
        while len(again) < 401:
            again += decode_messages(writer.other.recv(1 << 20))
        assert again == [*messages, heartbeat]
        assert writer.lost == 3


def test_what_dies_in_the_pipe_is_lost_but_for_what_the_journal_writer_accounted_for(tmp_path):
    writer = Frozen(Orders(journal=tmp_path))
    for restarts, (written, lost) in enumerate([(60, 5), (0, 0)]):
        writer.start()
        messages: list[Message] = [decided(step) for step in range(100)]
        heartbeat = Heartbeat(beat=1, began_unix_nano=0, report={}, distributions={})
        sample = decided(100, action=Action.CONTINUE, findings=[])
        assert writer.send([*messages, sample, heartbeat])
        writer.other.send(pack(JournalWriterStatus(written=written, lost=lost)))
        writer.other.close()
        for _ in range(2):  # that it ended with messages unread, and what it said last
            writer.read()
        assert (writer.status()["written"], writer.status()["lost"]) == (60, 5 + 35 * restarts)
        while writer.pipe is not None:
            writer.read()
        assert writer.status()["written"] == 60
        assert writer.status()["lost"] == 40 + 100 * restarts


def test_without_a_journal_nothing_of_it_is_lost():
    writer = Frozen(Orders())
    writer.start()
    assert writer.send([decided(0)])
    writer.other.close()
    writer.reap()
    assert writer.status()["lost"] == 0


def test_the_journal_s_files_are_bounded(tmp_path):
    path = tmp_path / "t.sock"
    options = ("--journal-file-mb", "0.01", "--journal-files", "2")
    with (
        sidecar(path, "--table", "prototype", *options) as running,
        running.client() as client,
    ):
        client.hello(run="r")
        for step in range(150):
            client.ask(step, **SPIKE)
        until(lambda: decisions_of(path) and decisions_of(path)[-1].step == 149)
    assert len(files_of(path.with_suffix(".journal"))) == 2


def test_following_the_journal_of_a_running_sidecar_across_its_files(tmp_path):
    path = tmp_path / "t.sock"
    options = ("--journal-file-mb", "0.001", "--journal-files", "1")
    with (
        sidecar(path, "--table", "prototype", *options) as running,
        running.client() as client,
    ):
        client.hello(run="r")
        client.ask(0, **SPIKE)
        until(lambda: decisions_of(path))
        follower = subprocess.Popen(
            [TAMIYO, "journal", "--follow", "--run", "r", "--socket", path],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            seen = follower.stdout
            assert until(lambda: "r/0/0  PAUSE HIGH: loss_spike" in seen.readline())
            for step in range(1, 6):
                client.ask(step, **SPIKE)
                line = f"r/0/{step}  PAUSE HIGH: loss_spike"
                assert until(lambda line=line: line in seen.readline())
            assert [each.name for each in files_of(path.with_suffix(".journal"))] > [
                "journal-000003.jsonl"
            ]
            follower.send_signal(signal.SIGINT)
            assert follower.wait(PATIENCE_S) == 130
        finally:
            follower.kill()
            follower.communicate()


def received(writer):
    """The messages that lie in the pipe to a writer that never reads."""
    messages = []
    writer.other.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            messages += decode_messages(writer.other.recv(1 << 20))
    return messages


def test_steps_that_come_fast_are_written_together_and_one_that_comes_alone_at_once(
    monkeypatch,
):
    now = [100.0]
    monkeypatch.setattr(reporter_module.time, "monotonic", lambda: now[0])
    writer = Frozen(Orders())
    epoll = select.epoll()
    reporter = Reporter(writer)
    reporter.start(epoll)
    with writer.pipe, writer.other, epoll:
        table = load("prototype")
        engine = Engine(table, observer=reporter.decision_log)
        engine.observe(frame(0, loss=1.0))

        def decisions_sent():
            reporter.write_down(table, lambda: iter([{}]))
            return [each.step for each in received(writer) if isinstance(each, Decided)]

        def one_more(step):
            engine.observe(frame(step, loss=1.0, loss_delta=9.0))

        assert decisions_sent() == []
        now[0] += GATHER_S
        one_more(1)
        assert decisions_sent() == [1]
        for step in (2, 3):
            one_more(step)
            assert decisions_sent() == []
        assert 0.0 < reporter.due_in() <= GATHER_S
        now[0] += GATHER_S
        assert reporter.due_in() == 0.0
        assert decisions_sent() == [2, 3]
        for step in range(4, 4 + WRITTEN_PER_TURN):  # more than one message's worth
            one_more(step)
        assert decisions_sent()
        engine.observe(frame(99, loss=1.0))
        now[0] += 3600.0
        assert reporter.due_in() == 0.0


def test_what_had_no_room_is_told_and_runs_that_ended_are_reported_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(reporter_module.time, "monotonic", lambda: now[0])
    writer = Frozen(Orders())
    epoll = select.epoll()
    reporter = Reporter(writer)
    reporter.start(epoll)
    with writer.pipe, writer.other, epoll:
        table = load("prototype")
        engine = Engine(table, observer=reporter.decision_log)
        for step in range(20):
            engine.observe(frame(step, loss=1.0, loss_delta=9.0 if step == 19 else 0.0))
        reporter.decision_log.dropped = 3
        while reporter.decision_log.waiting:
            reporter.write_down(table, lambda: iter([{}]))
        now[0] += 3600.0
        reporter.write_down(table, lambda: iter([{}]))
        messages = received(writer)
    assert [message.lost for message in messages if isinstance(message, Gap)] == [3]
    (due,) = (message for message in messages if isinstance(message, DueReport))
    assert (due.decision, due.ended) == ("run/0/19", "the run sent no more steps")
