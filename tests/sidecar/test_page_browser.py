"""The sidecar's page in a real browser: it lists runs, opens one, and shows it go on."""

import os
import signal

import pytest

from sidecar.running import sidecar, until

HOSTILE = "<img src=x onerror=alert(1)>\u202e"
SHOWN = "<img src=x onerror=alert(1)>\\u202e"
DRAWN = "html[data-drawn=all]"


def ask(client, step, **values):
    return client.ask(
        step,
        **{
            "loss": 2.0 / (1 + step / 10),
            "gradient_norm": 1.0 + step % 7,
            "step_latency_ms": 10.0,
            "input_wait_ms": 1.0,
            "forward_ms": 4.0,
            "backward_ms": 3.0,
            "optimizer_ms": 1.0,
            "hook_latency_ms": 0.5,
            **values,
        },
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A sidecar with a page."""
    path = tmp_path_factory.mktemp("page") / "t.sock"
    with sidecar(path, "--ui", "127.0.0.1:0") as running:
        yield running


def train(running, name):
    """110 steps of a run, with a NaN that is decided about."""
    with running.client() as client:
        client.hello(run=name)
        for step in range(110):
            ask(client, step, **({"nonfinite": 1.0} if step == 100 else {}))


@pytest.fixture
def page(tabs, running):
    """An open page; at the end nothing may have been asked of others."""
    yield tabs.open()
    assert all(url.startswith((running.words["ui"], "data:")) for url in tabs.requests)


def open_run(page, running, name, shown=""):
    train(running, name)
    page.goto(running.words["ui"])
    page.get_by_role("link", name=shown or name, exact=True).click()
    page.wait_for_selector(DRAWN, state="attached")
    # The newest half second of it may be on its way.
    page.wait_for_function("() => esperReport.data.runs[0].ranks[0].last === 109")


LAST = "() => { const x = esperReport.charts[{}].plot.data[0]; return x[x.length - 1]; }"


def last_drawn(page, chart=0):
    return page.evaluate(LAST.replace("{}", str(chart)))


def test_a_run_is_found_opened_and_followed(page, running):
    open_run(page, running, HOSTILE, SHOWN)
    assert page.locator("#title").inner_text() == SHOWN
    page.wait_for_function(
        "() => document.getElementById('live').textContent.startsWith('Live')"
    )
    # A decision can be clicked.
    page.get_by_role("button", name="step 100", exact=True).click()
    told = page.locator("#detail").inner_text()
    assert "nonfinite_loss" in told
    assert "/0/100" in told
    # What comes is drawn: in the chart that is hovered, with the panel still open.
    chart = page.locator('figure[aria-label="Chart: Loss"] .u-over')
    chart.hover(position={"x": 100, "y": 50})
    with running.client() as client:
        client.hello(run=HOSTILE)
        for step in range(110, 160):
            ask(client, step)
        page.wait_for_function("() => esperReport.charts[0].plot.scales.x.max === 159")
        ask(client, 160, nonfinite=1.0, accuracy=0.5)
        page.wait_for_function(LAST.replace("{}", "0").replace("; }", " >= 160; }"))
        assert page.evaluate("() => esperReport.charts[0].plot.scales.x.max") == 160
        assert page.get_by_role("button", name="step 160", exact=True).count() == 1
        assert "/0/100" in page.locator("#detail").inner_text()
        # A metric that is new gets its chart.
        page.wait_for_selector('figure[aria-label="Chart: Accuracy"] canvas')
        assert page.evaluate("() => esperReport.data.runs[0].ranks[0].count") == 161
        page.keyboard.press("Escape")
        # What somebody zoomed to stays, and what comes meanwhile is there afterwards.
        page.locator('figure[aria-label="Chart: Loss"]').focus()
        page.keyboard.press("+")
        zoomed = page.evaluate("() => esperReport.state.range")
        for step in range(161, 171):
            ask(client, step)
        page.wait_for_function("() => esperReport.data.runs[0].ranks[0].last === 170")
        assert page.evaluate("() => esperReport.state.range") == zoomed
        page.keyboard.press("0")
        page.wait_for_function(
            "() => Math.round(esperReport.charts[0].plot.scales.x.max) === 170"
        )
        # Only the newest steps, as they come.
        page.get_by_label("Steps shown").select_option("newest 100")
        ask(client, 171)
        page.wait_for_function("() => esperReport.charts[0].plot.scales.x.max === 171")
        assert page.evaluate("() => esperReport.charts[0].plot.scales.x.min") == 71
    values = page.evaluate(
        "() => { const c = esperReport.data.runs[0].ranks[0].curves.loss;"
        " return [Array.from(c.x), Array.from(c.y)]; }"
    )
    assert values[0] == list(range(172))
    assert values[1] == pytest.approx([2.0 / (1 + step / 10) for step in range(172)], rel=1e-6)


def test_the_phases_of_a_step_are_a_waterfall(page, running):
    open_run(page, running, "waterfall")
    step = page.locator("#step")
    assert step.locator("input").input_value() == "109"
    lines = step.locator(".lanes > span").all_inner_texts()
    assert lines == [
        "waterfall, 10 ms",
        "instrumentation 0.5 ms",
        "input wait 1 ms",
        "forward 4 ms",
        "backward 3 ms",
        "optimizer 1 ms",
        "in no phase 0.5 ms",
    ]
    starts = step.locator(".lane:nth-child(n+3) rect").evaluate_all(
        "all => all.map(one => Math.round(Number(one.getAttribute('x'))))"
    )
    assert starts == [0, 50, 150, 550, 850, 950]
    step.locator("input").fill("42")
    step.locator("input").press("Enter")
    assert step.locator("input").input_value() == "42"
    step.get_by_role("button", name="newest").click()
    assert step.locator("input").input_value() == "109"


def test_runs_are_laid_over_one_another(page, running):
    train(running, "first")
    with running.client() as client:
        client.hello(run="other")
        for step in range(50):
            ask(client, step, loss=1200.0)
    page.goto(running.words["ui"])
    page.get_by_label("Mark other").check()
    assert "1,200 → 1,200" in page.locator("#runs tr", has_text="other").inner_text()
    assert page.locator("#over").is_disabled()
    page.get_by_label("Mark first").check()
    page.locator("#over").click()
    page.wait_for_selector(DRAWN, state="attached")
    table = page.locator("#differences").inner_text()
    for words in ("Differences", "other", "last loss"):
        assert words in table


def test_a_page_whose_sidecar_is_replaced_loads_all_again(page, running):
    open_run(page, running, "replaced")
    pid = running.status()["page"]["pid"]
    # It is gone and back between two questions.
    page.route("**/news?*", lambda route: route.fulfill(status=204))
    os.kill(pid, signal.SIGKILL)
    until(lambda: running.status()["page"]["pid"] not in (None, pid))
    until(lambda: running.status()["page"]["state"] == "working")
    before = page.evaluate("() => esperReport.data.version")
    page.unroute("**/news?*")
    page.wait_for_function(f"() => esperReport.data.version > {before}")
    page.wait_for_selector(DRAWN, state="attached")
    assert last_drawn(page) == 109
