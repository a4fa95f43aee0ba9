"""A client of the fake sidecar, and the requests of a training step that it makes."""

from esper_otel.leyline.frames import step_row
from esper_otel.tamiyo.client import TamiyoClient
from testkit.patience import PATIENCE_S

GENEROUS_MS = 1e3 * PATIENCE_S


def connect(path, deadline_ms=GENEROUS_MS):
    return TamiyoClient(
        path, run="r", instance="i", rank=3, world_size=4, deadline_ms=deadline_ms
    )


def row_of(step):
    row = step_row()
    row[0] = step
    return row


def ask(client, step=1, **more):
    return client.ask(step, 1000 + step, row_of(step), **more)


def send(client, step=1, **more):
    client.send(step, 1000 + step, row_of(step), **more)


def check(client, step=1):
    return client.check(step, 1000 + step, row_of(step))


def be_patient(client):
    """From now on it waits as long as an answer takes."""
    client._patience_ns = int(GENEROUS_MS * 1e6)
