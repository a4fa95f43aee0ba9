"""An exported trace in Perfetto's own page: its trace processor finds what was recorded."""

import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from esper_otel.export import Format, export
from ops.stack import traces_page
from report.made import BEGAN_NS, STEP_NS, frames, logs, recorded, spans
from testkit import perfetto_page

STEPS = 60


@contextmanager
def served(folder, page):
    """The files of ``page``, and below ``/of-ours`` those of ``folder``."""

    class Both(SimpleHTTPRequestHandler):
        def translate_path(self, path):
            self.directory = str(folder if path.startswith("/of-ours/") else page)
            return super().translate_path(path.removeprefix("/of-ours"))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Both)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def shown(browser, tmp_path_factory):
    """Perfetto's page with the trace of a run of two ranks."""
    if missing := traces_page.missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("trace")
    for rank in (0, 1):
        made = frames(
            STEPS,
            rank=rank,
            instance=f"i{rank}",
            seeds=["seed-a"],
            loss=lambda s: 1.0 / (1 + s),
            step_latency_ms=lambda s: 10.0,
            forward_ms=lambda s: 4.0,
            backward_ms=lambda s: 5.0,
        )
        recorded(folder / f"run-rank{rank}.metrics.otlp", made)
    spans(folder / "run-rank0.traces.otlp", "run", 30)
    logs(folder / "run-rank0.logs.otlp", "run", "seed-a", "It germinated.")
    export([folder], Format.PERFETTO, folder / "run.perfetto-trace")
    with served(folder, traces_page.perfetto_page()) as url, browser.new_page() as page:
        page.goto(f"{url}/#!/?url={url}/of-ours/run.perfetto-trace")
        perfetto_page.wait_for_trace(page)
        yield page


def test_nothing_is_wrong_with_the_trace(shown):
    sql = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
    assert perfetto_page.asked(shown, sql, {"name": "text", "value": "number"}) == []


def test_ranks_are_processes_whose_steps_have_their_phases(shown):
    found = perfetto_page.asked(
        shown,
        "select p.name as process, s.name as name, s.depth as depth, count(*) as many,"
        " sum(s.dur) as took from slice s join process_track t on s.track_id = t.id"
        " join process p using (upid) where t.name = 'steps'"
        " group by p.name, s.depth, case s.depth when 0 then '' else s.name end"
        " order by p.name, s.depth, s.name",
        {
            "process": "text",
            "name": "text",
            "depth": "number",
            "many": "number",
            "took": "whole",
        },
    )
    assert [(process, name.split()[0], many) for process, name, _, many, _ in found] == [
        (f"run rank {rank}", name, STEPS)
        for rank in (0, 1)
        for name in ("step", "backward", "forward")
    ]
    took = [one[-1] / STEPS / 1e6 for one in found]
    assert took == pytest.approx([10, 5, 4] * 2, rel=1e-3)


def test_a_decision_is_there_with_what_it_saw(shown):
    found = perfetto_page.asked(
        shown,
        "select s.name as name, s.ts as ts, a.string_value as text from slice s"
        " join process_track t on s.track_id = t.id join args a using (arg_set_id)"
        " where t.name = 'decisions' and a.key = 'debug.loss_spike'",
        {"name": "text", "ts": "whole", "text": "text"},
    )
    ((name, time_ns, text),) = found
    assert (name, text) == ("PAUSE: loss_spike", "The loss leapt.")
    assert time_ns == pytest.approx(BEGAN_NS + 31 * STEP_NS, abs=512)


def test_seeds_and_metrics_are_tracks(shown):
    stages = perfetto_page.asked(
        shown,
        "select s.name as name from slice s join track t on s.track_id = t.id"
        " where t.name = 'seed-a'",
        {"name": "text"},
    )
    assert stages == [["TRAINING"]] * 2
    losses = perfetto_page.asked(
        shown,
        "select c.value as value from counter c join process_counter_track t"
        " on c.track_id = t.id join process p using (upid)"
        " where t.name = 'loss' and p.name = 'run rank 1' order by c.ts",
        {"value": "number"},
    )
    assert [value for (value,) in losses] == [1.0 / (1 + step) for step in range(STEPS)]
