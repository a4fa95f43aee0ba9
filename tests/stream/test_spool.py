"""The spool: bounded, and produced = delivered + spooled + dropped at every moment."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper_otel.stream.destination import Signal
from esper_otel.stream.spool import MAX_GROUP, Account, Spool

M, T = Signal.METRICS, Signal.TRACES


def test_batches_come_out_in_order_and_travel_together():
    spool = Spool(1000)
    for body in (b"a", b"b", b"c"):
        spool.put(M, body, 1)
    spool.put(T, b"t", 7)
    group = spool.next_group(M)
    assert (group.body(), group.items, group.signal) == (b"abc", 3, M)
    spool.deliver(group)
    assert spool.account(M) == Account(produced=3, delivered=3)
    assert spool.account(T) == Account(produced=7, spooled=7)


def test_a_group_is_no_larger_than_a_request():
    spool = Spool(10 * MAX_GROUP)
    half = bytes(MAX_GROUP // 2)
    for _ in range(3):
        spool.put(M, half, 1)
    assert [len(spool.next_group(M).batches) for _ in range(2)] == [2, 1]


def test_a_group_leaves_most_of_a_small_spool_to_what_is_newer():
    spool = Spool(40)
    for _ in range(4):
        spool.put(M, b"12345", 1)
    assert len(spool.next_group(M).body()) == 10


def test_over_the_bound_the_oldest_of_all_signals_is_dropped_and_counted():
    spool = Spool(10)
    spool.put(T, b"12345", 2)
    spool.put(M, b"67890", 3)
    spool.put(M, b"x", 1)
    assert spool.account(T) == Account(produced=2, dropped=2)
    assert spool.account(M) == Account(produced=4, spooled=4)


def test_what_is_in_flight_is_not_dropped_under_the_sender():
    spool = Spool(10)
    spool.put(M, b"0123456789", 1)
    group = spool.next_group(M)
    spool.put(M, b"new", 5)
    assert spool.account(M) == Account(produced=6, spooled=1, dropped=5)
    spool.deliver(group)
    assert spool.account(M) == Account(produced=6, delivered=1, dropped=5)


def test_what_was_put_back_is_first_again():
    spool = Spool(100)
    spool.put(M, b"1", 1)
    group = spool.next_group(M)
    spool.put(M, b"2", 1)
    spool.put_back(group)
    assert spool.next_group(M).body() == b"12"


def test_what_was_refused_together_is_tried_one_by_one():
    spool = Spool(100)
    for body in (b"good", b"bad", b"good"):
        spool.put(M, body, 1)
    assert not spool.refuse(spool.next_group(M))
    spool.put(M, b"later", 1)
    sent = []
    for _ in range(3):
        group = spool.next_group(M)
        sent.append(group.body())
        if group.body() == b"bad":
            assert spool.refuse(group)
        else:
            spool.deliver(group)
    assert sent == [b"good", b"bad", b"good"]
    assert spool.account(M) == Account(4, delivered=2, spooled=1, dropped=1, refused=1)


def test_a_receiver_can_take_a_request_but_for_a_part():
    spool = Spool(100)
    spool.put(M, b"1", 10)
    spool.deliver(spool.next_group(M), rejected=4)
    assert spool.account(M) == Account(10, delivered=6, dropped=4, refused=4)


def test_a_closed_line_refuses_what_waits_what_flies_and_what_comes():
    spool = Spool(100)
    spool.put(T, b"1", 1)
    group = spool.next_group(T)
    spool.put(T, b"2", 2)
    spool.close_line(T)
    spool.deliver(group)
    spool.put(T, b"3", 3)
    assert spool.next_group(T) is None
    assert spool.account(T) == Account(6, dropped=6, refused=6)


def test_sealing_hands_over_everything_oldest_first_and_ignores_late_answers():
    spool = Spool(100)
    spool.put(M, b"1", 1)
    group = spool.next_group(M)
    spool.put(T, b"2", 1)
    spool.put(M, b"3", 1)
    assert [batch.body for batch in spool.seal()] == [b"1", b"2", b"3"]
    spool.deliver(group)
    assert spool.next_group(M) is None
    assert spool.account(M) == Account(2, spooled=2)
    spool.put(M, b"4", 1)
    assert spool.account(M) == Account(3, spooled=2, dropped=1)


def test_finishing_lets_takers_go_once_the_line_is_empty():
    spool = Spool(100)
    spool.put(M, b"1", 1)
    spool.end_input()
    spool.deliver(spool.next_group(M))
    assert spool.next_group(M) is None


def test_what_is_taken_at_once_is_nobody_elses_until_it_is_handed_on():
    spool = Spool(100)
    assert spool.take_at_once(M) is None
    spool.put(M, b"1", 1)
    spool.put(T, b"2", 1)
    group = spool.take_at_once(M)
    assert group is not None
    assert group.body() == b"1"
    spool.put(M, b"3", 1)
    assert spool.take_at_once(M) is None
    spool.hand_on(group)
    assert spool.take_at_once(M) is None
    assert spool.next_group(M) is group
    spool.deliver(group)
    second = spool.take_at_once(M)
    assert second is not None
    assert second.body() == b"3"
    spool.put_back(second)
    assert spool.take_at_once(M) is None, "nobody takes it at the moment"
    spool.hand_on(second)
    again = spool.next_group(M)
    assert again is not second
    assert again.body() == b"3"


def test_what_was_taken_at_once_and_is_not_settled_by_the_end_is_left():
    spool = Spool(100)
    spool.put(M, b"1", 1)
    assert spool.take_at_once(M) is not None
    spool.put(M, b"2", 1)
    spool.end_input()
    assert spool.next_group(M) is None
    assert [batch.body for batch in spool.seal()] == [b"1", b"2"]


class SpoolMachine(RuleBasedStateMachine):
    """Any order of events: the account balances and the bound holds."""

    def __init__(self) -> None:
        super().__init__()
        self.spool = Spool(50)
        self.flying = {}
        self.sealed = False

    @rule(signal=st.sampled_from(Signal), size=st.integers(0, 40), items=st.integers(0, 9))
    def put(self, signal, size, items):
        self.spool.put(signal, bytes(size), items)

    @rule(signal=st.sampled_from(Signal))
    def take(self, signal):
        waiting = self.spool._lines[signal]
        if signal not in self.flying and (waiting or self.sealed):
            group = self.spool.next_group(signal)
            if group is not None:
                self.flying[signal] = group

    @precondition(lambda self: self.flying)
    @rule(end=st.sampled_from(["deliver", "refuse", "put_back"]))
    def settle(self, end):
        _, group = self.flying.popitem()
        getattr(self.spool, end)(group)

    @rule()
    def close_traces(self):
        self.spool.close_line(T)

    @precondition(lambda self: not self.sealed)
    @rule()
    def seal(self):
        self.sealed = True
        self.spool.seal()

    @invariant()
    def balances(self):
        for signal in Signal:
            account = self.spool.account(signal)
            assert account.produced == account.delivered + account.spooled + account.dropped
            assert min(account.delivered, account.spooled, account.dropped) >= 0
            assert account.refused <= account.dropped

    @invariant()
    def is_bounded(self):
        flying = sum(
            len(group.body()) for group in self.spool._in_flight.values() if group is not None
        )
        waiting = sum(len(batch.body) for line in self.spool._lines.values() for batch in line)
        assert waiting + flying == self.spool.size
        assert waiting == 0 or waiting + flying <= 50


TestSpoolInAnyOrder = SpoolMachine.TestCase
TestSpoolInAnyOrder.settings = settings(max_examples=50, deadline=None)


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=5))
def test_a_group_body_is_its_batches_end_to_end(bodies):
    spool = Spool(1000)
    for body in bodies:
        spool.put(M, body, 1)
    assert spool.next_group(M).body() == b"".join(bodies)
