"""What is shown to people cannot pose as ours, and ordinary names stay as they are."""

import io
import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.terminal import (
    EscapingFilter,
    Lines,
    printable,
    printable_json,
    say,
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
