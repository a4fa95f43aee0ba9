"""Losses of micro-batches that a device still has to deliver, added up."""

import pytest

from esper_otel.tolaria.seal import MOST_UNDER_WAY, Sum, plus


class Late:
    """A value that a device has not delivered yet."""

    def __init__(self):
        self.number = None
        self.lost = False

    def ready(self):
        return self.lost or self.number is not None

    def value(self):
        return self.number


def total_of(*losses):
    total = None
    for loss in losses:
        total = plus(total, loss)
    return total


def test_numbers_add_up_to_a_number():
    assert total_of(1.0) == 1.0
    assert total_of(1.0, 2.0, 4.0) == 7.0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_sum_has_arrived_when_its_last_part_has(order):
    late = Late(), Late()
    total = total_of(late[0], 1.0, late[1])
    for i in order:
        assert not total.ready()
        assert total.value() is None
        late[i].number = 2.0
    assert total.ready()
    assert total.value() == 5.0


def test_a_sum_is_lost_with_one_of_its_parts():
    late = Late(), Late()
    total = total_of(1.0, *late)
    late[0].lost = True
    assert total.ready()
    assert total.value() is None
    total.add(late[1])
    late[1].number = 3.0
    assert total.ready()
    assert total.value() is None


def test_what_has_arrived_is_not_kept():
    total = Sum(0.0)
    for i in range(1000):
        late = Late()
        total.add(late)
        late.number = float(i)
    assert len(total._under_way) <= MOST_UNDER_WAY
    assert total.value() == sum(range(1000))


def test_a_device_that_delivers_nothing_takes_no_memory_without_end():
    total = total_of(*[Late() for _ in range(1000)])
    assert len(total._under_way) <= MOST_UNDER_WAY
    assert total.value() is None
