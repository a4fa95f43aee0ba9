"""Draws what the dashboards show, without Grafana.

``python -m ops.generate.dashboards.pictures`` starts the stack, sends the sample run, asks the
real Prometheus every query of the committed dashboards and draws the answers under the panels'
own titles and units. That is no Grafana: it shows that the queries answer, and what with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ops.generate.dashboards import answers
from ops.generate.dashboards.answers import Answer
from ops.generate.dashboards.json_files import FOLDER
from ops.generate.dashboards.panels import WIDTH
from ops.generate.dashboards.sample_run import RUN, send_sample_run
from ops.generate.files import ROOT
from ops.stack.programs import MissingError
from ops.stack.whole import running

COMMAND = "python -m ops.generate.dashboards.pictures"
PICTURES = ROOT / "docs" / "pictures"
STEPS, STEP_S, EVERY_S = 900, 1.0, 5.0
CHOSEN = {"run": RUN, "rank": ".*", "seed": ".*", "jaeger": "", "__interval": "5s"}
SPANS = {"__rate_interval": "60s", "__range": f"{STEPS}s"}
UNITS = {"ms": "ms", "s": "s", "percent": "%", "percentunit": "share", "decgbytes": "GB"}
COLORS = {"text": "#8e8e8e", "green": "#56a64b", "red": "#e02f44", "yellow": "#f2cc0c"}
COLORS |= {"blue": "#3274d9", "orange": "#ff780a", "purple": "#a352cc"}
COLORS |= {"super-light-blue": "#8ab8ff", "semi-dark-red": "#c4162a", "dark-red": "#8c0f1c"}
COLORS |= {"light-orange": "#ffb357"}
"""Grafana's names of those colours that our panels use."""


class Window:
    """A Prometheus, and the time that is looked at."""

    def __init__(self, url: str, begin_s: float) -> None:
        self.url = url
        self.begin_s = begin_s
        self.end_s = begin_s + STEPS * STEP_S

    def answer(self, target: dict[str, Any]) -> list[tuple[str, Answer]]:
        """The series of a query, each with what its panel calls it."""
        expr = answers.chosen(target["expr"], CHOSEN | SPANS)
        if target.get("instant"):
            found = answers.at(self.url, expr, self.end_s)
        else:
            found = answers.over(self.url, expr, self.begin_s, self.end_s, EVERY_S)
        return [(_legend(target.get("legendFormat", ""), one.labels), one) for one in found]

    def minutes(self, answer: Answer) -> list[float]:
        """Times of its points since the run began."""
        return [(time_s - self.begin_s) / 60 for time_s in answer.times]


def draw(dashboard: dict[str, Any], window: Window, path: Path) -> None:
    """One picture of a whole dashboard, panels where Grafana would have them."""
    panels: list[dict[str, Any]] = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(18, rows * 0.36), facecolor="white")
    grid = figure.add_gridspec(rows, WIDTH, left=0.03, right=0.99, top=0.975, bottom=0.015)
    for panel in panels:
        place = panel["gridPos"]
        top, left = place["y"], place["x"]
        if panel["type"] == "row":
            figure.text(0.01, 1 - (top + 0.7) / rows * 0.97 - 0.02, panel["title"], size=12)
            continue
        spot = grid[top : top + place["h"] - 1, left : left + place["w"]]
        axes = figure.add_subplot(spot)
        box = axes.get_position()
        # Room for the title above, and for the names of series beside.
        beside = 0.055 if panel["type"] == "state-timeline" else 0.008
        axes.set_position(
            (box.x0 + beside, box.y0, box.width - beside - 0.014, box.height * 0.86)
        )
        _panel(axes, panel, window)
    end = datetime.fromtimestamp(window.end_s, UTC)
    figure.suptitle(
        f"{dashboard['title']} · run {RUN}, made up, in Prometheus until {end:%H:%M} UTC · "
        "drawn from the panels' queries, not by Grafana",
        size=10,
        y=0.995,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=72, metadata={"Software": None})
    plt.close(figure)


