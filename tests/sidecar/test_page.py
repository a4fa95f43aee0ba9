"""The page of a real sidecar: what it serves, whom, and that it endangers nobody."""

import base64
import json
import os
import signal
import socket
import ssl
import urllib.error
import urllib.request

import pytest
import trustme

from esper_tamiyo.commands.sidecar import troubles_in
from sidecar.running import PATIENCE_S, sidecar, tamiyo, until
from testkit.report_data import unpacked_data

HOSTILE = "<img src=x onerror=alert(1)>\n'\"\u202e/../%2e"
TOKEN = "0123456789abcdef0123456789abcdef"


def get(url, path="", **headers):
    """(status, headers, body) of an answer, whatever it is."""
    request = urllib.request.Request(url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def index(url):
    return json.loads(get(url, "runs.json")[2])


def train(client, first, count, run="run"):
    """Steps of a run of which the last has a loss that Tamiyo decides about."""
    for step in range(first, first + count):
        loss = 2.0 / (1 + step)
        client.ask(step, loss=loss, gradient_norm=1.0, step_latency_ms=10.0, forward_ms=4.0)


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """A sidecar that has judged 300 steps of a run and heard its first NaN."""
    folder = tmp_path_factory.mktemp("page")
    with sidecar(folder / "t.sock", "--ui", "127.0.0.1:0") as running:
        with running.client() as client:
            client.hello(run=HOSTILE)
            train(client, 0, 100)
            client.ask(100, loss=0.5, nonfinite=1.0)
        url = running.words["ui"]
        until(lambda: any(run["decisions"] for run in index(url)["runs"]))
        yield running


def test_the_index_lists_the_runs(serving):
    url = serving.words["ui"]
    status, headers, body = get(url)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert HOSTILE.encode() not in body
    (run,) = until(lambda: [r for r in index(url)["runs"] if r["steps"] == 100])
    assert (run["name"], run["ranks"], run["ended"], run["loss"]) == (
        HOSTILE,
        1,
        "",
        [2.0, 0.5],
    )
    assert index(url)["problems"] == []


def test_a_run_has_a_page_its_data_and_its_news(serving):
    url = serving.words["ui"]
    (run,) = until(lambda: [r for r in index(url)["runs"] if r["steps"] == 100])
    status, headers, body = get(url, f"runs/{run['id']}")
    assert status == 200
    assert f'data-live="/runs/{run["id"]}"'.encode() in body
    for name, told in (
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", "frame-ancestors 'none'"),
    ):
        assert headers[name] == told
    data = unpacked_data(get(url, f"runs/{run['id']}/data")[2])
    assert data["runs"][0]["name"] == HOSTILE
    assert data["runs"][0]["ranks"][0]["count"] == 101
    words = data["runs"][0]["templates"][data["runs"][0]["decisions"][0][0]]
    assert words["reason"] == "nonfinite_loss"
    assert data["rules"]["nonfinite_loss"][0]
    news = f"runs/{run['id']}/news?since={data['version']}"
    assert get(url, news)[0] == 204
    with serving.client() as client:
        client.hello(run="another")
        train(client, 0, 5)
    until(lambda: len(index(url)["runs"]) == 2)
    assert get(url, news)[0] == 204  # it is no news of this one
    assert get(url, f"runs/{run['id']}/news?since=1")[0] == 205
    both = ",".join(each["id"] for each in index(url)["runs"])
    assert len(unpacked_data(get(url, f"runs/{both}/data")[2])["runs"]) == 2


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("nothing", 404),
        ("runs/", 404),
        ("runs/%2e%2e/%2e%2e/etc/passwd", 404),
        ("runs/x", 404),
        ("runs/0123456789abcdef", 200),  # the page itself says that the run is not known
        ("runs/0123456789abcdef/data", 205),
        ("runs/0123456789abcdef/news?since=7", 205),
        ("runs/0123456789abcdef/news?since=-7", 400),
        ("runs/0123456789abcdef/news", 400),
        ("runs/0123456789abcdef/else", 404),
        ("runs/" + ",".join(["0123456789abcdef"] * 9), 404),
        ("a" * 3000, 404),
        ("a" * 30_000, 400),
    ],
)
def test_what_is_not_there(serving, path, status):
    assert get(serving.words["ui"], path)[0] == status


def test_a_question_for_the_head_alone(serving):
    request = urllib.request.Request(serving.words["ui"], method="HEAD")
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        assert (answer.status, answer.read(), answer.headers["Server"]) == (200, b"", "tamiyo")
        assert int(answer.headers["Content-Length"]) > 1000


def test_nothing_can_be_done_but_look(serving):
    request = urllib.request.Request(serving.words["ui"], method="POST", data=b"x" * 100_000)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=PATIENCE_S)
    with caught.value as error:
        assert (error.code, error.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("LOCALHOST", 200),
        ("[::1]:8321", 200),
        ("evil.example:8321", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:1@evil.example", 403),
        ("", 403),
    ],
)
def test_a_name_that_was_made_to_mean_this_machine_is_refused(serving, host, status):
    assert get(serving.words["ui"], "runs.json", Host=host)[0] == status


