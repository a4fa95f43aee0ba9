"""What is shown to people cannot pose as ours, and ordinary names stay as they are."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.terminal import (
    EscapingFilter,
    Lines,
    counted,
    discard_output,
    printable,
    printable_json,
    say,
    say_json,
    take_any_text,
    tell,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run-7/ü 漢字 🙂 \\n", "run-7/ü 漢字 🙂 \\n"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x7f\x80\x9b31m", r"\x7f\x80\x9b31m"),
        ("a\u202eb\u2066c\u2069", r"a\u202eb\u2066c\u2069"),
        ("a\u200b\u200d\ufeffb", r"a\u200b\u200d\ufeffb"),
        ("a\u2028b\u2029c\x85", r"a\u2028b\u2029c\x85"),
        ("\udc80\ud83d", r"\udc80\ud83d"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_is_not_seen_is_escaped(text, shown):
    assert printable(text) == shown


EVERY_TEXT = st.text(st.characters())


@given(EVERY_TEXT)
def test_any_text_is_one_line_that_is_escaped_once(text):
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)


VALUES = st.recursive(
    EVERY_TEXT | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(EVERY_TEXT, inner),
)


@given(VALUES)
def test_json_holds_the_same_values_and_shows_as_it_is(value):
    text = json.dumps(value, ensure_ascii=False, indent=1)
    shown = printable_json(text)
    assert json.loads(shown) == value
    assert all(line.isprintable() for line in shown.split("\n"))


def test_lines_are_escaped_one_by_one(capsys):
    say("one\ntwo", "three")
    assert capsys.readouterr().out == "one\\ntwo\nthree\n"


@pytest.fixture
def logged():
    """A logger as ours, and what it has written."""
    out = io.StringIO()
    log = logging.Logger("test")
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("ours: %(message)s"))
    handler.addFilter(EscapingFilter())
    log.addHandler(handler)
    return log, out


def test_records_are_escaped_and_ordinary_ones_left_alone(logged):
    log, out = logged
    log.warning("run %s ended in %d s", "x\nours: all is well\x1b[31m", 3)
    log.warning("100 %% of %s", "ü")
    log.warning("several:\n%s", Lines("one\x1b\ntwo"))
    assert out.getvalue() == (
        "ours: run x\\nours: all is well\\x1b[31m ended in 3 s\n"
        "ours: 100 % of ü\n"
        "ours: several:\none\\x1b\ntwo\n"
    )


def test_an_exceptions_text_begins_no_line(logged):
    log, out = logged
    try:
        raise ValueError("no\nours: all is well\x1b[2J")
    except ValueError:
        log.exception("failed")
    first, *others = out.getvalue().splitlines()
    assert first == "ours: failed"
    assert "  ours: all is well\\x1b[2J" in others
    assert all(line.startswith("  ") for line in others)


def test_a_record_that_cannot_be_made_into_text_raises_nothing(logged):
    log, _ = logged
    log.handlers[0].handleError = lambda record: None
    log.warning("%d", "no number")


def test_what_the_trainers_side_logs_is_escaped_whatever_handler_the_script_has():
    script = """
import logging
logging.basicConfig(format="script: %(message)s")
import esper_otel.leyline
logging.getLogger("esper_otel").warning("run %s", "x\\nscript: all is well")
logging.getLogger("mine").warning("one\\ntwo")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == "script: run x\\nscript: all is well\nscript: one\ntwo\n"


class Poor:
    """Something that a script has put in place of a stream: it writes, and no more."""

    def __init__(self, encoding="utf-8"):
        self.encoding = encoding
        self.text = ""

    def write(self, text):
        self.text += text


class Raising(Poor):
    def write(self, text):
        raise RuntimeError("no more")


def test_standard_error_that_is_closed_is_not_standard_output(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    say("lost", file=sys.stderr)
    tell("lost")
    monkeypatch.setattr("sys.stdout", None)
    say("lost")
    say_json("{}")
    take_any_text()
    discard_output()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stream", [Raising(), object(), io.BytesIO()])
def test_nothing_that_stands_for_a_stream_makes_telling_raise(monkeypatch, stream):
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("sys.stdout", stream)
    say("x", flush=True)
    say("x", file=sys.stderr, flush=True)
    tell("x")
    take_any_text()


def test_a_stream_without_flush_is_written_to(monkeypatch):
    monkeypatch.setattr("sys.stderr", poor := Poor())
    tell("x")
    assert poor.text == "x\n"


def test_what_an_encoding_has_no_bytes_for_is_escaped(monkeypatch):
    monkeypatch.setattr("sys.stdout", poor := Poor("latin-1"))
    say("é …")
    say_json('{"a":"é … 🙂"}')
    first, second = poor.text.splitlines()
    assert first == r"é \u2026"
    assert json.loads(second) == {"a": "é … 🙂"}
    assert poor.text.encode("latin-1")


def test_who_has_read_enough_of_the_output_ends_a_command(monkeypatch):
    class Gone(Poor):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    with pytest.raises(BrokenPipeError):
        say("x")
    monkeypatch.setattr("sys.stderr", Gone())
    say("x", file=sys.stderr)
    tell("x")


LAST_RESORT = """
import sys
from pathlib import Path
import esper_otel.leyline, logging
log = logging.getLogger("esper_otel")
log.warning("run %s", "x\\ny")
log.warning("esper-otel: %s", "once")
log.info("not told")
class Raising:
    def write(self, text): raise RuntimeError("no more")
stderr, sys.stderr = sys.stderr, Raising()
log.warning("lost")
log.warning("%d", "no number")
sys.stderr = stderr
logging.getLogger("esper_otel").addHandler(logging.NullHandler())
log.warning("the script's own handler has it")
"""


def test_where_the_script_has_no_handler_warnings_have_our_name_and_never_raise():
    done = subprocess.run([sys.executable, "-c", LAST_RESORT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "esper-otel: run x\\ny\nesper-otel: once\n"


def test_a_full_disk_leaves_the_exit_status_alone():
    script = "from esper_otel.leyline.terminal import tell; tell('x' * 9000)"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", script], stderr=full)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (1024, "1,024 steps")]
)
def test_what_is_counted_has_its_plural(count, text):
    assert counted(count, "step") == text
