"""Who may send OTLP: TLS, client certificates, tokens; real certificates, real senders."""

import os
import socket
import ssl
import stat
from contextlib import suppress
from http.client import HTTPSConnection
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as official_grpc
from opentelemetry.exporter.otlp.proto.http import metric_exporter as official_http
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricExportResult

from esper_otel.stream.destination import Signal, destinations
from esper_otel.stream.sender import Verdict, open_transport
from esper_tamiyo.receiving import credentials as credentials_module
from esper_tamiyo.receiving.addresses import Address
from esper_tamiyo.receiving.credentials import (
    BearerAuth,
    Credentials,
    CredentialsError,
    read_token,
)
from sidecar.frames_made import frame, otlp_of
from sidecar.running import sidecar, tamiyo, until
from testkit.patience import PATIENCE_S

TOKEN = "0123456789abcdef-token"
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


def written(path, data, mode=0o600):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Certificates of one CA, a stranger's, and a token."""
    folder = tmp_path_factory.mktemp("pki")
    ca, strange = trustme.CA(), trustme.CA()
    server = ca.issue_cert("localhost", "127.0.0.1")
    client, stranger = ca.issue_cert("trainer"), strange.issue_cert("stranger")

    def pair(name, cert):
        chain = b"".join(pem.bytes() for pem in cert.cert_chain_pems)
        return (
            written(folder / f"{name}.pem", chain),
            written(folder / f"{name}.key", cert.private_key_pem.bytes()),
        )

    cert, key = pair("server", server)
    client_cert, client_key = pair("client", client)
    strange_cert, strange_key = pair("stranger", stranger)
    return SimpleNamespace(
        ca=written(folder / "ca.pem", ca.cert_pem.bytes()),
        cert=cert,
        key=key,
        client_cert=client_cert,
        client_key=client_key,
        strange_cert=strange_cert,
        strange_key=strange_key,
        token=written(folder / "token", f"{TOKEN}\n"),
    )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, files):
    """A sidecar with TLS and a token, reachable from other machines."""
    options = ("--tls-cert", files.cert, "--tls-key", files.key, "--token-file", files.token)
    everywhere = ("--otlp-grpc", "0.0.0.0:0", "--otlp-http", "0.0.0.0:0")
    path = tmp_path_factory.mktemp("g") / "t.sock"
    with sidecar(path, *options, *everywhere, ingest=True, is_forked=False) as running:
        yield running


@pytest.fixture(scope="module")
def mutual(tmp_path_factory, files):
    """A sidecar that lets in who has a certificate of the CA."""
    options = ("--tls-cert", files.cert, "--tls-key", files.key, "--tls-client-ca", files.ca)
    with sidecar(tmp_path_factory.mktemp("m") / "t.sock", *options, ingest=True) as running:
        yield running


def port(running, protocol):
    return running.words[f"otlp_{protocol}"].rpartition(":")[2]


def request_of(run):
    return otlp_of(frame(0, run=run), frame(1, run=run, loss_delta=0.5)).SerializeToString()


def arrived(running, run):
    def latest():
        with running.client() as client:
            decision = client.latest(run)
            return decision is not None and decision.step == 1

    return until(latest)


def own_sender(running, protocol, scheme="https", **variables):
    """Our own transport, told by the standard variables where and how to send."""
    environ = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": {"http": "http/protobuf"}.get(protocol, protocol),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"{scheme}://localhost:{port(running, protocol)}",
        **{f"OTEL_EXPORTER_OTLP_{name}": str(value) for name, value in variables.items()},
    }
    return open_transport(destinations(environ)[Signal.METRICS])


def sent_by_own(running, protocol, body, scheme="https", **variables):
    transport = own_sender(running, protocol, scheme, **variables)
    try:
        return transport.send(body, PATIENCE_S)
    finally:
        transport.close()


def bearer(token):
    return f"authorization=Bearer%20{token}"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_our_own_sender_comes_in_with_ca_and_token(guarded, files, protocol):
    run = f"own-{protocol}"
    outcome = sent_by_own(
        guarded, protocol, request_of(run), CERTIFICATE=files.ca, HEADERS=bearer(TOKEN)
    )
    assert outcome.verdict is Verdict.DELIVERED
    assert arrived(guarded, run)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("headers", ["", bearer("wrong-" + TOKEN), "authorization=" + TOKEN])