def test_status_says_how_it_is(serving):
    done = tamiyo("status", "--socket", serving.socket)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\npage: {serving.words['ui']}\n" in done.stdout
    report = serving.status()
    assert troubles_in(report) == []
    for change, told in (
        ({"state": "silent"}, "the page is not served: its process is silent"),
        (
            {"error": "/x: permission denied"},
            "the page shows nothing new: /x: permission denied",
        ),
    ):
        assert troubles_in({**report, "page": {**report["page"], **change}}) == [told]


def test_prometheus_scrapes_it(serving):
    url = serving.words["ui"]
    until(lambda: b"tamiyo_heartbeat_total" in get(url, "metrics")[2])
    status, headers, body = get(url, "metrics")
    assert (status, headers["Content-Type"]) == (
        200,
        "text/plain; version=0.0.4; charset=utf-8",
    )
    assert b"\ntolaria_loss{" in body
    assert b'tamiyo_restarts_total{process="page"} 0.0\n' in body
    _, headers, body = get(url, "metrics", Accept="application/openmetrics-text")
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")


def test_clients_that_do_not_read_or_do_not_speak_keep_nobody_out(serving):
    url = serving.words["ui"]
    address = ("127.0.0.1", int(url.rstrip("/").rpartition(":")[2]))
    idle = [socket.create_connection(address) for _ in range(100)]
    try:
        for each in idle[:20]:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.sendall(b"GET /runs/0123456789abcdef HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert index(url)["runs"]
        with serving.client() as client:
            client.hello(run="beside")
            train(client, 0, 20)
            page = client.status()["page"]
        assert page["failed"] == 0
        assert page["state"] == "working"
    finally:
        for each in idle:
            each.close()


def test_it_is_replaced_when_it_dies_and_asks_go_on(serving):
    url = serving.words["ui"]
    before = serving.status()["page"]
    os.kill(before["pid"], signal.SIGKILL)
    with serving.client() as client:
        client.hello(run="meanwhile")
        train(client, 0, 20)

    def another():
        page = serving.status()["page"]
        return page["state"] == "working" and page["pid"] != before["pid"] and page

    page = until(another)
    assert (page["address"], page["restarts"] - before["restarts"]) == (url, 1)
    # What it knew it reads again.
    until(lambda: {HOSTILE, "meanwhile"} <= {run["name"] for run in index(url)["runs"]})


def test_a_token_lets_in_by_a_bearer_or_as_a_password(tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    options = ("--token-file", token, "--tls-cert", tmp_path / "cert.pem")
    context = ssl.create_default_context()
    ca.configure_trust(context)
    with sidecar(
        *(tmp_path / "t.sock", "--ui", "0.0.0.0:0", *options),
        *("--tls-key", tmp_path / "key.pem"),
    ) as running:
        port = running.words["ui"].rstrip("/").rpartition(":")[2]
        assert running.words["ui"] == f"https://0.0.0.0:{port}/"

        def status(path, authorization):
            request = urllib.request.Request(f"https://127.0.0.1:{port}/{path}")
            request.add_header("Authorization", authorization)
            try:
                with urllib.request.urlopen(request, context=context) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                with error:
                    # So that a browser asks for it.
                    is_asked = error.headers["WWW-Authenticate"].startswith("Basic ")
                    return error.code if is_asked else None

        def basic(password):
            return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()

        for path in ("", "runs.json", "metrics", "runs/0123456789abcdef"):
            assert status(path, f"Bearer {TOKEN}") == 200
            assert status(path, "Bearer x") == 401
        assert status("metrics", basic(TOKEN)) == 200
        for wrong in (basic("x"), basic(""), "Basic !", "Basic", "", TOKEN):
            assert status("metrics", wrong) == 401
        until(lambda: running.status()["page"]["unauthorized"] == 10)
        plain = f"http://127.0.0.1:{port}/"
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(plain, timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--ui", "8321"), '--ui 8321: expected HOST:PORT, got "8321"'),
        (("--ui", "example.com:8321"), "--ui example.com:8321: expected an IP address"),
        (
            ("--ui", "0.0.0.0:8321"),
            "0.0.0.0 is reachable from other machines, and anyone who sees the page sees all "
            "runs; expected a loopback address",
        ),
        (
            ("--ui", "127.0.0.1:0", "--no-journal"),
            "expected neither --no-journal nor --no-state",
        ),
        (("--ui", "127.0.0.1:0", "--no-state"), "expected neither --no-journal nor --no-state"),
        (("--ui", "127.0.0.1:1"), "--ui 127.0.0.1:1: cannot listen: permission denied"),
    ],
)
def test_a_mistake_ends_the_start(tmp_path, options, told):
    if "127.0.0.1:1" in options and not os.geteuid():
        pytest.skip("root may listen at any port")
    done = tamiyo("serve", "--no-ingest", "--socket", tmp_path / "t.sock", *options)
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        done = tamiyo("serve", "--no-ingest", "--socket", tmp_path / "t.sock", "--ui", at)
    assert done.stderr == f"tamiyo: --ui {at}: cannot listen: address already in use\n"
