from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.kasmina.context import Plateau
from esper_otel.kasmina.lifecycle import SeedView
from esper_otel.kasmina.planning import choose
from esper_otel.leyline.decisions import Proposal, SeedOperation

BLEND, CULL, GERMINATE = SeedOperation.BLEND, SeedOperation.CULL, SeedOperation.GERMINATE


def seen(seed_id, *, ready=False, cull_reason="", frozen=False):
    return SeedView(seed_id, BLEND, ready, cull_reason, frozen)


@pytest.mark.parametrize(
    ("seeds", "germination", "expected"),
    [
        ([], None, None),
        ([], "new", Proposal("new", GERMINATE)),
        ([seen("a")], "new", Proposal("new", GERMINATE)),
        ([seen("a", ready=True)], "new", Proposal("a", BLEND)),
        ([seen("a", ready=True), seen("b", ready=True)], None, Proposal("a", BLEND)),
        ([seen("a", ready=True), seen("b", cull_reason="x")], None, Proposal("b", CULL)),
        ([seen("a", ready=True, cull_reason="x")], None, Proposal("a", CULL)),
        (
            [seen("a", cull_reason="x", frozen=True), seen("b", ready=True)],
            None,
            Proposal("b", BLEND),
        ),
        ([seen("a", ready=True, frozen=True)], None, Proposal("a", BLEND)),
        ([seen("a", ready=True, frozen=True)], "new", Proposal("new", GERMINATE)),
    ],
)
def test_one_operation_is_chosen(seeds, germination, expected):
    assert choose(seeds, germination) == expected


def waited(losses, steps=3, improvement=0.1):
    plateau = Plateau(steps, improvement)
    for loss in losses:
        plateau.update(loss)
    return plateau


@pytest.mark.parametrize(
    ("losses", "reached"),
    [
        ([], False),
        ([1.0, 1.0, 1.0], False),
        ([1.0, 1.0, 1.0, 1.0], True),
        ([1.0, 0.95, 0.93, 0.91], True),
        ([1.0, 0.89, 0.89, 0.89], False),
        ([1.0, 2.0, 3.0, 4.0], True),
        ([1.0, nan, inf, nan, nan], False),
        ([-1.0, -1.2, -1.2, -1.2], False),
        ([0.0, 0.0, 0.0, 0.0], True),
    ],
)
def test_a_plateau_is_steps_without_a_better_loss(losses, reached):
    assert waited(losses).reached is reached


def test_after_a_change_of_the_network_it_waits_anew():
    plateau = waited([1.0] * 9)
    plateau.restart()
    for _ in range(3):
        plateau.update(5.0)
    assert not plateau.reached
    plateau.update(5.0)
    assert plateau.reached


@given(st.lists(st.floats(0.1, 100), min_size=1), st.integers(1, 5))
def test_a_loss_that_keeps_falling_by_enough_never_is_one(factors, steps):
    plateau, loss = Plateau(steps, 0.05), 1.0
    for _ in factors:
        loss *= 0.9
        plateau.update(loss)
        assert not plateau.reached
