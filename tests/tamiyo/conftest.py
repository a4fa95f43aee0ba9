"""Where a sidecar listens, and which threads look for it."""

import _thread

import pytest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.sock"


@pytest.fixture
def probing(monkeypatch):
    """The threads that run now, of those the client has started."""
    running = []
    start = _thread.start_new_thread

    def started(function, arguments):
        running.append(function)

        def to_its_end():
            function(*arguments)
            running.remove(function)

        return start(to_its_end, ())

    monkeypatch.setattr(_thread, "start_new_thread", started)
    return running
