"""The clock of a test, and the end of what a recorder leaves in the process."""

import pytest
from tolaria import loops


@pytest.fixture(autouse=True)
def _close_recorders():
    yield
    for recorder in loops.made:
        recorder.control.updates.close()
    loops.made.clear()


@pytest.fixture
def clock(monkeypatch):
    return loops.stop_the_clock(monkeypatch)
