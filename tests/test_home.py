"""The home of recorded runs: what lies there, found by name, listed and tidied up."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import time
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import msgspec
import pytest

from esper_otel import home as home_module
from esper_otel.cli import main
from esper_otel.commands.run import spelled_out
from esper_otel.home import (
    CUT_OFF,
    REFRESH_S,
    RUNNING,
    CardKeeper,
    RunCard,
    found_by,
    is_written,
    matching,
    remove,
    run_at,
    runs_in,
)
from esper_otel.run_settings import format_tags, parse_tags
from esper_otel.settings import EsperSettings, SettingsError
from esper_otel.stream.destination import Signal
from esper_otel.stream.recording import recording_of
from report.made import frames, recorded

DAY_NS = 86_400 * 10**9
NOW_NS = 1_790_000_000 * 10**9


def put(home, run, age_days=0.0, size=0, attempts=(1,), **card):
    """A run at home, as a recording leaves it."""
    folder = home / run
    for attempt in attempts:
        more = "" if attempt == 1 else f"-attempt{attempt}"
        path = folder / f"{run}-rank0{more}.metrics.otlp"
        recorded(path, frames(4, run=run, instance=f"i{attempt}", loss=lambda step: 0.5))
        at = NOW_NS - int(age_days * DAY_NS) + attempt
        told = {"steps": 4, "last_loss": 0.5, "ended": "done", **card}
        made = RunCard(
            run=run, attempt=attempt, began_unix_nano=at, updated_unix_nano=at, **told
        )
        (folder / f"run{more}.json").write_bytes(msgspec.json.encode(made))
    if size:
        (folder / f"{run}-rank1.metrics.otlp").write_bytes(bytes(size))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_RUNS_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setattr(home_module.time, "time_ns", lambda: NOW_NS)
    time.tzset()
    yield tmp_path / "home"
    monkeypatch.undo()
    time.tzset()


def ids(runs):
    return [run.card.run for run in runs]


# Where it is, and what is recorded there.


def test_home_is_below_the_users_data(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert EsperSettings.read({}).runs_path == tmp_path / "esper" / "runs"
    assert EsperSettings.read({"ESPER_RUNS_DIR": "/r"}).runs_path.as_posix() == "/r"


def test_nothing_is_recorded_unless_that_is_asked_for(home):
    assert recording_of(EsperSettings.read(os.environ), "one", {}) is None


def test_a_recording_at_home_has_a_card_that_follows_the_run(home, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(home_module.time, "monotonic", lambda: clock.now)
    environ = {"ESPER_RECORD": "true", "ESPER_NAME": "base", "ESPER_TAGS": "team=vision"}
    settings = EsperSettings.read({**os.environ, **environ})
    config: dict[str, str | int | float | bool] = {"--lr": 0.1}
    recording = recording_of(settings, "one/two", config)
    recording.card.totals = totals = SimpleNamespace(
        steps=0, first_unix_nano=5, last_unix_nano=9, first_loss=None, last_loss=None
    )
    totals.decisions, totals.applied = Counter(), Counter()
    recording.append(Signal.METRICS, b"body")
    (run,) = runs_in(home)
    assert run.folder.parent == home
    assert (run.card.run, run.card.name, run.card.tags) == (
        "one/two",
        "base",
        {"team": "vision"},
    )
    assert (run.card.config, run.card.steps, run.state) == (config, 0, RUNNING)
    totals.steps, totals.last_loss = 3, 0.25
    totals.decisions["PAUSE", "loss_spike"] = 2
    recording.append(Signal.METRICS, b"body")
    assert run_at(run.folder).card.steps == 0  # it is not written with every request
    clock.now += REFRESH_S
    recording.append(Signal.METRICS, b"body")
    card = run_at(run.folder).card
    assert (card.steps, card.last_loss, card.decisions) == (3, 0.25, 2)
    assert not remove(run)  # while somebody writes it
    recording.card.ended = "exception ValueError"
    recording.close()
    (run,) = runs_in(home)
    assert (run.state, run.card.began_unix_nano) == ("exception ValueError", 5)
    assert run.recordings == list(recording.paths)
    assert sorted(path.suffix for path in run.folder.iterdir()) == [".json", ".otlp"]


def test_other_ranks_record_beside_the_first_and_keep_no_card(home):
    for rank in (0, 1):
        changes = {"record": True, "rank": rank, "world_size": 2}
        recording = recording_of(EsperSettings.read(os.environ, **changes), "one", {})
        recording.append(Signal.METRICS, b"body")
        recording.close()
    (run,) = runs_in(home)
    assert [path.name for path in run.recordings] == [
        "one-rank0.metrics.otlp",
        "one-rank1.metrics.otlp",
    ]
    assert (run.card.ranks, run.attempts) == (2, 1)


def test_a_folder_of_ones_own_has_no_card_and_is_not_at_home(home, tmp_path):
    settings = EsperSettings.read(os.environ, record=True, recording_dir=str(tmp_path / "own"))
    recording = recording_of(settings, "one", {})
    recording.append(Signal.METRICS, b"body")
    recording.close()
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["one-rank0.metrics.otlp"]
    assert list(runs_in(home)) == []


def test_a_card_that_cannot_be_written_disturbs_nobody(tmp_path, caplog):
    keeper = CardKeeper(RunCard(run="one"), {})
    keeper.begin(tmp_path / "gone", 1)
    keeper.close()
    assert "the card of the run could not be written" in caplog.text


# What is found there.


def test_what_is_not_ours_is_passed_over(home):
    put(home, "one")
    (home / "notes.txt").write_text("x")
    (home / "empty").mkdir()
    for name, text in (("no-json", "{"), ("other", '{"steps": "many"}'), ("bytes", "\udcff")):
        (home / name).mkdir()
        (home / name / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert ids(runs_in(home)) == ["one"]
    assert list(runs_in(home / "nowhere")) == []


def test_a_run_is_found_by_id_by_name_and_by_the_beginning_of_its_id(home):
    put(home, "2026-a", age_days=2, name="base")
    put(home, "2026-b", age_days=1, name="base")
    put(home, "2027-c", name="2026-a")
    assert [
        found_by(word, home)[0].card.run for word in ("2026-a", "base", "2027", "2026-b")
    ] == [*("2026-a", "2026-b", "2027-c", "2026-b")]
    assert found_by("base", home)[1] == 2
    assert found_by("2026", home) == (None, 2)
    assert found_by("", home) == found_by("x", home) == (None, 0)


def test_runs_are_chosen_by_name_and_tags(home):
    put(home, "a", name="resnet-1", tags={"team": "vision", "lr": "0.1"})
    put(home, "b", name="resnet-2", tags={"team": "text"})
    put(home, "c")

    def chosen(name="", **tags):
        return sorted(ids(matching(runs_in(home), name, tags)))

    assert chosen() == ["a", "b", "c"]
    assert chosen("resnet*") == ["a", "b"]
    assert chosen("c") == ["c"]
    assert chosen(team="v*") == ["a"]
    assert chosen("resnet*", lr="0.2") == []


def test_one_that_is_written_is_told_by_its_lock_and_a_killed_one_by_its_absence(home):
    put(home, "one", ended="")
    (run,) = runs_in(home)
    assert (is_written(run), run.state) == (False, CUT_OFF)
    with run.recordings[0].open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert (is_written(run), run.state) == (True, RUNNING)
    assert run.state == CUT_OFF


def test_a_file_system_without_locks_goes_by_the_age_of_the_card(home, monkeypatch):
    put(home, "fresh", ended="")
    put(home, "old", age_days=1, ended="")
    put(home, "done")

    def flock(*_):
        raise OSError("no locks")

    monkeypatch.setattr(home_module.fcntl, "flock", flock)
    states = {run.card.run: run.state for run in runs_in(home)}
    assert states == {"fresh": RUNNING, "old": CUT_OFF, "done": "done"}


# The commands.


def test_runs_are_listed_the_newest_first(home, capsys):
    put(home, "one", age_days=1, name="base\x1b[2J", tags={"team": "vision"}, decisions=3)
    put(home, "two", attempts=(1, 2), last_loss=None, steps=12_345)
    assert main(["runs"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert " ".join(head.split()) == "run began steps loss decisions ended size tags"
    sizes = r"[\d.]+ [kM]?B"
    for line, expected in zip(
        lines,
        (
            rf"two +2026-09-21 14:13 +12,345 +– +0 +done, attempt 2 +{sizes}",
            rf"base\\x1b\[2J \(one\) +2026-09-20 14:13 +4 +0\.5 +3 +done +{sizes} +team=vision",
        ),
        strict=True,
    ):
        assert re.fullmatch(expected, line), line


def test_runs_as_json_have_all_that_is_known(home, capsys):
    put(home, "one", config={"--lr": 0.1}, tags={"a": "b"})
    assert main(["runs", "--json"]) == 0
    (told,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert told["config"] == {"--lr": 0.1}
    assert (told["run"], told["state"], told["attempts"]) == ("one", "done", 1)
    assert told["folder"] == str(home / "one")
    assert told["bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runs"], 0),
        (["runs", "--name", "x*"], 0),
        (["runs", "--tag", "team"], 2),
        (["runs", "--dir", "/nowhere"], 2),
        (["runs", "prune"], 2),
        (["runs", "prune", "--older-than", "soon"], 2),
        (["runs", "prune", "--more-than", "many"], 2),
        (["runs", "prune", "--keep", "-1"], 2),
    ],
)
def test_calls_that_find_nothing_and_mistakes_of_a_call(home, arguments, expected, capsys):
    with suppress(SystemExit):  # argparse's own way to refuse
        assert main(arguments) == expected
    out, err = capsys.readouterr()
    assert ("no runs" in out) == (expected == 0)
    assert "Traceback" not in err
    assert bool(err) == (expected == 2)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--older-than", "36h"], ["d", "c"]),
        (["--keep", "1"], ["d"]),
        (["--more-than", "25kB"], ["d", "c"]),
        (["--more-than", "1GB"], ["d", "c", "b", "a"]),
        (["--keep", "3", "--older-than", "2.5d"], ["d", "c", "b"]),
        (["--keep", "0", "--name", "b"], ["d", "c", "a"]),
        (["--keep", "0", "--tag", "k=a"], ["d", "c", "b"]),
    ],
)
def test_what_is_pruned(home, capsys, options, left):
    for age, run in enumerate("dcba"):
        put(home, run, age_days=age, size=10_000, tags={"k": run})
    assert main(["runs", "prune", *options, "--yes"]) == 0
    assert ids(runs_in(home)) == left
    assert sorted(path.name for path in home.iterdir()) == sorted(left)


def test_a_choice_before_the_word_counts_as_well(home):
    put(home, "a")
    put(home, "b")
    assert main(["runs", "--name", "a", "prune", "--keep", "0", "--yes"]) == 0
    assert ids(runs_in(home)) == ["b"]


def test_without_yes_somebody_has_to_be_asked(home, capsys, monkeypatch):
    put(home, "a")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    assert main(["runs", "prune", "--keep", "0"]) == 2
    assert "this run would go" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    for answer, status, left in (("", 1, ["a"]), ("no", 1, ["a"]), ("y", 0, [])):
        monkeypatch.setattr("builtins.input", lambda prompt, answer=answer: answer)
        assert main(["runs", "prune", "--keep", "0"]) == status
        assert ids(runs_in(home)) == left


def test_neither_a_run_under_way_nor_a_file_of_the_users_is_removed(home, capsys):
    folder = put(home, "busy", age_days=9)
    other = put(home, "done", age_days=9)
    (other / "notes.txt").write_text("mine")
    with (folder / "busy-rank0.metrics.otlp").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert main(["runs", "prune", "--older-than", "1d", "--yes"]) == 0
    assert ids(runs_in(home)) == ["busy"]
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_show_report_and_export_take_a_name(home, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(home, "2026-a", age_days=1, name="base")
    put(home, "2026-b", name="base")
    assert main(["show", "base", "--metrics", "loss"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"step={step} loss=0.5" for step in range(4)]
    assert err == ("esper-otel: show: 2 runs are called base; this is the newest, 2026-b\n")
    assert main(["report", "2026-a", "2026-b", "-o", "r.html"]) == 0
    assert "2026-a, 2026-b · esper-otel report" in (tmp_path / "r.html").read_text("utf-8")
    assert main(["export", "2026-a", "--to", "csv"]) == 0
    assert (tmp_path / "2026-a.csv").read_text("utf-8").count("\n") == 5


def test_top_takes_a_name_and_follows_all_of_the_runs_folder(
    home, capsys, tmp_path, monkeypatch
):
    socket = tmp_path / "nobody.sock"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPER_TAMIYO_SOCKET", str(socket))
    folder = put(home, "2026-a", name="base")
    put(home, "2027-b", name="other")
    recorded(folder / "2026-a-rank1.metrics.otlp", frames(4, run="2026-a", rank=1, loss=float))
    for word in ("base", "2026-a", "2026"):
        assert main(["top", word, "--once"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(" 2026-a  rank 0 of 2  step 3  loss 0.5")
        assert err == ""
    assert main(["top", "base", "other", "--once"]) == 0
    assert "2 runs" in capsys.readouterr().out
    # What is no run at home may be one of Tamiyo's, which alone is asked with --socket.
    for asked in (["third"], ["base", "--socket", str(socket)]):
        assert main(["top", *asked, "--once"]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"esper-otel: top: {socket}: no sidecar listens there; start one")


def test_a_file_wins_over_a_name_and_what_is_neither_is_said(
    home, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    put(home, "base")
    recorded(tmp_path / "base", frames(1, loss=lambda step: 7.0))
    assert main(["show", "base", "--metrics", "loss"]) == 0
    assert capsys.readouterr().out == "step=0 loss=7\n"
    assert main(["show", "nobody"]) == 1
    assert capsys.readouterr().err == "esper-otel: show: nobody: No such file or directory\n"


# How it is asked for.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--record train.py --lr 3", ["--record=", "train.py", "--lr", "3"]),
        ("--record runs train.py", ["--record=runs", "train.py"]),
        ("--record=runs train.py", ["--record=runs", "train.py"]),
        ("--record --enforce train.py", ["--record=", "--enforce", "train.py"]),
        ("--record -m pkg --record x", ["--record=", "-m", "pkg", "--record", "x"]),
        ("--record torchrun train.py", ["--record=", "torchrun", "train.py"]),
        ("--record script", ["--record=", "script"]),
        ("--record env torchrun t.py", ["--record=", "env", "torchrun", "t.py"]),
        ("--record ./env t.py", ["--record=./env", "t.py"]),
        ("--name --record --record d t.py", ["--name", "--record", "--record=d", "t.py"]),
        ("train.py --record x y", ["train.py", "--record", "x", "y"]),
    ],
)
def test_record_stands_alone_or_with_a_folder(words, expected):
    assert spelled_out(["run", *words.split()]) == ["run", *expected]


def test_a_script_that_is_a_file_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").write_text("")
    assert spelled_out(["run", "--record", "train", "x"]) == ["run", "--record=", "train", "x"]


def test_options_become_the_environment_of_the_script(monkeypatch, tmp_path):
    given = {}

    def execute(script, environ, **_):
        given.update(environ, script=script)
        raise SystemExit(0)  # as the script takes the place of this process

    monkeypatch.setattr("esper_otel.integrations.startup.execute", execute)
    (tmp_path / "t.py").write_text("")
    script = [str(tmp_path / "t.py"), "--name", "its own"]
    tags = ["--tag", "team=vision", "--tag", "what=a,b=c"]
    with pytest.raises(SystemExit):
        main(["run", "--record", "--name", "my run", *tags, *script])
    assert given["script"] == [sys.executable, *script]
    settings = EsperSettings.read(given)
    assert (settings.record, settings.recording_dir, settings.name) == (True, "", "my run")
    assert parse_tags(settings.tags) == {"team": "vision", "what": "a,b=c"}
    assert settings.labels == {
        "esper.run.name": "my run",
        "esper.run.tag.team": "vision",
        "esper.run.tag.what": "a,b=c",
    }


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("ESPER_TAGS", "team", "expected tags like team=vision"),
        ("ESPER_TAGS", "=x", "expected tags like team=vision"),
        ("ESPER_TAGS", "a b=x", "expected tags like team=vision"),
        ("ESPER_TAGS", "a=" + "x" * 257, "tag a: expected at most 256 printable characters"),
        ("ESPER_TAGS", "a=%0A", "tag a: expected at most 256 printable characters"),
        (
            "ESPER_TAGS",
            ",".join(f"k{n}=1" for n in range(33)),
            "expected at most 32 tags, got 33",
        ),
        ("ESPER_NAME", "a\nb", "expected at most 256 printable characters"),
        ("ESPER_NAME", "x" * 257, "expected at most 256 printable characters"),
    ],
)
def test_a_name_or_tags_that_cannot_be_are_refused(setting, value, expected):
    with pytest.raises(SettingsError) as caught:
        EsperSettings.read({setting: value})
    assert str(caught.value).startswith(f"{setting}=")
    assert expected in str(caught.value)


def test_tags_in_python_are_a_dictionary_and_come_back():
    tags = {"team": "vision", "odd": "a,b=c%d /:", "n": 3}
    settings = EsperSettings.read({}, tags=tags)
    assert parse_tags(settings.tags) == {"team": "vision", "odd": "a,b=c%d /:", "n": "3"}
    assert parse_tags(format_tags({})) == {}
