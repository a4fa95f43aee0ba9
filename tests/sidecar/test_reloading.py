"""A table that changes while runs are judged by it."""

import os
import random
import signal
from pathlib import Path

import msgspec
import pytest

from esper_otel.leyline.decisions import Action
from esper_tamiyo.language.table import Table
from esper_tamiyo.language.table_file import SHIPPED, load, shipped_tables
from esper_tamiyo.receiving.pipe import Inlet, MessageKind, Unusable, pack
from esper_tamiyo.serving import table_watch
from esper_tamiyo.serving.table_watch import FileWatch
from sidecar.running import is_alive, sidecar, until

RULE = "{{id: {id}, metric: loss_delta, above: {above}, for: 3, severity: HIGH, action: PAUSE}}"


def table_text(above=1.0, also="", version="t"):
    rules = [RULE.format(id="spike", above=above)]
    rules += [RULE.format(id=also, above=50.0)] if also else []
    return f"version: {version}\nrules:\n" + "".join(f"- {rule}\n" for rule in rules)


BROKEN = table_text().replace("loss_delta", "los")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(table_text())
    return path


def replace(path, text):
    """As editors do it: a new file takes the old one's place."""
    fresh = path.with_suffix(".fresh")
    fresh.write_text(text)
    fresh.replace(path)


@pytest.mark.parametrize("name", shipped_tables())
def test_a_table_comes_through_the_pipe_as_it_was(name):
    table = load(name)
    ((kind, body),) = Inlet().feed(pack(table))
    assert kind == MessageKind.TABLE
    assert msgspec.msgpack.decode(body, type=Table) == table


class Looks:
    """A watch that looks as often as it is told, and what it has found."""

    def __init__(self, path, version=None):
        self.watch = FileWatch(str(path), version or load(str(path)).version)

    def found(self, looks=2, now=False):
        """The news of so many looks: versions, or messages of tables that are not usable."""
        news = [self.watch.look(now) for _ in range(looks)]
        return [
            one.message if isinstance(one, Unusable) else load(str(self.watch._name)).version
            for one in news
            if one is not None
        ]


def test_nothing_is_told_of_a_file_that_stays(file):
    assert Looks(file).found(5) == []


def test_a_change_between_loading_and_watching_is_told(file):
    looks = Looks(file, version="another")
    assert looks.found(5) == [load(str(file)).version]


def test_a_change_is_told_once_it_has_settled_and_once_only(file):
    looks = Looks(file)
    file.write_text(table_text(above=2.0))
    assert looks.found(1) == []
    assert looks.found(1) == [load(str(file)).version]
    assert looks.found(5) == []


def test_what_is_outdated_in_a_table_is_said_once_by_whoever_reads_it_first(file, caplog):
    also = table_text(also="second").replace("for: 3", "for: 3, silences: [second]", 1)
    file.write_text(also)
    version = load(str(file)).version
    assert len(caplog.messages) == 1
    watch = FileWatch(str(file), version)
    assert [watch.look(now=False) for _ in range(3)] == [None] * 3
    assert len(caplog.messages) == 1
    file.write_text(also.replace("above: 50.0", "above: 40.0"))
    assert sum(watch.look(now=False) is not None for _ in range(3)) == 1
    assert len(caplog.messages) == 2


def test_a_file_that_is_still_being_written_is_left_alone(file):
    looks = Looks(file)
    text = table_text(also="second")
    for end in range(20, len(text), 10):
        file.write_text(text[:end])
        assert looks.found(1) == []
    file.write_text(text)
    assert looks.found(2) == [load(str(file)).version]


def test_a_file_that_changes_while_it_is_read_is_read_again(file, monkeypatch):
    looks = Looks(file)
    file.write_text(table_text(above=2.0))
    assert looks.found(1) == []
    reads = []

    def read_and_disturb(name, real=table_watch.read):
        found = real(name)
        if not reads:
            file.write_text(table_text(above=345.0))
        reads.append(found)
        return found

    monkeypatch.setattr(table_watch, "read", read_and_disturb)
    assert looks.found(3) == [load(str(file)).version]
    assert len(reads) == 2