def test_without_the_right_token_it_does_not(guarded, files, protocol, headers):
    before = guarded.status()["ingest"]
    outcome = sent_by_own(
        guarded, protocol, request_of("intruder"), CERTIFICATE=files.ca, HEADERS=headers
    )
    assert outcome.verdict is Verdict.REFUSED
    until(lambda: guarded.status()["ingest"]["unauthorized"] == before["unauthorized"] + 1)
    assert guarded.status()["ingest"]["points_used"] == before["points_used"]


def exported(exporter):
    """What an official exporter makes of one data point."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    provider.get_meter("test").create_counter("somebody.else").add(1)
    data = reader.get_metrics_data()
    try:
        return exporter.export(data, timeout_millis=10_000)
    finally:
        exporter.shutdown()
        provider.shutdown()


def official(running, protocol, certificate, headers):
    """OpenTelemetry's own exporter, with TLS."""
    address = f"https://localhost:{port(running, protocol)}"
    if protocol == "http":
        return official_http.OTLPMetricExporter(
            f"{address}/v1/metrics", certificate_file=str(certificate), headers=headers
        )
    root = grpc.ssl_channel_credentials(Path(certificate).read_bytes())
    return official_grpc.OTLPMetricExporter(
        address, credentials=root, headers=tuple(headers.items())
    )


@pytest.fixture
def own_ca(monkeypatch):
    """``requests`` heeds these more than the certificate it is given."""
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_official_exporters_come_in_with_ca_and_token(guarded, files, protocol, own_ca):
    foreign = guarded.status()["ingest"]["points_foreign"]
    exporter = official(guarded, protocol, files.ca, {"authorization": f"Bearer {TOKEN}"})
    assert exported(exporter) is MetricExportResult.SUCCESS
    until(lambda: guarded.status()["ingest"]["points_foreign"] == foreign + 1)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_official_exporters_do_not_without_the_token(guarded, files, protocol, caplog, own_ca):
    exporter = official(guarded, protocol, files.ca, {"authorization": "Bearer nonsense"})
    assert exported(exporter) is MetricExportResult.FAILURE
    assert "UNAUTHENTICATED" in caplog.text or "401" in caplog.text


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_whoever_trusts_another_ca_does_not_talk_to_us(guarded, files, protocol):
    outcome = sent_by_own(
        guarded,
        protocol,
        request_of("mistrust"),
        CERTIFICATE=files.strange_cert,
        HEADERS=bearer(TOKEN),
    )
    assert outcome.verdict in (Verdict.UNREACHABLE, Verdict.RETRY)


