"""Where OTLP goes: the standard variables, read as the specification says."""

from __future__ import annotations

import logging

import pytest

from esper_otel.stream.destination import OtlpProtocol, Signal, destinations, is_disabled

E = "OTEL_EXPORTER_OTLP_"


def metrics(**environ: str):
    return destinations(environ)[Signal.METRICS]


def traces(**environ: str):
    return destinations(environ)[Signal.TRACES]


def test_without_any_variable_it_is_http_on_this_host():
    default = metrics()
    assert default.endpoint == "http://localhost:4318/v1/metrics"
    assert traces().endpoint == "http://localhost:4318/v1/traces"
    assert (default.protocol, default.timeout_s, default.gzip) == (
        OtlpProtocol.HTTP,
        10.0,
        False,
    )


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({"ENDPOINT": "http://c:1"}, "http://c:1/v1/metrics"),
        ({"ENDPOINT": "http://c:1/"}, "http://c:1/v1/metrics"),
        ({"ENDPOINT": "https://c/otlp"}, "https://c/otlp/v1/metrics"),
        ({"METRICS_ENDPOINT": "http://c:1"}, "http://c:1"),
        ({"METRICS_ENDPOINT": "http://m/x", "ENDPOINT": "http://c"}, "http://m/x"),
        ({"TRACES_ENDPOINT": "http://t/x", "ENDPOINT": "http://c"}, "http://c/v1/metrics"),
        ({"ENDPOINT": "  "}, "http://localhost:4318/v1/metrics"),
    ],
)
def test_an_http_endpoint_gets_the_signals_path_unless_it_is_the_signals_own(environ, url):
    assert metrics(**{E + name: value for name, value in environ.items()}).endpoint == url


@pytest.mark.parametrize(
    ("environ", "target", "secure"),
    [
        ({}, "localhost:4317", False),
        ({"ENDPOINT": "http://c:1"}, "c:1", False),
        ({"ENDPOINT": "https://c:1"}, "c:1", True),
        ({"ENDPOINT": "https://c:1", "INSECURE": "true"}, "c:1", True),
        ({"ENDPOINT": "c:1"}, "c:1", True),
        ({"ENDPOINT": "c:1", "INSECURE": "true"}, "c:1", False),
        ({"ENDPOINT": "c:1", "METRICS_INSECURE": "TRUE"}, "c:1", False),
        ({"ENDPOINT": "unix:/run/c.sock", "INSECURE": "true"}, "unix:/run/c.sock", False),
        ({"ENDPOINT": "http://[::1]:4317/x"}, "[::1]:4317", False),
    ],
)
def test_a_grpc_endpoint_is_a_target_and_its_scheme_decides_about_tls(environ, target, secure):
    got = metrics(**{E + "PROTOCOL": "grpc", **{E + k: v for k, v in environ.items()}})
    assert (got.protocol, got.endpoint, got.secure) == (OtlpProtocol.GRPC, target, secure)


def test_each_signal_has_its_own_of_everything(tmp_path):
    pem = tmp_path / "ca.pem"
    pem.write_text("")
    environ = {
        E + "TRACES_PROTOCOL": "grpc",
        E + "TIMEOUT": "3",
        E + "TRACES_TIMEOUT": "0.5",
        E + "COMPRESSION": "gzip",
        E + "TRACES_COMPRESSION": "none",
        E + "HEADERS": "a=1",
        E + "TRACES_HEADERS": "b=2",
        E + "CERTIFICATE": str(pem),
        E + "METRICS_CLIENT_KEY": str(pem),
        E + "METRICS_CLIENT_CERTIFICATE": str(pem),
    }
    ours, theirs = metrics(**environ), traces(**environ)
    assert (ours.protocol, theirs.protocol) == (OtlpProtocol.HTTP, OtlpProtocol.GRPC)
    assert (ours.timeout_s, theirs.timeout_s) == (3.0, 0.5)
    assert (ours.gzip, theirs.gzip) == (True, False)
    assert (ours.headers, theirs.headers) == ((("a", "1"),), (("b", "2"),))
    assert ours.certificate == theirs.certificate == ours.client_key == str(pem)
    assert (ours.client_certificate, theirs.client_certificate) == (str(pem), None)


