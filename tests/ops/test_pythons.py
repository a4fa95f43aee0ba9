"""Which other Pythons the tests run on, and what is said where there are none."""

import sys
from pathlib import Path

import pytest

from ops import pythons
from ops.pythons import Python

ROOT = Path(__file__).parents[2]
OLD, NEW = Python((3, 11, 7), "/old"), Python((3, 14, 0), "/new")
BETWEEN = Python((3, 12, 1), "/between")


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(pythons, "here", lambda: [OLD, BETWEEN, NEW])


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_python_says_which_it_is():
    mine = pythons.asked(sys.executable)
    assert mine.version == sys.version_info[:3]
    assert Path(mine.path).exists()


def test_a_command_that_starts_none_is_none(tmp_path):
    assert pythons.asked(tmp_path / "nothing") is None
    assert (
        pythons.asked(script(tmp_path / "shim", "echo no such version >&2; exit 127")) is None
    )


def test_those_in_path_and_of_pyenv_are_found_once_for_each_version(tmp_path, monkeypatch):
    def python(folder, name, *version):
        folder.mkdir(parents=True)
        script(folder / name, f"echo {' '.join(map(str, version))} {folder / name}")

    python(tmp_path / "bin", "python3.12", 3, 12, 3)
    python(tmp_path / "pyenv" / "versions" / "3.12.9" / "bin", "python3", 3, 12, 9)
    python(tmp_path / "pyenv" / "versions" / "3.14.0" / "bin", "python3", 3, 14, 0)
    python(tmp_path / "pyenv" / "versions" / "3.9.1" / "bin", "python3", 3, 9, 1)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    found = [each for each in pythons.here() if each.path.startswith(str(tmp_path))]
    assert [each.version for each in found if each.minor in ("3.12", "3.14", "3.9")] == [
        (3, 12, 9),
        (3, 14, 0),
    ]


@pytest.mark.parametrize(
    ("running", "expected"), [((3, 11), [NEW]), ((3, 13), [NEW]), ((3, 14), [])]
)
def test_unnamed_it_is_the_newest_that_is_newer_than_this(three, running, expected):
    assert pythons.chosen([], running) == expected


def test_named_they_are_those(three):
    assert pythons.chosen(["3.12", "3.11"], (3, 14)) == [BETWEEN, OLD]
    (mine,) = pythons.chosen([sys.executable], (3, 14))
    assert mine.version == sys.version_info[:3]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("3.13", "pythons: PYTHONS=3.13: expected one of 3.11, 3.12, 3.14"),
        ("/no/such", "pythons: PYTHONS=/no/such: expected a Python with venv and ensurepip"),
    ],
)
def test_one_that_is_not_here_is_one_line(three, capsys, name, line):
    assert pythons.main([name]) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_where_there_is_no_other_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(pythons, "here", lambda: [OLD])
    assert pythons.main([]) == 0
    assert capsys.readouterr().out.startswith("pythons: no Python newer than ")


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Commands that are run, none of which does anything, and what the tests exit with."""
    commands = []
    status = {"pytest": 0}

    def run(command, **options):
        commands.append([str(word) for word in command])
        (Path(command[0]).parent / "tried").parent.mkdir(parents=True, exist_ok=True)
        if command[1:3] == ["-m", "venv"]:
            Path(command[3]).mkdir(parents=True, exist_ok=True)

    def call(command, **options):
        commands.append([str(word) for word in command])
        return status["pytest"]

    monkeypatch.setattr(pythons, "ROOT", tmp_path)
    monkeypatch.setattr(pythons.subprocess, "run", run)
    monkeypatch.setattr(pythons.subprocess, "call", call)
    new = Python((3, 14, 0), str(tmp_path / "python"))
    monkeypatch.setattr(pythons, "here", lambda: [new])
    return commands, status


def words(commands):
    return ["venv" if "venv" in each else each[2] for each in commands]


def test_an_environment_is_made_once_for_what_it_is_made_from(ran, capsys):
    commands, _ = ran
    assert pythons.main(["3.14"]) == 0
    assert words(commands) == ["venv", "pip", "pytest"]
    assert commands[1][-2:] == ["-e", ".[test]"]
    assert str(pythons.CONSTRAINTS) in commands[1]
    assert set(pythons.SELECTED) <= set(commands[2])
    del commands[:]
    assert pythons.main(["3.14"]) == 0
    assert words(commands) == ["pytest"]
    told = capsys.readouterr().out
    assert "the tests of torch, rules, reports, stack and benches did not run" in told
    del commands[:]
    assert pythons.main(["--torch", "3.14"]) == 0
    assert words(commands) == ["venv", "pip", "pytest"]
    assert commands[1][-1] == ".[demo,dev]"
    assert not set(pythons.SELECTED) & set(commands[2])


def test_what_fails_there_fails(ran):
    _, status = ran
    status["pytest"] = 1
    assert pythons.main(["3.14"]) == 1


def test_what_is_selected_is_there():
    assert all((ROOT / each).exists() for each in pythons.SELECTED)