def _panel(axes: Axes, panel: dict[str, Any], window: Window) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    unit = UNITS.get(defaults.get("unit", ""), "")
    title = panel["title"].replace("$run", RUN)
    axes.set_title(f"{title}{f' [{unit}]' if unit else ''}", size=8, loc="left")
    axes.tick_params(labelsize=6)
    found = [one for target in panel["targets"] for one in window.answer(target)]
    if panel["type"] == "stat":
        shown = f"{found[0][1].values[0]:.4g} {unit}" if found else defaults.get("noValue", "")
        axes.set_axis_off()
        axes.text(0.5, 0.35, shown, ha="center", size=15)
    elif panel["type"] == "state-timeline":
        (mapping,) = defaults["mappings"]
        _states(axes, found, mapping["options"], window)
    elif panel["type"] == "trend":
        _over_steps(axes, found, panel["options"]["xField"])
    else:
        _lines(axes, found, defaults.get("custom", {}), window)


def _lines(
    axes: Axes, found: list[tuple[str, Answer]], custom: dict[str, Any], window: Window
) -> None:
    axes.grid(alpha=0.25)
    axes.set_xlim(0, STEPS * STEP_S / 60)
    if not found:
        axes.text(0.5, 0.5, "No data", ha="center", transform=axes.transAxes, size=8)
        return
    names = [name for name, _ in found]
    if custom.get("stacking", {}).get("mode") == "normal":
        times = sorted({time_s for _, one in found for time_s in one.times})
        told = [dict(zip(one.times, one.values, strict=True)) for _, one in found]
        heights = [[points.get(time_s, 0.0) for time_s in times] for points in told]
        since = [(time_s - window.begin_s) / 60 for time_s in times]
        axes.stackplot(since, heights, labels=names, alpha=0.7)
    else:
        style = "o" if custom.get("drawStyle") == "points" else "-"
        for name, one in found:
            axes.plot(window.minutes(one), one.values, style, ms=3, lw=0.9, label=name)
    axes.legend(fontsize=5, loc="upper right", ncols=2, framealpha=0.6)


def _over_steps(axes: Axes, found: list[tuple[str, Answer]], axis: str) -> None:
    """Joined by time, as the panel has it done."""
    axes.grid(alpha=0.25)
    steps = {
        time_s: step
        for name, one in found
        if name == axis
        for time_s, step in zip(one.times, one.values, strict=True)
    }
    for name, one in found:
        points = [
            (steps[time_s], value)
            for time_s, value in zip(one.times, one.values, strict=True)
            if name != axis and time_s in steps
        ]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), lw=0.9, label=name)
    axes.set_xlabel(axis, size=6)
    axes.legend(fontsize=5, loc="upper right", framealpha=0.6)


def _states(
    axes: Axes, found: list[tuple[str, Answer]], options: dict[str, Any], window: Window
) -> None:
    axes.set_xlim(0, STEPS * STEP_S / 60)
    axes.set_ylim(0, max(len(found), 1))
    axes.set_yticks([row + 0.5 for row in range(len(found))], [name for name, _ in found])
    for row, (_, one) in enumerate(found):
        points = list(zip(window.minutes(one), one.values, strict=True))
        for value, group in groupby(points, key=lambda point: point[1]):
            times = [since for since, _ in group]
            state = options.get(f"{value:g}", {"text": f"{value:g}", "color": "text"})
            width = times[-1] - times[0] + EVERY_S / 60
            color = COLORS.get(state["color"], state["color"])
            axes.add_patch(Rectangle((times[0], row + 0.1), width, 0.8, color=color))
            if width > 0.6:
                axes.text(times[0] + 0.05, row + 0.42, state["text"], size=6, clip_on=True)


def _legend(form: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        form = form.replace(f"{{{{{name}}}}}", value)
    return form


def main(argv: Sequence[str] | None = None) -> int:
    """Draw them all; the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--folder", type=Path, default=PICTURES, help="default: %(default)s")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="esper-pictures-") as name:
        state = Path(name) / "stack"
        state.mkdir(mode=0o700)
        try:
            with running(state) as stack:
                begin_s = float(int(time.time() - STEPS * STEP_S - 20))
                send_sample_run(stack.url, Path(name), begin_s, STEPS, STEP_S)
                # The Collector hands over what it batches within a second; then it is there.
                time.sleep(3)
                window = Window(f"http://127.0.0.1:{stack.ports.prometheus}", begin_s)
                for path in sorted((ROOT / FOLDER).glob("*.json")):
                    picture = options.folder / f"{path.stem}.png"
                    draw(json.loads(path.read_text()), window, picture)
                    print(f"wrote {picture}")
        except MissingError as error:
            print(f"pictures: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
