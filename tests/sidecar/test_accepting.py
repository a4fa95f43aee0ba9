"""The decision socket when the system has no descriptors left."""

import errno
import resource
import select
import socket
from collections import Counter

from esper_tamiyo.serving.listening import Accepting, raise_descriptor_limit


class Listening:
    """A listening socket that has no descriptor to give, as often as it is told."""

    def __init__(self, real, failures):
        self._real = real
        self._failures = failures

    def fileno(self):
        return self._real.fileno()

    def accept(self):
        if self._failures:
            self._failures -= 1
            raise OSError(errno.ENFILE, "Too many open files in system")
        return self._real.accept()


def connected(path, failures, test):
    """Run ``test(accepting, epoll, counts)`` while one client waits to be accepted."""
    with socket.socket(socket.AF_UNIX) as real, select.epoll() as epoll:
        real.bind(str(path))
        real.listen()
        real.setblocking(False)
        counts = Counter()
        accepting = Accepting(Listening(real, failures), epoll, counts)
        accepting.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            test(accepting, epoll, counts)


def test_the_loop_does_not_spin_and_who_waits_is_served_later(tmp_path, caplog):
    def test(accepting, epoll, counts):
        for tick in range(1, 3):
            assert epoll.poll(0), "somebody waits"
            assert accepting.accept(lambda: True) is None
            assert epoll.poll(0) == [], "nobody is told of it before the next tick"
            assert counts["accepts_failed"] == tick
            accepting.resume()
        assert epoll.poll(0)
        connection = accepting.accept(lambda: True)
        assert connection is not None
        connection.close()
        accepting.resume()
        assert (counts["connections"], epoll.poll(0)) == (1, [])

    connected(tmp_path / "s", 2, test)
    assert caplog.text.count("cannot accept a connection at the decision socket") == 1


def test_nobody_is_let_in_where_there_is_no_room(tmp_path):
    def test(accepting, epoll, counts):
        assert accepting.accept(lambda: False) is None
        assert dict(counts) == {"turned_away": 1}

    connected(tmp_path / "s", 0, test)


def test_the_limit_of_descriptors_is_raised_as_far_as_it_may_be(monkeypatch):
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append(limit))
    raise_descriptor_limit()
    assert limits[-1] == (4096, 4096)
    raise_descriptor_limit()
    assert len(limits) == 2, "there is nothing to raise"
    limits.append((1024, resource.RLIM_INFINITY))
    raise_descriptor_limit()
    assert limits[-1] == (8192, resource.RLIM_INFINITY)
