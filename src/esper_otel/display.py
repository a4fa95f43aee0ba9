"""Display: a run as a notebook shows it, and the page it makes of itself at any time."""

from __future__ import annotations

import base64
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, Any

from esper_otel.leyline.terminal import counted, printable

if TYPE_CHECKING:
    from esper_otel.final_report import FinalReport
    from esper_otel.settings import EsperSettings
    from esper_otel.stream import Stream, StreamReport
    from esper_otel.stream.totals import RunTotals

WIDTH, HEIGHT, EDGE = 480, 120, 8
"""Of the chart, and what is free around it, in pixels."""

PARTS = 64
"""Points of the chart at most."""

EVERY_S = 2.0
"""Between two looks whether what a notebook shows is still so."""

SHOWN = 8
"""Decisions that are listed; the newest ones."""

# Seen on white as well as on black: whether a notebook is dark is not known here.
_LINE, _FAINT = "#3987e5", "#808890"
_COLORS = {"WARNING": "#b8860b", "HIGH": "#e8590c", "CRITICAL": "#d6336c"}


class DisplayedRun:
    """The display of a run in a notebook, and its report."""

    if TYPE_CHECKING:
        settings: EsperSettings
        run_id: str
        _stream: Stream
        _final_report: FinalReport
        _finished: bool

        @property
        def stream_report(self) -> StreamReport:
            """The telemetry so far: produced, delivered, spooled and dropped."""

    @property
    def totals(self) -> RunTotals | None:
        """Sums over its steps so far; None where nothing is recorded."""
        return getattr(self._stream, "totals", None)

    def report_html(self) -> str:
        """The report about the run so far, as one self-contained HTML page.

        It is made from the run's recording (``recording_dir``, ``report``); notebooks always
        have one. Raises :class:`RuntimeError` without a recording, or without a step in it.
        Takes seconds for many steps, on the calling thread::

            Path("so-far.html").write_text(run.report_html())
        """
        return self._final_report.page_now(self.settings, self.run_id, self.stream_report)

    def _repr_html_(self) -> str:
        """A chart of the loss with decisions, and how the run is; without any script."""
        return run_card(self.run_id, self.totals)

    def _ipython_display_(self) -> None:
        """The same as the value of a cell, renewed there until the run is over."""
        _LiveCard(self).show()


class _LiveCard:
    """What a notebook shows of a run, renewed from a thread while the run goes on."""

    def __init__(self, run: DisplayedRun) -> None:
        self._run = weakref.ref(run)
        self._shown = run._repr_html_()

    def show(self) -> None:
        """Show it in the cell that is executed."""
        from IPython.display import HTML, display

        handle = display(HTML(self._shown), display_id=True)
        if handle is not None:  # else there is nobody to renew it for
            renew = threading.Thread(
                target=self._renew, args=(handle, HTML), name="esper-display", daemon=True
            )
            renew.start()

    def _renew(self, handle: Any, made: Callable[[str], Any]) -> None:
        is_over = False
        with suppress(Exception):  # a notebook that is gone; the training goes on
            while not is_over:
                time.sleep(EVERY_S)
                run = self._run()
                if run is None:
                    return
                is_over, card = run._finished, run._repr_html_()
                del run
                if card != self._shown:
                    self._shown = card
                    handle.update(made(card))


def run_card(run: str, totals: RunTotals | None) -> str:
    """A run in short as HTML: no script, no style sheet, nothing that is fetched."""
    name = f"<b>{escape(printable(run))}</b>"
    if totals is None or not totals.steps:
        return f"<div>{name}: no step yet</div>"
    parts = [counted(totals.steps, "step")]
    if totals.first_loss is not None and totals.last_loss is not None:
        parts.append(f"loss {totals.first_loss:.4g} → {totals.last_loss:.4g}")
    step_ms = totals.per_step("step_latency_ms")
    if step_ms:
        parts.append(f"{step_ms:.3g} ms a step")
    if totals.nonfinite_steps:
        parts.append(f"NaN or infinite in {counted(totals.nonfinite_steps, 'step')}")
    chart = chart_of(totals.losses.means(PARTS), totals)
    # An image, as notebooks that are not trusted show those and take SVG out of HTML.
    source = base64.b64encode(chart.encode()).decode()
    words = escape(", ".join(parts))
    return (
        f"<div>{name}: {words}<br>"
        f'<img alt="Loss: {words}" width="{WIDTH}" height="{HEIGHT}" '
        f'src="data:image/svg+xml;base64,{source}">'
        f"{''.join(_decisions(totals))}</div>"
    )


def chart_of(losses: Sequence[float | None], totals: RunTotals) -> str:
    """The SVG of a loss, None where it is not known, with triangles where decisions were."""
    known = [value for value in losses if value is not None and isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    size = high - low or 1.0

    def x(share: float) -> float:
        return EDGE + share * (WIDTH - 2 * EDGE)

    def y(value: float) -> float:
        return HEIGHT - EDGE - (value - low) / size * (HEIGHT - 3 * EDGE)

    last = max(len(losses) - 1, 1)
    lines: list[list[str]] = [[]]
    for place, value in enumerate(losses):
        if value is None or not isfinite(value):
            lines.append([])
        else:
            lines[-1].append(f"{x(place / last):.1f},{y(value):.1f}")
    drawn = "".join(
        f'<polyline points="{" ".join(line)}" fill="none" stroke="{_LINE}" stroke-width="1.6"/>'
        for line in lines
        if line
    )
    places = [
        (x(totals.marks.share_of(mark, totals.steps)), mark.severity)
        for mark in totals.marks.newest
    ]
    marks = "".join(
        f'<path d="M{at - 4:.1f} 2h8l-4 7z" fill="{_COLORS.get(severity, _FAINT)}"/>'
        for at, severity in places
    )
    ground = HEIGHT - EDGE + 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<path d="M{EDGE} {ground}H{WIDTH - EDGE}" stroke="{_FAINT}" stroke-width="1"/>'
        f"{drawn}{marks}</svg>"
    )


def _decisions(totals: RunTotals) -> Iterator[str]:
    newest = list(totals.marks.newest)[-SHOWN:]
    if not newest:
        return
    count = totals.decisions.total()
    yield f"<table><caption>{count:,} decisions and notices, the newest first</caption>"
    yield "<tr><th>step</th><th>decision</th><th>rule</th><th>applied</th></tr>"
    for step, action, severity, reason, applied in reversed(newest):
        what = "notice" if action == "CONTINUE" else action
        cells = (
            f"{step:,}",
            f"{what} {severity}",
            printable(reason),
            "yes" if applied else "no",
        )
        yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    yield "</table>"
