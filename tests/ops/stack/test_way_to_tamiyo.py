"""What a Collector gives Tamiyo: of this moment and in order, also when it has hung."""

import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from ops.stack.ports import free

EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
BOUND_S, BUSY_S = 4.0, 0.5
"""What the configurations promise, and what a busy machine may add to it."""

HANG_S, PACE_S = 7.0, 0.01
PADDING = "x" * 32768
"""So that the queue is full while nobody takes from it."""


class FakeTamiyo:
    """Takes OTLP by gRPC and HTTP, or hangs; what a sender gave up is not taken."""

    def __init__(self):
        self.taken = []
        self._runs = threading.Event()
        self._runs.set()
        export = grpc.unary_unary_rpc_method_handler(self._export)
        service, _, method = EXPORT.strip("/").partition("/")
        self._grpc = grpc.server(futures.ThreadPoolExecutor(8))
        self._grpc.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: export}),)
        )
        self.grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.http_port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def hang(self):
        self._runs.clear()

    def go_on(self):
        """Take what comes from now on."""
        self.taken.clear()
        self._runs.set()

    def close(self):
        self._runs.set()
        self._grpc.stop(0)
        self._http.shutdown()
        self._http.server_close()

    @property
    def steps(self):
        return [step for step, _ in self.taken]

    def _take(self, body):
        """Note each step of a request and how old it is."""
        now_ns = time.time_ns()
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            for scope in resource.scope_metrics:
                points = [p for metric in scope.metrics for p in metric.gauge.data_points]
                for point in points:
                    age_s = (now_ns - point.time_unix_nano) / 1e9
                    self.taken.append((int(point.as_double), age_s))

    def _export(self, body, context):
        if self._runs.is_set():
            self._take(body)
        else:
            self._runs.wait(2 * BOUND_S)
        return b""

    def _handler(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.close_connection = not fake._runs.is_set()
                fake._export(body, None)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def fake():
    fake = FakeTamiyo()
    yield fake
    fake.close()


@pytest.fixture(params=["local", "agent", "gateway"])
def way(request, fake, collector):
    """Where what is for ``fake`` is sent to: a Collector with one of the configurations."""
    at, port = "127.0.0.1", str(fake.grpc_port)
    nobody, entry = free(2)
    told = {
        "local": {"TAMIYO_OTLP": f"http://{at}:{fake.http_port}"},
        "agent": {
            "GATEWAYS": at,
            "GATEWAY_TAMIYO_PORT": port,
            "GATEWAY_PORT": str(nobody),
        },
        "gateway": {
            "TAMIYOS": at,
            "TAMIYO_PORT": port,
            "COLLECTOR_TAMIYO_GRPC": f"{at}:{entry}",
        },
    }
    name = request.param
    ports, _ = collector(name, f"{name}.yaml", **told[name])
    with grpc.insecure_channel(
        f"{at}:{entry if name == 'gateway' else ports.otlp_grpc}"
    ) as channel:
        yield channel.unary_unary(EXPORT)


def a_step(number):
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    resource.resource.attributes.add(key="esper.run_id").value.string_value = "hung"
    resource.resource.attributes.add(key="padding").value.string_value = PADDING
    metric = resource.scope_metrics.add().metrics.add(name="tolaria.step")
    metric.gauge.data_points.add(time_unix_nano=time.time_ns(), as_double=number)
    return request.SerializeToString()


def test_after_it_hung_tamiyo_is_given_nothing_old_and_nothing_out_of_order(
    way, fake, wait_until
):
    pace, step = threading.Event(), 0

    def train_until(condition):
        nonlocal step
        while not condition():
            step += 1
            way(a_step(step), timeout=10)
            pace.wait(PACE_S)

    train_until(lambda: fake.taken)
    fake.hang()
    back = time.monotonic() + HANG_S
    train_until(lambda: time.monotonic() >= back)
    fake.go_on()
    newest = step + 50
    train_until(lambda: step >= newest)
    wait_until(lambda: step in fake.steps)
    assert fake.steps == sorted(set(fake.steps)), "each once, and in order"
    assert max(age_s for _, age_s in fake.taken) < BOUND_S + BUSY_S