def test_the_refusal_is_in_the_words_of_each_protocol(guarded, files):
    context = ssl.create_default_context(cafile=files.ca)
    connection = HTTPSConnection("localhost", int(port(guarded, "http")), context=context)
    connection.request("POST", "/v1/metrics", b"", {"Content-Type": "application/x-protobuf"})
    response = connection.getresponse()
    assert (response.status, response.getheader("WWW-Authenticate")) == (401, "Bearer")
    assert b"Authorization: Bearer" in response.read()
    connection.close()
    root = grpc.ssl_channel_credentials(files.ca.read_bytes())
    with grpc.secure_channel(f"localhost:{port(guarded, 'grpc')}", root) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(EXPORT)(b"", timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        sent = (("authorization", f"bearer {TOKEN}"),)
        assert channel.unary_unary(EXPORT)(b"", timeout=PATIENCE_S, metadata=sent) == b""


def test_nothing_is_said_in_the_clear(guarded):
    with socket.create_connection(("localhost", int(port(guarded, "http"))), 10) as plain:
        plain.sendall(b"POST /v1/metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        with suppress(ConnectionResetError):
            assert not plain.recv(1000).startswith(b"HTTP")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_client_certificate_lets_in_and_its_absence_does_not(mutual, files, protocol):
    def outcome(run, **more):
        return sent_by_own(mutual, protocol, request_of(run), CERTIFICATE=files.ca, **more)

    run = f"mutual-{protocol}"
    known = {"CLIENT_CERTIFICATE": files.client_cert, "CLIENT_KEY": files.client_key}
    strange = {"CLIENT_CERTIFICATE": files.strange_cert, "CLIENT_KEY": files.strange_key}
    assert outcome(run, **known).verdict is Verdict.DELIVERED
    assert arrived(mutual, run)
    for unknown in ({}, strange):
        assert outcome("x", **unknown).verdict in (Verdict.UNREACHABLE, Verdict.RETRY)


def test_a_token_can_be_replaced_while_it_runs(tmp_path):
    token = written(tmp_path / "token", TOKEN)
    with sidecar(tmp_path / "t.sock", "--token-file", token, ingest=True) as running:

        def verdict(given):
            return sent_by_own(
                running, "http", request_of("r"), scheme="http", HEADERS=bearer(given)
            ).verdict

        assert verdict(TOKEN) is Verdict.DELIVERED
        fresh = written(tmp_path / "fresh", "another-" + TOKEN)
        fresh.replace(token)
        until(lambda: verdict("another-" + TOKEN) is Verdict.DELIVERED)
        assert verdict(TOKEN) is Verdict.REFUSED


def test_a_new_token_counts_once_it_is_looked_at_and_a_bad_one_never(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(credentials_module.time, "monotonic", lambda: now[0])
    path = written(tmp_path / "token", TOKEN)
    door = BearerAuth(str(path))

    def admits(token):
        return door.admits(f"Bearer {token}")

    other = "other-" + TOKEN
    for content, admitted, refused in (
        (other, other, TOKEN),
        ("short", other, "short"),
        (TOKEN, TOKEN, other),
        (None, TOKEN, ""),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            written(path, content)
        now[0] += 2.0
        assert (admits(admitted), admits(refused)) == (True, False)
    assert not door.admits(None)
    assert not door.admits(f"Basic {TOKEN}")
    assert not door.admits("Bearer тайна".encode())
    assert BearerAuth("").admits(None)


def test_a_token_of_which_nothing_can_be_made_is_told_once(tmp_path, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(credentials_module.time, "monotonic", lambda: now[0])
    path = written(tmp_path / "token", TOKEN)
    door = BearerAuth(str(path))
    written(path, "short")
    for _ in range(3):
        now[0] += 2.0
        assert door.admits(f"Bearer {TOKEN}")
    assert len(caplog.records) == 1
    assert "at least 16 printable ASCII characters" in caplog.text
    assert "the last good one stays in use" in caplog.text


def issued(folder, authority):
    """Certificate and key of this host by an authority, put in the place of those before."""
    cert = authority.issue_cert("localhost", "127.0.0.1")
    chain = b"".join(pem.bytes() for pem in cert.cert_chain_pems)
    for name, data in (("c.pem", chain), ("k.pem", cert.private_key_pem.bytes())):
        written(folder / f"fresh-{name}", data).replace(folder / name)


def test_certificates_can_be_replaced_while_it_runs(tmp_path, capfd):
    authorities = [trustme.CA(), trustme.CA()]
    trusted = [
        written(tmp_path / f"ca{number}.pem", authority.cert_pem.bytes())
        for number, authority in enumerate(authorities)
    ]
    issued(tmp_path, authorities[0])
    options = ("--tls-cert", tmp_path / "c.pem", "--tls-key", tmp_path / "k.pem")
    with sidecar(tmp_path / "t.sock", *options, ingest=True) as running:

        def outcome(protocol, which):
            body = request_of(f"renewed-{protocol}-{which}")
            return sent_by_own(running, protocol, body, CERTIFICATE=trusted[which])

        def delivers(protocol, which):
            return outcome(protocol, which).verdict is Verdict.DELIVERED

        for protocol in ("http", "grpc"):
            assert (delivers(protocol, 0), delivers(protocol, 1)) == (True, False)
        issued(tmp_path, authorities[1])
        for protocol in ("http", "grpc"):
            until(lambda protocol=protocol: delivers(protocol, 1))
            assert not delivers(protocol, 0)
        good = (tmp_path / "k.pem").read_bytes()
        written(tmp_path / "k.pem", "half a ke")
        told = []

        def refused():
            for protocol in ("http", "grpc"):
                sent = outcome(protocol, 1)
                assert sent.verdict is Verdict.DELIVERED, sent
            told.append(capfd.readouterr().err)
            return "the last good one stays in use" in "".join(told)

        until(refused)
        written(tmp_path / "k.pem", good)
        assert delivers("grpc", 1)
    assert "".join(told).count("the last good one stays in use") == 1
    assert "the certificates have changed and were read again" in "".join(told)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected one token"),
        (" \n", "is empty; expected one token"),
        ("short", "at least 16 printable ASCII characters"),
        ("two words that are long enough", "without spaces"),
        ("тайна" * 9, "printable ASCII"),
        (None, "No such file or directory"),
    ],
)
def test_files_that_hold_no_token(tmp_path, content, message):
    path = tmp_path / "token"
    if content is not None:
        written(path, content)
    with pytest.raises(CredentialsError, match=message) as caught:
        read_token(str(path))
    assert str(caught.value).startswith(f"--token-file {path}: ")


def test_certificates_that_do_not_do(tmp_path, files):
    words = written(tmp_path / "words.pem", "not a certificate")
    absent = tmp_path / "absent.pem"
    key = trustme.CA().private_key_pem.bytes()
    locked = written(
        tmp_path / "locked.key",
        serialization.load_pem_private_key(key, None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        ),
    )
    good = {"tls_cert": files.cert, "tls_key": files.key}
    cases = [
        ({"tls_cert": files.cert}, "--tls-cert needs --tls-key beside it"),
        ({"tls_key": files.key}, "--tls-key needs --tls-cert beside it"),
        ({"tls_client_ca": files.ca}, "--tls-client-ca needs --tls-cert and --tls-key beside"),
        (good | {"tls_cert": absent}, f"--tls-cert {absent}: No such file or directory"),
        (good | {"tls_key": absent}, f"--tls-key {absent}: No such file or directory"),
        (good | {"tls_key": tmp_path}, f"--tls-key {tmp_path}: Is a directory"),
        (good | {"tls_client_ca": absent}, f"--tls-client-ca {absent}: No such file"),
        (good | {"tls_cert": words}, f"--tls-cert {words}, --tls-key {files.key}: "),
        (good | {"tls_key": words}, "expected a PEM certificate chain and its private key"),
        (
            good | {"tls_key": files.client_key},
            f"--tls-cert {files.cert}, --tls-key {files.client_key}: "
            "the key is not that of the certificate",
        ),
        (good | {"tls_key": locked}, f"--tls-key {locked}: asks for a passphrase"),
        (good | {"tls_client_ca": words}, f"--tls-client-ca {words}: "),
    ]
    for given, message in cases:
        with pytest.raises(CredentialsError) as caught:
            Credentials(**{name: str(path) for name, path in given.items()}).validate()
        assert message in str(caught.value)
    Credentials(**{name: str(path) for name, path in good.items()}).validate()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_key_that_may_not_be_read(tmp_path, files):
    key = written(tmp_path / "k.pem", files.key.read_bytes(), mode=0)
    with pytest.raises(CredentialsError, match=r"--tls-key .*: Permission denied"):
        Credentials(str(files.cert), str(key)).validate()


TLS = {"tls_cert": "c", "tls_key": "k"}
TOKENS = {"token_file": "t"}


@pytest.mark.parametrize(
    ("host", "given", "insecure", "told"),
    [
        ("127.0.0.1", {}, False, ""),
        ("::1", {}, False, ""),
        ("127.8.8.8", {}, False, ""),
        ("0.0.0.0", {}, False, None),
        ("::", {}, False, None),
        ("192.0.2.1", {}, False, None),
        ("0.0.0.0", {}, True, "anyone who reaches it can send"),
        ("0.0.0.0", TLS, False, "anyone who reaches it can send"),
        ("0.0.0.0", TOKENS, False, "the token travels in the clear"),
        ("::", TLS | TOKENS, False, ""),
        ("0.0.0.0", TLS | {"tls_client_ca": "a"}, False, ""),
    ],
)
def test_what_an_address_needs(host, given, insecure, told):
    credentials, address = Credentials(**given), Address(host, 4317)
    if told is None:
        with pytest.raises(CredentialsError, match="reachable from other machines"):
            credentials.exposure(address, insecure)
    else:
        assert credentials.exposure(address, insecure).startswith(told)
        assert bool(credentials.exposure(address, insecure)) == bool(told)


def test_insecure_is_an_explicit_choice(tmp_path, capfd):
    options = ("--otlp-http", "0.0.0.0:0", "--insecure")
    with sidecar(tmp_path / "t.sock", *options, ingest=True) as running:
        outcome = sent_by_own(running, "http", request_of("open"), scheme="http")
        assert outcome.verdict is Verdict.DELIVERED
    assert "--otlp-http 0.0.0.0:0: anyone who reaches it can send" in capfd.readouterr().err


def test_the_command_says_what_is_wrong_and_no_secret_shows(tmp_path, files):
    ended = tamiyo("serve", "--socket", tmp_path / "t.sock", "--tls-cert", files.cert)
    assert (ended.returncode, ended.stderr) == (
        1,
        "tamiyo: --tls-cert needs --tls-key beside it\n",
    )


def test_the_token_is_on_no_command_line(guarded):
    family = {guarded.process.pid, guarded.status()["ingest"]["pid"]}
    for pid in family:
        assert TOKEN.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert stat.S_ISSOCK(guarded.socket.stat().st_mode)
