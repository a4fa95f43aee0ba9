"""A run as a notebook shows it: what is in it, and that nothing in it can act."""

import base64
import queue
import re
import sys
import threading
import types
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from esper_otel.display import SHOWN, DisplayedRun, run_card
from esper_otel.leyline.decisions import Action, Decision, Finding, Severity
from esper_otel.leyline.frames import StepTimeline, step_row
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.stream.totals import MOST, RunTotals
from testkit.patience import PATIENCE_S

HOSTILE = "<script>alert(1)</script>\"'\u202e"


def totals_of(losses):
    rows = np.array([step_row() for _ in losses])
    rows[:, STEP_SLOT["step"]] = range(10, 10 + len(losses))
    rows[:, STEP_SLOT["loss"]] = losses
    rows[:, STEP_SLOT["step_latency_ms"]] = 5.0
    totals = RunTotals()
    totals.add(np.arange(len(losses)), rows)
    return totals


def decide(totals, step, reason="loss_spike", severity=Severity.HIGH, applied=False):
    decision = Decision(
        id=f"run/0/{step}",
        run="run",
        step=step,
        observed_step=step,
        action=Action.PAUSE,
        severity=severity,
        reason=reason,
        findings=[Finding(reason, Action.PAUSE, severity, "It leapt.", {})],
        table_version="1",
    )
    totals.count_decision(StepTimeline(step, 0, 1, [], decision=decision, applied=applied))


def svg_of(card):
    found = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', card)
    return ET.fromstring(base64.b64decode(found[1]))


def tags_of(card):
    tags = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, {name for name, _ in attrs}))

    Parser().feed(card)
    return tags


def test_a_run_without_a_step():
    assert run_card("run", None) == "<div><b>run</b>: no step yet</div>"
    assert run_card("run", RunTotals()) == "<div><b>run</b>: no step yet</div>"


def test_a_chart_of_the_loss_with_decisions():
    totals = totals_of([2.0, 1.0, np.nan, 0.5, 0.25])
    decide(totals, 12, applied=True)
    card = run_card("run", totals)
    assert "<b>run</b>: 5 steps, loss 2 → 0.25, 5 ms a step" in card
    assert "<td>12</td><td>PAUSE HIGH</td><td>loss_spike</td><td>yes</td>" in card
    svg = svg_of(card)
    lines = [each.get("points") for each in svg if each.tag.endswith("polyline")]
    assert [line.count(",") for line in lines] == [2, 2]  # with a gap
    assert lines[0].startswith("8.0,16.0 ")
    (mark,) = [each for each in svg if each.get("fill") == "#e8590c"]
    assert mark.get("d").startswith("M236.0 ")  # in the middle


def test_nothing_in_it_is_markup_or_acts():
    totals = totals_of([1.0, 2.0])
    decide(totals, 10, reason=HOSTILE)
    card = run_card(HOSTILE, totals)
    assert card.count("&lt;script&gt;") == 2
    assert "\\u202e" in card
    tags = tags_of(card)
    assert {tag for tag, _ in tags} == {
        *("div", "b", "br", "img", "table", "caption", "tr", "th", "td"),
    }
    assert {name for _, names in tags for name in names} == {"alt", "width", "height", "src"}


def test_it_stays_small_however_long_a_run_is():
    totals = totals_of(np.linspace(1, 0, 100_000))
    for step in range(1000):
        decide(totals, step)
    assert len(totals.marks.newest) == MOST
    card = run_card("run", totals)
    assert card.count("<td>PAUSE HIGH</td>") == SHOWN
    assert "1,000 decisions and notices" in card
    assert len(card) < 20_000


def test_losses_without_a_number():
    for losses in ([np.nan], [np.nan, np.nan], [1e308, -1e308], [7.0]):
        svg_of(run_card("run", totals_of(losses)))


class Handle:
    """Stands for a cell's output that is renewed."""

    def __init__(self):
        self.shown = queue.Queue()

    def update(self, card):
        self.shown.put(card)


class FakeRun(DisplayedRun):
    run_id = "run"
    _finished = False

    def __init__(self, totals):
        self._stream = types.SimpleNamespace(totals=totals)


@pytest.fixture
def cell(monkeypatch):
    """The cell of a notebook in which a run is shown."""
    handle = Handle()

    def display(card, display_id):
        assert display_id
        handle.update(card)
        return handle

    module = types.ModuleType("IPython.display")
    module.HTML, module.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("esper_otel.display.EVERY_S", 0.001)
    return handle


def displaying():
    return [thread for thread in threading.enumerate() if thread.name == "esper-display"]


def test_a_cell_is_renewed_until_the_run_is_over(cell):
    run = FakeRun(totals_of([2.0, 1.0]))
    run._ipython_display_()
    assert cell.shown.get(timeout=PATIENCE_S) == run._repr_html_()
    run._stream.totals = totals_of([2.0, 1.0, 0.5])
    assert "3 steps" in cell.shown.get(timeout=PATIENCE_S)
    run._stream.totals = totals_of([2.0] * 7)
    run._finished = True
    assert "7 steps" in cell.shown.get(timeout=PATIENCE_S)
    for thread in displaying():
        thread.join(PATIENCE_S)
    assert displaying() == []


def test_a_cell_that_is_gone_or_a_run_that_is_ends_it(cell, monkeypatch):
    run = FakeRun(totals_of([2.0, 1.0]))
    monkeypatch.setattr(cell, "update", lambda card: 1 / 0)
    sys.modules["IPython.display"].display = lambda card, display_id: cell
    run._ipython_display_()
    run._stream.totals = totals_of([2.0, 1.0, 0.5])
    other = FakeRun(totals_of([1.0]))
    other._ipython_display_()
    del other
    for thread in displaying():
        thread.join(PATIENCE_S)
    assert displaying() == []