def test_headers_are_percent_decoded_and_lower_case():
    got = metrics(**{E + "HEADERS": "Authorization=Bearer%20a%3Db%2Cc, x-api.key = k=v ,,"})
    assert dict(got.headers) == {"authorization": "Bearer a=b,c", "x-api.key": "k=v"}


@pytest.mark.parametrize("pair", ["novalue", "=secret", "k=a%0Ab", "bad key=v", "k=%E2%82%AC"])
def test_a_bad_header_is_left_out_and_its_value_is_not_logged(pair, caplog):
    assert metrics(**{E + "HEADERS": f"{pair},good=1"}).headers == (("good", "1"),)
    assert "entry 1" in caplog.text
    assert pair not in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (E + "PROTOCOL", "http/json", "http/protobuf or grpc"),
        (E + "PROTOCOL", "thrift", "http/protobuf or grpc"),
        (E + "ENDPOINT", "collector:4318", "an http:// or https:// URL"),
        (E + "ENDPOINT", "http://c:seventy", "an http:// or https:// URL"),
        (E + "TIMEOUT", "soon", "a number of seconds above 0"),
        (E + "TIMEOUT", "-1", "a number of seconds above 0"),
        (E + "COMPRESSION", "zstd", "gzip or none"),
        (E + "CERTIFICATE", "/no/such.pem", "a readable file"),
        ("OTEL_METRICS_EXPORTER", "prometheus", "otlp, console or none"),
    ],
)
def test_a_bad_value_is_named_once_and_the_default_takes_its_place(
    name, value, expected, caplog
):
    assert metrics(**{name: value}) == metrics()
    messages = [record.getMessage() for record in caplog.records if name in record.message]
    assert len(messages) == 1
    assert repr(value) in messages[0]
    assert expected in messages[0]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize("value", ["HTTP/Protobuf", " grpc "])
def test_case_and_spaces_do_not_matter(value, caplog):
    assert metrics(**{E + "PROTOCOL": value}).protocol == value.strip().lower()
    assert not caplog.records


def test_a_signal_can_be_switched_off():
    for signal in Signal:
        variable = f"OTEL_{signal.upper()}_EXPORTER"
        assert set(destinations({variable: " None "})) == set(Signal) - {signal}
    assert set(destinations({"OTEL_METRICS_EXPORTER": "otlp,console"})) == set(Signal)
    assert Signal.METRICS not in destinations({"OTEL_METRICS_EXPORTER": "console"})


def test_other_signals_have_no_console(caplog):
    assert set(destinations({"OTEL_TRACES_EXPORTER": "console"})) == set(Signal)
    assert "OTEL_TRACES_EXPORTER='console': expected otlp or none" in caplog.text


@pytest.mark.parametrize(
    ("value", "disabled"), [("true", True), ("TRUE ", True), ("false", False), ("1", False)]
)
def test_everything_can_be_switched_off(value, disabled):
    assert is_disabled({"OTEL_SDK_DISABLED": value}) is disabled
    assert not is_disabled({})


@pytest.mark.parametrize(
    ("name", "value", "protocol"),
    [
        ("ENDPOINT", "ftp://user:hunter2@host", "http/protobuf"),
        ("ENDPOINT", "user:hunter2@host:4318", "http/protobuf"),
        ("ENDPOINT", "http://user:a/hunter2@host", "http/protobuf"),
        ("METRICS_ENDPOINT", "http://user:hunter2@host:0/v1/metrics?hunter2", "http/protobuf"),
        ("ENDPOINT", "http://user:hunter2@:nan", "grpc"),
        ("ENDPOINT", "user:hunter2@host:4317", "grpc"),
        ("HEADERS", "Authorization: Bearer hunter2", "grpc"),
        ("HEADERS", "key=hunter2\x00", "http/protobuf"),
    ],
)
def test_no_secret_is_shown(name, value, protocol, caplog):
    caplog.set_level(logging.DEBUG)
    got = metrics(**{E + name: value, E + "PROTOCOL": protocol})
    assert "hunter2" not in caplog.text
    assert "hunter2" not in got.shown
