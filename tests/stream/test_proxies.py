"""Which proxy, if any, stands on the way to a receiver."""

from urllib.parse import urlsplit

import pytest

from esper_otel.stream import proxies
from esper_otel.stream.destination import Signal, destinations
from esper_otel.stream.sender import open_transport
from esper_otel.stream.transport import Verdict
from testkit.receiver import Answer, GrpcReceiver, HttpReceiver

PROXY = "http://proxy.example:3128"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(proxies, "_told", set())


@pytest.mark.parametrize(
    ("url", "no_proxy", "is_used"),
    [
        ("http://collector.example:4318", "", True),
        ("http://localhost:4318", "", False),
        ("http://LOCALHOST.:4318", "", False),
        ("http://a.localhost:4318", "", False),
        ("http://127.3.2.1:4318", "", False),
        ("http://[::1]:4318", "", False),
        ("http://10.1.2.3:4318", "10.0.0.0/8", False),
        ("http://10.1.2.3:4318", "192.168.0.0/16, 10.1.2.0/24", False),
        ("http://10.1.2.3:4318", "192.168.0.0/16", True),
        ("http://[fd00::1]:4318", "fd00::/8", False),
        ("http://10.1.2.3:4318", "nonsense/99,,", True),
        ("http://collector.example:4318", "example", False),
        ("http://collector.example:4318", "*", False),
    ],
)
def test_what_is_here_or_excepted_has_none(monkeypatch, url, no_proxy, is_used):
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", no_proxy)
    found = proxies.proxy_for(urlsplit(url))
    assert (found is not None) == is_used
    if found is not None:
        assert found.geturl() == PROXY


@pytest.mark.parametrize(
    "proxy", ["::::", "http://:3128", "http://[", "ftp://p:1", "http://p:x"]
)
def test_one_that_is_none_is_told_of_once_and_left_out(monkeypatch, caplog, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    for _ in range(2):
        assert proxies.proxy_for(urlsplit("http://collector.example:4318")) is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("telemetry is sent without a proxy")


@pytest.mark.parametrize(("status", "verdict"), [(403, Verdict.RETRY), (400, Verdict.REFUSED)])
def test_what_a_proxy_refuses_is_kept_and_the_proxy_named(monkeypatch, status, verdict):
    with HttpReceiver() as proxy:
        proxy.answer = lambda request: Answer(status)
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//user:secret@"))
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.invalid:4318"}
        transport = open_transport(destinations(environ)[Signal.METRICS])
        result = transport.send(b"\x0a\x00", 5.0)
        transport.close()
    assert result.verdict is verdict
    assert ("of the proxy http://localhost:" in result.reason) == (verdict is Verdict.RETRY)
    assert "secret" not in result.reason


@pytest.mark.parametrize("receiver", [HttpReceiver, GrpcReceiver])
def test_a_receiver_of_this_machine_is_reached_whatever_proxy_there_is(monkeypatch, receiver):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    protocol = "grpc" if receiver is GrpcReceiver else "http/protobuf"
    with receiver() as there:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": there.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        }
        transport = open_transport(destinations(environ)[Signal.METRICS])
        assert transport.send(b"", 5.0).verdict is Verdict.DELIVERED
        transport.close()


def test_certificates_that_are_not_there_are_those_of_the_system(monkeypatch, caplog):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://localhost:9"}
    for _ in range(2):
        transport = open_transport(destinations(environ)[Signal.METRICS])
        assert "refused" in transport.send(b"", 5.0).reason
        transport.close()
    assert caplog.text.count("REQUESTS_CA_BUNDLE='/nowhere.pem'") == 1


def test_a_transport_that_cannot_be_made_sends_nothing_and_says_why(tmp_path):
    (tmp_path / "ca.pem").write_text("not a certificate")
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "https://localhost:9",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "ca.pem"),
    }
    transport = open_transport(destinations(environ)[Signal.METRICS])
    result = transport.send(b"", 5.0)
    transport.close()
    assert result.verdict is Verdict.UNREACHABLE
    assert result.reason
