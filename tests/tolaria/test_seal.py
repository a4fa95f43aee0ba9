"""Values of a step on their way into its row: sums of losses, previews, odd optimizers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.frames import present, step_row
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.tolaria.losses import MOST_UNDER_WAY, Sum, plus
from esper_otel.tolaria.seal import PendingFrame, Sealer


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


# --- what a row would hold, before its step is over

NUMBERS = st.floats(-1e6, 1e6, width=32) | st.sampled_from([math.nan, math.inf, -math.inf])
VALUES = st.tuples(st.none() | NUMBERS, st.none() | NUMBERS)


def sealed(sealer, loss, norm):
    row = step_row()
    row[STEP_SLOT["nonfinite"]] = 0.0
    assert sealer.seal_now(row, loss, 1, norm, {})
    return present(STEP_KEYS, row)


def previewed(sealer, loss, norm):
    row = step_row()
    row[STEP_SLOT["nonfinite"]] = 0.0
    sealer.preview(row, loss, norm)
    return present(STEP_KEYS, row)


@given(values=st.lists(VALUES, max_size=20), enriched=st.booleans(), times=st.integers(1, 3))
def test_a_preview_is_the_row_to_come_and_is_not_remembered(values, enriched, times):
    asked, plain = Sealer(enriched=enriched), Sealer(enriched=enriched)
    for step, (loss, norm) in enumerate(values):
        would_be = [previewed(asked, loss, norm) for _ in range(times)]
        previewed(asked, 123.0, 456.0)  # nor is another one
        row = sealed(asked, loss, norm)
        assert would_be == [row] * times
        assert row == sealed(plain, loss, norm)
        memories = asked.state_after(step, step_row()), plain.state_after(step, step_row())
        assert repr(memories[0]) == repr(memories[1])


def test_a_preview_takes_no_turn_of_frames_that_wait_for_a_device():
    sealer = Sealer(enriched=True)
    late = Late()
    waiting = PendingFrame(1, 0, step_row(), late, 1, None, {})
    waiting.row[STEP_SLOT["nonfinite"]] = 0.0
    assert sealer.seal_in_order(waiting) == []
    assert previewed(sealer, 5.0, 2.0)["loss"] == 5.0
    late.number = 1.0
    following = PendingFrame(2, 0, step_row(), 3.0, 1, None, {})
    assert sealer.seal_in_order(following) == [waiting, following]
    row = present(STEP_KEYS, following.row)
    assert (row["loss"], row["loss_delta"]) == (3.0, 2.0)
