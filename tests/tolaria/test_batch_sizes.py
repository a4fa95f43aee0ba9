"""A lasting change of batch size or sequence length is noticed once, and nothing else is."""

import random
from itertools import chain, repeat

import pytest
from tolaria.loops import make, one_step, stop_the_clock

from esper_otel.tolaria.batch_sizes import LASTING, MOST_CHANGES, STEADY, BatchSizes


def changes(sizes):
    """Where phases begin, by step, and their names."""
    seen = BatchSizes()
    found = ((step, seen.change(size)) for step, size in enumerate(sizes))
    return [(step, name) for step, name in found if name]


def times(*parts):
    return list(chain.from_iterable(repeat(size, count) for size, count in parts))


def test_a_change_is_told_with_the_second_step_of_the_new_size():
    assert changes(times(((32, 0), 50), ((64, 0), 50))) == [(51, "batches of 64")]
    assert changes(times(((8, 128), 50), ((8, 512), 50))) == [(51, "batches of 8 × 512")]
    assert changes(times(((8, 128), 50), ((4, 256), 50))) == [(51, "batches of 4 × 256")]


@pytest.mark.parametrize(
    "sizes",
    [
        times(((32, 3), 200)),
        times(((0, 0), 40), ((32, 3), 40), ((0, 0), 40)),
        times(((32, 0), STEADY - 1), ((64, 0), 50)),
        # Epochs whose last batch is smaller, of many steps and of few.
        times(((32, 3), 40), ((7, 3), 1)) * 6,
        times(((32, 3), 4), ((7, 3), 1)) * 20,
        # Two kinds of batches in turn.
        times(((32, 3), 1), ((8, 3), 1)) * 60,
        # Padded sequences: each batch has another length.
        [(16, random.Random(step).randint(20, 200)) for step in range(300)],
    ],
    ids=["steady", "unknown", "early", "epochs", "short epochs", "in turn", "padded"],
)
def test_what_is_no_lasting_change_of_what_was_steady_is_not_told(sizes):
    assert changes(sizes) == []


def test_the_size_of_the_batch_is_told_where_the_length_never_settles():
    padded = [(16, 20 + 7 * step % 90) for step in range(60)]
    longer = [(32, 20 + 7 * step % 90) for step in range(60)]
    assert changes(padded + longer) == [(61, f"batches of 32 × {longer[1][1]}")]


def test_a_size_that_was_steady_before_begins_nothing_when_it_comes_back():
    """Data sorted by length goes through the same lengths in each epoch."""
    epoch = times(((8, 64), 30), ((8, 128), 30), ((8, 256), 30))
    assert [step for step, _ in changes(epoch * 3)] == [31, 61]


def test_a_phase_that_the_loop_names_takes_its_sizes_along():
    seen = BatchSizes()
    for size in times(((32, 0), 40)):
        seen.change(size)
    seen.forget_usual()
    assert not any(seen.change(size) for size in times(((64, 0), 40)))
    assert changes(times(((64, 0), 40), ((128, 0), LASTING))) != []


def test_a_loop_that_never_stops_changing_is_left_alone_in_the_end():
    ever_larger = times(*(((size, 0), STEADY + LASTING) for size in range(1, 2 * MOST_CHANGES)))
    assert len(changes(ever_larger)) == MOST_CHANGES


def test_the_phase_is_that_of_the_step_and_of_those_that_follow(monkeypatch):
    clock = stop_the_clock(monkeypatch)
    recorder, frames = make()
    for samples in times((32, 20), (64, 3)):
        one_step(recorder, clock, samples=samples)
    assert [values["phase"] for _, values in frames.taken] == [0.0] * 21 + [1.0] * 2