@pytest.mark.parametrize("how", ["rename", "rewrite", "touch"])
def test_ways_a_file_changes(file, how):
    looks = Looks(file)
    if how == "rename":
        replace(file, table_text(above=2.0))
    elif how == "rewrite":
        file.write_text(table_text(above=2.0))
    else:
        os.utime(file, ns=(1, 1))
    assert looks.found(3) == [load(str(file)).version]


def test_a_config_map_that_is_swapped_by_its_link(tmp_path):
    for name, above in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.yaml").write_text(table_text(above=above))
    data = tmp_path / "..data"
    data.symlink_to("one")
    path = tmp_path / "table.yaml"
    path.symlink_to("..data/table.yaml")
    looks = Looks(path)
    fresh = tmp_path / "..data_tmp"
    fresh.symlink_to("two")
    fresh.replace(data)
    assert looks.found(3) == [load(str(tmp_path / "two" / "table.yaml")).version]


def test_a_table_that_is_broken_or_gone_is_told_once_and_so_is_its_return(file):
    looks = Looks(file)
    replace(file, BROKEN)
    (message,) = looks.found(5)
    assert message.startswith(f"{file}:3: rules[0].metric: ")
    file.unlink()
    (message,) = looks.found(5)
    assert "cannot be read: No such file or directory" in message
    file.write_text(table_text())
    assert looks.found(5) == [load(str(file)).version]


def test_asked_to_look_it_tells_what_there_is(file):
    looks = Looks(file)
    assert looks.found(1, now=True) == [load(str(file)).version]
    file.write_text(BROKEN)
    assert len(looks.found(1, now=True)) == 1
    assert looks.found(5) == [], "told already"


def hang_up(running):
    """SIGHUP, and the report of the table once it has done what it does."""
    before = running.status()["table"]
    running.process.send_signal(signal.SIGHUP)
    return until(lambda: changed(before, running.status()["table"]))


def changed(before, table):
    keys = ("reloads", "last_error")
    return table if [table[k] for k in keys] != [before[k] for k in keys] else None


def test_sighup_loads_the_table_again_and_rules_that_stay_keep_their_state(tmp_path, file):
    with (
        sidecar(tmp_path / "t.sock", "--table", file) as running,
        running.client() as client,
    ):
        until(lambda: running.status()["table"]["source"] == str(file))
        old = client.hello().table_version
        for step in (0, 1):
            assert client.ask(step, loss_delta=2.0).action is Action.CONTINUE
        file.write_text(table_text(also="second"))
        table = hang_up(running)
        assert (table["reloads"], table["rules"], table["last_error"]) == (1, 2, "")
        assert table["version"] != old
        third = client.ask(2, loss_delta=2.0)
        assert (third.reason, third.table_version) == ("spike", table["version"])
        file.write_text(table_text(above=1.5))
        hang_up(running)
        assert client.ask(3, loss_delta=2.0).reason == "nominal", "a changed rule begins anew"


def test_a_changed_file_is_noticed_without_a_signal(tmp_path, file, capfd):
    with sidecar(tmp_path / "t.sock", "--table", file) as running:
        replace(file, table_text(above=7.0, also="second"))
        table = until(lambda: (t := running.status()["table"])["reloads"] and t)
        assert table["rules"] == 2
        assert table["version"] == load(str(file)).version
    told = capfd.readouterr().err
    assert "loaded: 0 rules as before; changed: spike; new: second" in told


