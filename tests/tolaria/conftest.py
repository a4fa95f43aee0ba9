"""The clock of a test, and the end of what a recorder leaves in the process."""

import pytest
from tolaria import loops

from esper_otel.tolaria import updates
from esper_otel.tolaria.step_hooks import AroundSteps
from esper_otel.tolaria.updates import Updates


@pytest.fixture(autouse=True)
def _close_recorders():
    yield
    for recorder in loops.made:
        recorder.control.updates.close()
    loops.made.clear()


@pytest.fixture
def clock(monkeypatch):
    return loops.stop_the_clock(monkeypatch)


@pytest.fixture
def closing_updates(monkeypatch):
    """Ends what a test has begun: classes of torch are as they were then.

    Runs that other tests of this process left open are none of this one's.
    """
    monkeypatch.setattr(updates, "AROUND_STEPS", AroundSteps())
    made = []
    before = Updates.__init__

    def begin(self):
        before(self)
        made.append(self)

    monkeypatch.setattr(Updates, "__init__", begin)
    yield
    for each in made:
        each.close()
