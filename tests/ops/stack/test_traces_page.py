"""The page of traces: a list of what Jaeger has, and each as a trace of Perfetto."""

import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ops.stack import traces_page
from ops.stack.queries import is_page
from testkit import perfetto_page
from testkit.patience import PATIENCE_S

BEGAN_US = 1_790_000_000_000_000


@pytest.fixture(autouse=True)
def _packages():
    if missing := traces_page.missing():
        pytest.skip(f"not installed: {', '.join(missing)}")


def span(name, start, end, process="p1", **tags):
    told = [{"key": f"esper.{key.replace('_', '.')}", "value": tags[key]} for key in tags]
    times = {"startTime": BEGAN_US + start, "duration": end - start}
    return {"operationName": name, "processID": process, "tags": told, **times}


TRAINER = {
    "serviceName": "loop",
    "tags": [{"key": "esper.run_id", "value": "<b>run"}, {"key": "esper.rank", "value": 0}],
}
TRACE = {
    "traceID": "0a0b",
    "processes": {"p1": TRAINER, "p2": {"serviceName": "tamiyo", "tags": []}},
    "spans": [
        span("train.step", 0, 1000, step=7),
        span("train.forward", 100, 400),
        span("train.backward", 400, 900),
        # Collected within the next step: it lies beside this one and not within it.
        span("tamiyo.decide", 950, 1200, decision_action="PAUSE", decision_reason="loss_spike"),
        span("tamiyo.decide", 960, 970, "p2"),
    ],
}


@contextmanager
def served(server):
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Jaeger(BaseHTTPRequestHandler):
    """As much of Jaeger's API as the page asks for."""

    def do_GET(self):
        what = urllib.parse.urlsplit(self.path).path.removeprefix("/api/")
        known = {"services": ["loop"], "traces": [TRACE], "traces/0a0b": [TRACE]}
        body = json.dumps({"data": known.get(what)}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def page():
    if traces_page.missing():
        yield ""
        return
    with (
        served(ThreadingHTTPServer(("127.0.0.1", 0), Jaeger)) as jaeger,
        served(traces_page.server(0, jaeger)) as url,
    ):
        yield url


def answer(url, **headers):
    asked = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(asked, timeout=PATIENCE_S) as got:
        return got.headers, got.read()


def test_the_list_says_which_step_it_was_and_what_was_decided(page):
    headers, body = answer(f"{page}/")
    text = body.decode()
    for words in ("<td>7<", "PAUSE loss_spike", "1.0 ms", "&lt;b&gt;run", "14:13:20.000000"):
        assert words in text
    assert "<b>" not in text
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert is_page(f"{page}/")


def test_a_trace_has_a_process_for_each_rank_and_spans_within_spans(page):
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

    _, body = answer(f"{page}/trace?id=0a0b")
    packets = Trace.FromString(body).packet
    tracks = {p.track_descriptor.uuid: p.track_descriptor for p in packets}
    names = {one.process.process_name for one in tracks.values()} - {""}
    assert names == {"loop <b>run rank 0", "tamiyo"}
    found = {}
    for packet in packets:
        event = packet.track_event
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            found.setdefault(event.track_uuid, []).append(event.name)
        elif event.type == TrackEvent.TYPE_SLICE_END:
            found[event.track_uuid].append(packet.timestamp // 1000 - BEGAN_US)
    assert sorted(found.values(), key=len, reverse=True) == [
        ["train.step", "train.forward", 400, "train.backward", 900, 1000],
        ["tamiyo.decide", 1200],
        ["tamiyo.decide", 970],
    ]


def test_who_comes_by_another_name_or_while_jaeger_is_away_gets_no_trace(page):
    with pytest.raises(urllib.error.HTTPError) as refused:
        answer(f"{page}/trace?id=0a0b", Host="rebound.example:80")
    with refused.value as error:
        assert error.code == 403
    with (
        served(traces_page.server(0, "http://127.0.0.1:1")) as alone,
        pytest.raises(urllib.error.HTTPError) as away,
    ):
        answer(f"{alone}/")
    with away.value as error:
        assert error.code == 502
        assert b"Connection refused" in error.read()


def test_perfetto_opens_it_and_asks_nobody_else(page, browser):
    asked = []
    with browser.new_page() as shown:
        shown.on("response", lambda response: asked.append(response.url))
        shown.goto(page)
        shown.get_by_role("link", name="The newest").click()
        perfetto_page.wait_for_trace(shown)
        found = perfetto_page.asked(
            shown,
            "select s.name, s.dur, s.depth from slice s"
            " join process_track t on s.track_id = t.id order by s.ts, s.depth",
            {"name": "text", "dur": "whole", "depth": "number"},
        )
    assert found == [
        ["train.step", 1_000_000, 0],
        ["train.forward", 300_000, 1],
        ["train.backward", 500_000, 1],
        ["tamiyo.decide", 250_000, 0],
        ["tamiyo.decide", 10_000, 0],
    ]
    assert {urllib.parse.urlsplit(url).hostname for url in asked} - {None, ""} == {"127.0.0.1"}