def test_a_broken_table_changes_nothing_and_is_said_until_it_is_mended(tmp_path, file, capfd):
    with (
        sidecar(tmp_path / "t.sock", "--table", file) as running,
        running.client() as client,
    ):
        version = client.hello().table_version
        file.write_text(BROKEN)
        table = hang_up(running)
        assert (table["version"], table["reloads"], table["refused"]) == (version, 0, 1)
        assert table["last_error"].startswith(f"{file}:3: rules[0].metric: ")
        for step in range(3):
            decision = client.ask(step, loss_delta=2.0)
        assert (decision.reason, decision.table_version) == ("spike", version)
        file.write_text(table_text())
        table = hang_up(running)
        assert (table["reloads"], table["last_error"], table["version"]) == (1, "", version)
    told = capfd.readouterr().err
    assert f"the table cannot be used, {version} stays:\n{file}:3: " in told
    assert "Traceback" not in told


def test_a_shipped_table_has_nothing_to_reload(tmp_path, capfd):
    with sidecar(tmp_path / "t.sock", "--table", "default") as running:
        running.process.send_signal(signal.SIGHUP)
        until(lambda: "there is nothing to reload" in capfd.readouterr().err)
        assert running.status()["table"]["reloads"] == 0


def children_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()]


def watch_of(running):
    """The process that watches the table."""

    def found():
        for pid in children_of(running.process.pid):
            if b"esper_tamiyo.serving.table_watch" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    return until(found)


def test_the_watch_is_started_again_and_does_not_outlive_the_sidecar(tmp_path, file):
    with sidecar(tmp_path / "t.sock", "--table", file, is_forked=False) as running:
        first = watch_of(running)
        os.kill(first, signal.SIGKILL)
        until(lambda: not is_alive(first))
        file.write_text(table_text(above=3.0))  # nobody watches: the next one looks first
        until(lambda: running.status()["table"]["version"] == load(str(file)).version)
        second = watch_of(running)
        assert second != first
        assert running.status()["table"]["restarts"] == 1
        running.process.kill()
        running.process.wait()
        until(lambda: not is_alive(second))


def steps(count, seed=7):
    """What a run with troubles of several kinds tells, step by step."""
    chance = random.Random(seed)
    loss = 2.0
    for step in range(count):
        jump = 3.0 if step % 60 == 47 else 0.0
        loss = max(0.05, loss * 0.995 + chance.gauss(0, 0.01) + jump)
        yield {
            "loss": loss,
            "loss_delta": chance.gauss(0, 0.02) + jump,
            "loss_volatility": abs(chance.gauss(0.02, 0.01)) + jump / 3,
            "gradient_norm": abs(chance.gauss(1, 0.1)) * (30 if step % 90 > 80 else 1),
            "grad_var": abs(chance.gauss(0.1, 0.05)) + jump,
            "step_latency_ms": chance.lognormvariate(1, 0.2)
            * (9 if 70 < step % 100 < 80 else 1),
            "input_wait_ms": 2.5 if 160 < step < 200 else 0.1,
            "optimizer_lr": 0.1 if step < 150 else 0.01,
        }


def test_reloads_in_the_middle_of_a_run_change_no_decision(tmp_path):
    """The very table, read again and again under changing comments: only its version shows."""
    text = (SHIPPED / "default.yaml").read_text()
    paths = [tmp_path / "still.yaml", tmp_path / "moving.yaml"]
    for path in paths:
        path.write_text(text)
    with (
        sidecar(tmp_path / "still.sock", "--table", paths[0]) as still,
        sidecar(tmp_path / "moving.sock", "--table", paths[1]) as moving,
        still.client() as calm,
        moving.client() as shaken,
    ):
        calm.hello()
        shaken.hello()
        reasons, versions = set(), set()
        for step, values in enumerate(steps(240)):
            if step % 20 == 19:
                paths[1].write_text(f"{text}\n# {step}\n")
                hang_up(moving)
            one, other = calm.ask(step, **values), shaken.ask(step, **values)
            assert other == msgspec.structs.replace(one, table_version=other.table_version)
            reasons.add(one.reason)
            versions.add(other.table_version)
        assert moving.status()["table"]["reloads"] >= 12
    assert len(versions) >= 12, "every reload was one"
    assert len(reasons) > 2, "there was something to decide"
