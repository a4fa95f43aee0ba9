"""What may be shown of endpoints and headers: nothing that is secret."""

from __future__ import annotations

import io
import logging

import pytest

from esper_otel.leyline.endpoints import hiding, shown_endpoint


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        ("http://host:4318", "http://host:4318"),
        ("http://host:4318/v1/metrics", "http://host:4318/v1/metrics"),
        ("host:4317", "host:4317"),
        ("dns:///host:4317", "dns:///host:4317"),
        ("unix:/run/otel.sock", "unix:/run/otel.sock"),
        ("https://user:hunter2@host/v1/traces", "https://host/v1/traces"),
        ("https://hunter2@host", "https://host"),
        ("user:hunter2@host:4317", "host:4317"),
        ("http://user:hunter2@[::1]:4318", "http://[::1]:4318"),
        ("http://user:a/hunter2@host", "http://host"),
        ("http://user:hunter2@b@host", "http://host"),
        ("http://user:a?hunter2#c@host", "http://host"),
        ("http://host/v1/metrics?key=hunter2", "http://host/v1/metrics"),
        ("http://host/v1/metrics#hunter2", "http://host/v1/metrics"),
        ("ftp:user:hunter2@host", "host"),
        ("", ""),
    ],
)
def test_an_endpoint_is_shown_without_what_is_secret(endpoint, shown):
    assert shown_endpoint(endpoint) == shown


ENVIRON = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel:hunter%202@host:4318/v1?key=querykey",
    "OTEL_EXPORTER_OTLP_METRICS_HEADERS": "authorization=Bearer%20token1, broken pair",
    "PATH": "/bin",
}


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach http://otel:hunter%202@host:4318",
        "password 'hunter 2' is wrong",
        "GET /v1?key=querykey",
        "Header format invalid: broken pair",
        "sent Bearer token1",
    ],
)
def test_a_line_that_a_library_logs_shows_no_secret(text):
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(hiding(ENVIRON))
    logger = logging.Logger("a library")
    logger.addHandler(handler)
    logger.warning("it said: %s", text)
    try:
        raise ValueError(text)
    except ValueError:
        logger.exception("and raised")
    assert written.getvalue().count("***") == 2
    for secret in ("hunter", "querykey", "broken pair", "token1"):
        assert secret not in written.getvalue()


def test_other_lines_are_left_as_they_are():
    record = logging.LogRecord("a", logging.INFO, "b", 1, "%s and %d", ("host", 2), None)
    assert hiding(ENVIRON)(record)
    assert record.getMessage() == "host and 2"
