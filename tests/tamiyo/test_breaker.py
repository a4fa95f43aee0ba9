from esper_otel.tamiyo.breaker import Breaker, State

MS = 1_000_000


def opened() -> Breaker:
    breaker = Breaker()
    for _ in range(3):
        breaker.failed(0)
    return breaker


def test_two_failures_leave_it_closed_and_a_success_forgets_them():
    breaker = Breaker()
    for _ in range(5):
        breaker.failed(0)
        breaker.failed(0)
        assert breaker.state is State.CLOSED
        breaker.succeeded()
    assert breaker.opened == 0


def test_the_third_failure_in_a_row_opens_it_for_100_ms():
    breaker = opened()
    assert breaker.state is State.OPEN
    assert not breaker.may_probe(100 * MS - 1)
    assert breaker.may_probe(100 * MS)


def test_every_failed_probe_doubles_the_cool_down_up_to_30_s():
    breaker = opened()
    cool_downs = []
    now = 0
    for _ in range(12):
        now = breaker.retry_at_ns
        breaker.probing()
        assert breaker.state is State.HALF_OPEN
        breaker.failed(now)
        cool_downs.append((breaker.retry_at_ns - now) // MS)
    assert cool_downs[:4] == [200, 400, 800, 1600]
    assert cool_downs[-1] == 30_000


def test_a_probe_that_succeeds_closes_on_trial():
    breaker = opened()
    breaker.probing()
    breaker.succeeded()
    assert breaker.state is State.CLOSED
    breaker.failed(0)
    assert breaker.state is State.OPEN
    assert breaker.retry_at_ns == 200 * MS, "the cool-down goes on doubling"


def test_the_success_after_the_trial_makes_it_as_new():
    breaker = opened()
    breaker.probing()
    breaker.succeeded()
    breaker.succeeded()
    breaker.failed(0)
    breaker.failed(0)
    assert breaker.state is State.CLOSED
    breaker.failed(0)
    assert breaker.retry_at_ns == 100 * MS
