"""Which endpoints are the sidecar itself, whatever way they are written."""

import pytest

from esper_tamiyo.journaling.own_telemetry import is_ours


@pytest.mark.parametrize(
    ("endpoint", "receiver", "ours"),
    [
        ("http://127.0.0.1:4318", "127.0.0.1:4318", True),
        ("http://127.0.0.1:4318/v1/traces", "127.0.0.1:4318", True),
        ("http://127.0.0.1:4319", "127.0.0.1:4318", False),
        ("http://127.0.0.2:4318", "127.0.0.1:4318", False),
        ("127.0.0.1:4317", "127.0.0.1:4317", True),
        ("localhost:4317", "127.0.0.1:4317", True),
        ("http://LocalHost:4318", "[::1]:4318", True),
        ("http://[::1]:4318", "[::1]:4318", True),
        ("http://[0:0:0:0:0:0:0:1]:4318", "[::1]:4318", True),
        ("http://[::1]:4318", "127.0.0.1:4318", False),
        ("http://localhost:4318", "0.0.0.0:4318", True),
        ("http://127.0.0.1:4318", "0.0.0.0:4318", True),
        ("http://127.0.0.1:4318", "[::]:4318", True),
        ("http://[::1]:4318", "0.0.0.0:4318", False),
        ("http://0.0.0.0:4318", "127.0.0.1:4318", True),
        ("http://0.0.0.0:4318", "0.0.0.0:4318", True),
        ("http://192.0.2.7:4318", "0.0.0.0:4318", False),  # of nobody: kept for documents
        ("http://192.0.2.7:4318", "192.0.2.7:4318", True),
        ("http://collector:4318", "0.0.0.0:4318", False),
        ("http://collector", "0.0.0.0:4318", False),
        ("http://collector:many", "0.0.0.0:4318", False),
        ("", "0.0.0.0:4318", False),
    ],
)
def test_an_endpoint_of_our_own(endpoint, receiver, ours):
    assert is_ours(endpoint, ["127.0.0.1:1", receiver]) is ours
