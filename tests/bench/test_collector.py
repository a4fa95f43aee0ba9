"""The Collector's bench: when it says that an outage did not disturb training."""

import pytest

from bench.collector import UNDISTURBED, disturbance


@pytest.mark.parametrize(("slow_us", "holds"), [(100.0, True), (500.0, False)])
def test_frames_that_take_longer_while_the_collector_is_away_are_a_disturbance(slow_us, holds):
    before = [50.0] * 97 + [100.0] * 3
    during = [50.0] * 970 + [slow_us] * 30 + [9_000.0]
    p99, longest = disturbance(before, during)
    assert (p99.value, p99.baseline, p99.bar) == (slow_us, 100.0, UNDISTURBED)
    assert p99.holds is holds
    assert (longest.value, longest.baseline) == (9_000.0, 100.0)
