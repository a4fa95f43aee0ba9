"""What a recorder leaves in the process goes with its test."""

import pytest
from tolaria import loops


@pytest.fixture(autouse=True)
def _close_recorders():
    yield
    for recorder in loops.made:
        recorder.control.updates.close()
    loops.made.clear()
