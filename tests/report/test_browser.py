"""Reports in a real browser: they open, draw, answer to mouse and keys, and ask nobody."""

import subprocess
import sys

import pytest

from esper_otel.report import write_report
from ops.stack.programs import ROOT
from report.made import JOURNAL, frames, logs, recorded, spans

READY = "html[data-drawn=all]"


@pytest.fixture
def opened(tabs, tmp_path):
    """Opens a report; at the end nothing may have been asked for but the file."""

    def open_report(*paths, **context):
        to = tmp_path / "report.html"
        write_report(paths, to)
        page = tabs.open(**context)
        page.goto(to.as_uri())
        page.wait_for_selector(READY, state="attached")
        return page

    yield open_report
    assert {url.split(":")[0] for url in tabs.requests} == {"file"}
    assert len(tabs.requests) == len(tabs.contexts)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Two ranks, seeds, decisions of spans and of a journal, events."""
    folder = tmp_path_factory.mktemp("recording")
    for rank in (0, 1):
        made = frames(
            200,
            rank=rank,
            instance=f"i{rank}",
            seeds=["seed-a"],
            loss=lambda s: 2.0 / (1 + s / 10),
            loss_ewma=lambda s: 2.0 / (1 + s / 10),
            loss_volatility=lambda s: 0.1,
            gradient_norm=lambda s: 1 + s % 7,
            optimizer_lr=lambda s: 0.01,
            lr_scale=lambda s: 1.0 if s < 30 else 0.5,
            step_latency_ms=lambda s: 10.0,
            input_wait_ms=lambda s: 1.0,
            forward_ms=lambda s: 4.0,
            backward_ms=lambda s: 4.0,
            optimizer_ms=lambda s: 1.0,
            cpu_util_percent=lambda s: 50.0,
        )
        recorded(folder / f"run-rank{rank}.metrics.otlp", made)
    spans(folder / "run-rank0.traces.otlp", "run", 30, 31, 120)
    logs(folder / "run-rank0.logs.otlp", "run", "seed-a", "It germinated.")
    (folder / "journal-000001.jsonl").write_text(JOURNAL)
    return folder


INK = """
figure => {
  const canvas = figure.querySelector("canvas");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colors = new Set();
  for (let i = 0; i < data.length; i += 4)
    if (data[i + 3] > 200) colors.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
  return colors.size;
}
"""


def chart(page, title):
    return page.locator(f'figure[aria-label="Chart: {title}"]')


def x_range(page):
    return page.evaluate(
        "() => { const x = esperReport.charts[0].plot.scales.x; return [x.min, x.max]; }"
    )


def test_every_chart_has_curves(opened, recording):
    page = opened(recording)
    titles = page.locator("#charts figure:not([hidden])").evaluate_all(
        "all => all.map(one => one.getAttribute('aria-label').slice(7))"
    )
    assert titles == [
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Step time by phase",
        "Step time",
        "Input wait",
        "Devices",
        "Seeds: stage",
        "Seeds: alpha",
    ]
    for title in titles:
        assert chart(page, title).evaluate(INK) > 3, title
    assert page.title() == "run · esper-otel report"
    assert page.locator("#rules .lane rect").count() >= 1


def test_a_decision_is_clicked_in_the_table(opened, recording):
    page = opened(recording)
    page.get_by_role("button", name="steps 30 to 31").click()
    panel = page.locator("#detail")
    assert panel.is_visible()
    told = panel.inner_text()
    for words in (
        "run/0/30",
        "PAUSE HIGH",
        "The loss leapt.",
        "loss_delta above 2",
        "mode enforce",
        "improved: loss is back to its earlier value",
        "lr_scale",
    ):
        assert words in told
    page.keyboard.press("Escape")
    assert not panel.is_visible()


def test_a_decision_is_clicked_on_the_chart(opened, recording):
    page = opened(recording)
    over = chart(page, "Loss").locator(".u-over")
    left = page.evaluate("() => esperReport.charts[0].plot.valToPos(120, 'x')")
    over.click(position={"x": left, "y": 40})
    assert "run/0/120" in page.locator("#detail").inner_text()


def test_decisions_are_walked_through_by_keys(opened, recording):
    page = opened(recording)
    page.keyboard.press("n")
    assert "run/0/30" in page.locator("#detail h2").inner_text()
    page.keyboard.press("n")
    assert "run/0/31" in page.locator("#detail h2").inner_text()
    page.keyboard.press("p")
    assert "run/0/30" in page.locator("#detail h2").inner_text()
    assert page.evaluate("document.activeElement.id") == "chosen"


def test_a_chart_is_read_zoomed_and_panned_by_keys(opened, recording):
    page = opened(recording)
    first = x_range(page)
    chart(page, "Loss").focus()
    page.keyboard.press("+")
    zoomed = x_range(page)
    assert zoomed[1] - zoomed[0] < first[1] - first[0]
    # The others follow.
    other = "() => esperReport.charts[1].plot.scales.x.min"
    assert page.evaluate(other) == zoomed[0]
    page.keyboard.press("Shift+ArrowRight")
    assert x_range(page)[0] > zoomed[0]
    page.keyboard.press("0")
    assert x_range(page) == first
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    legend = chart(page, "Loss").locator(".u-legend").inner_text()
    assert legend.replace("\n", "").startswith("step3rank 0 mean")
    assert legend.endswith("1.538")
    assert page.evaluate("() => esperReport.charts[0].plot.cursor.idx") == 3


def test_the_mouse_zooms_and_reads_the_recorded_value(opened, recording):
    page = opened(recording)
    over = chart(page, "Loss").locator(".u-over")
    left = page.evaluate("() => esperReport.charts[0].plot.valToPos(10, 'x')")
    over.hover(position={"x": left, "y": 100})
    legend = chart(page, "Loss").locator(".u-legend").inner_text()
    assert "10" in legend
    assert "1" in legend
    shown = page.evaluate("() => esperReport.charts[0].plot.data.map(one => one[10])")
    assert shown[0] == 10
    assert shown[-1] == 1.0
    box = over.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 60, steps=4)
    page.mouse.up()
    low, high = x_range(page)
    assert 0 < low < high < 199
    over.dblclick(position={"x": 50, "y": 50})
    assert x_range(page) == [0, 199]


def test_axis_scale_and_smoothing(opened, recording):
    page = opened(recording)
    page.get_by_role("radio", name="time").check()
    page.wait_for_selector(READY, state="attached")
    assert x_range(page)[1] == pytest.approx(1.99)
    page.get_by_label("log scale").check()
    page.wait_for_selector(READY, state="attached")
    assert page.evaluate("() => esperReport.charts[0].plot.scales.y.distr") == 3
    page.locator("#smoothing").fill("0.6")
    page.wait_for_function("() => esperReport.charts[1].plot.series.length === 5")
    norms = page.evaluate("() => esperReport.charts[1].plot.data.slice(1, 3)")
    last, expected = 0.0, []
    for count, value in enumerate(norms[0], 1):  # as TensorBoard does it
        last = last * 0.6 + 0.4 * value
        expected.append(last / (1 - 0.6**count))
    assert norms[1] == pytest.approx(expected)


def test_ranks_are_hidden_and_other_metrics_unfold(opened, recording):
    page = opened(recording)
    lines = "() => esperReport.charts[1].plot.series.length"
    assert page.evaluate(lines) == 3
    page.get_by_label("rank 1").uncheck()
    page.wait_for_selector(READY, state="attached")
    assert page.evaluate(lines) == 2
    page.locator("#all-metrics summary").click()
    page.wait_for_selector("#rest canvas")


def test_dark_and_light(opened, recording):
    backs = []
    for scheme in ("light", "dark"):
        page = opened(recording, color_scheme=scheme)
        backs.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert chart(page, "Loss").evaluate(INK) > 3
    assert backs == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]
    page.emulate_media(media="print")
    assert not page.locator("#controls").is_visible()


def test_it_is_printed_light_and_as_wide_as_paper(opened, recording):
    page = opened(recording, color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    widths = page.evaluate("esperReport.charts.filter(c => c.plot).map(c => c.plot.width)")
    assert max(widths) <= 690
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.wait_for_selector(READY, state="attached")
    assert page.evaluate("esperReport.charts[0].plot.width") > 1000
    assert page.pdf().startswith(b"%PDF")


def test_several_runs_are_compared(opened, recording, tmp_path):
    made = frames(150, run="other", loss=lambda s: 3.0, step_latency_ms=lambda s: 20.0)
    page = opened(recording, recorded(tmp_path / "other.metrics.otlp", made))
    table = page.locator("#differences").inner_text()
    for words in ("Differences", "other", "mean step", "20 ms", "decisions: loss_spike"):
        assert words in table
    page.get_by_label("Show other").uncheck()
    page.wait_for_selector(READY, state="attached")
    assert page.evaluate("() => esperReport.charts[1].plot.series.length") == 3


def test_evaluations_are_on_the_loss_and_what_a_script_reports_has_charts(opened, tmp_path):
    def evaluated(of):
        return lambda step: of(step) if step and step % 20 == 0 else None

    made = [
        frames(
            90,
            run=run,
            loss=lambda s: 2.0,
            **{
                "custom.val_loss": evaluated(lambda s, factor=factor: factor * s * s),
                "custom.val_acc": evaluated(lambda s: 0.5),
                "custom.kl <b>": lambda s: 0.1 * s,
            },
        )
        for run, factor in (("one", 1.0), ("two", 2.0))
    ]
    paths = [recorded(tmp_path / f"{some[0].run}.metrics.otlp", some) for some in made]
    page = opened(*paths)
    titles = page.locator("#charts figure:not([hidden])").evaluate_all(
        "all => all.map(one => one.getAttribute('aria-label').slice(7))"
    )
    assert titles[:3] == ["Loss", "Accuracy", "kl <b>"]
    loss = page.evaluate(
        """() => {
        const plot = esperReport.charts[0].plot;
        const place = plot.series.findIndex(s => s.label === "one val_loss");
        return plot.data[0].filter((_, i) => Number.isFinite(plot.data[place][i]));
        }"""
    )
    assert loss == [19, 39, 59, 79]
    assert chart(page, "kl <b>").evaluate(INK) > 3
    assert page.locator("#all-metrics").count() == 0  # each has its chart above
    assert "lowest val_loss" in page.locator("#differences").inner_text()


@pytest.mark.parametrize(
    "name", ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a\u202eb"]
)
def test_a_hostile_name_is_shown_and_does_nothing(opened, tmp_path, name):
    folder = tmp_path / "in"
    made = frames(5, run=name, seeds=[name], loss=float, step_latency_ms=float)
    recorded(folder / "x.metrics.otlp", made)
    spans(folder / "x.traces.otlp", name, 3, rule=name, text=name)
    logs(folder / "x.logs.otlp", name, name, name)
    page = opened(folder)
    page.keyboard.press("n")
    seen = name.replace("\u202e", "\\u202e")
    assert page.locator("#title").inner_text() == seen
    assert seen in page.locator("#detail").inner_text()
    assert page.locator("img, script").count() == 4


def test_a_journal_alone_opens(opened, tmp_path):
    path = tmp_path / "journal-000001.jsonl"
    path.write_text(JOURNAL)
    page = opened(path)
    assert "No curves" in page.locator("#charts").inner_text()
    page.keyboard.press("n")
    assert "run/0/30" in page.locator("#detail").inner_text()


def test_the_picture_of_the_docs_is_taken(browser, recording, tmp_path):
    to = tmp_path / "report.png"
    done = subprocess.run(
        [sys.executable, "-m", "ops.report_picture", str(recording), "-o", str(to)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"{to}\n", "")
    assert to.read_bytes().startswith(b"\x89PNG")


def test_what_could_not_be_read_is_said(opened, tmp_path):
    path = recorded(tmp_path / "r.metrics.otlp", frames(50, loss=float), at_once=10)
    path.write_bytes(path.read_bytes()[:-7])
    assert "read up to there" in opened(path).locator("#problems").inner_text()
