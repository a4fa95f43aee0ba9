"""The commands of ``tamiyo`` read what trainers read, and print whatever the terminal takes."""

import json
import os
import subprocess
import sys

import pytest

from esper_tamiyo.journaling.journal import default_folder
from testkit.patience import PATIENCE_S


def tamiyo(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "-m", "esper_tamiyo.cli", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        timeout=PATIENCE_S,
    )


def test_the_socket_of_the_environment_is_asked(tmp_path):
    path = tmp_path / "esper" / "mine.sock"
    done = tamiyo("ask", ESPER_TAMIYO_SOCKET=str(path))
    assert done.returncode == 1
    assert str(path) in done.stderr.decode()


def test_its_journal_lies_beside_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("ESPER_TAMIYO_SOCKET", raising=False)
    assert default_folder() == tmp_path / "state" / "esper" / "journal"
    monkeypatch.setenv("ESPER_TAMIYO_SOCKET", str(tmp_path / "mine.sock"))
    assert default_folder() == tmp_path / "mine.journal"
    assert default_folder(tmp_path / "mine.sock") == tmp_path / "mine.journal"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_that_is_not_utf_8_ends_no_command(tmp_path, encoding):
    environ = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    table = tmp_path / "t.yaml"
    text = "{{id: a, metric: loss, above: 1, severity: HIGH, action: PAUSE, text: {}}}"
    table.write_text(f"version: é-漢\nrules:\n  - {text.format('…')}\n", encoding="utf-8")
    done = tamiyo("check", str(table), **environ)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u6f22" in done.stdout
    assert tamiyo("table", **environ).returncode == 0
    schema = tamiyo("table", "--schema", **environ)
    assert json.loads(schema.stdout.decode(encoding))
    assert tamiyo("serve", "--help", **environ).returncode == 0


def test_with_standard_error_closed_output_has_what_is_output():
    shell = f"exec {sys.executable} -m esper_tamiyo.cli ask --socket /nowhere 2>&-"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (1, b"")
