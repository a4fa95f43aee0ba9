"""The ring: whole frames or none, in order, without waiting."""

from __future__ import annotations

import struct
import threading
from math import inf, isnan, nan

import pytest

from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.stream.ring import FEW, FrameRing, part, points

WIDTH, SEED_WIDTH = len(STEP_KEYS), len(SEED_KEYS)


def a_row(step: int) -> list[float]:
    return [float(step)] + [nan] * (WIDTH - 1)


def a_seed(seed_id: str, value: float) -> tuple[str, list[float]]:
    return seed_id, [value] * SEED_WIDTH


def test_what_was_put_is_taken_once_and_in_order():
    ring = FrameRing(8)
    for step in range(3):
        assert ring.put(100 + step, a_row(step), [a_seed("a", step), a_seed("b", -step)])
    frames = ring.drain()
    assert frames.steps.times.tolist() == [100, 101, 102]
    assert frames.steps.values[:, 0].tolist() == [0, 1, 2]
    assert isnan(frames.steps.values[0, 1])
    assert frames.steps.tags.tolist() == [2, 4, 6]
    assert [frames.seed_ids[tag] for tag in frames.seeds.tags] == ["a", "b"] * 3
    assert frames.seeds.times.tolist() == [100, 100, 101, 101, 102, 102]
    assert frames.seeds.values[:, 0].tolist() == [0, 0, 1, -1, 2, -2]
    assert ring.drain() is None


def test_a_few_are_taken_as_bytes_round_the_end_of_the_ring():
    ring = FrameRing(8)
    taken = b""
    for step in range(30):
        ring.put(step * 1_000_000, a_row(step), ())
        if step % 5 == 4:
            taken += ring.drain_few(step * 1_000_000 + 1)  # the newest is of this millisecond
    taken += ring.drain_few()
    frames = ring.frames_of(taken)
    rows = frames.steps
    assert rows.values[:, 0].tolist() == list(range(30))
    assert rows.times.tolist() == [step * 1_000_000 for step in range(30)]
    assert points(frames) == 30
    assert ring.drain_few() == b""
    assert ring.drain() is None


def test_what_is_not_few_or_has_seeds_is_left_to_the_general_way():
    ring = FrameRing(2 * FEW)
    for step in range(FEW):
        ring.put(step, a_row(step), ())
    assert ring.drain_few() is not None
    for step in range(FEW + 1):
        ring.put(step, a_row(step), ())
    assert ring.drain_few() is None
    assert len(ring.drain().steps.times) == FEW + 1
    ring.put(99, a_row(99), [a_seed("a", 1.0)])
    assert ring.drain_few() is None
    assert ring.drain().seeds.times.tolist() == [99]


def test_custom_values_are_left_to_the_general_way_with_their_steps():
    ring = FrameRing(8)
    ring.put(1_000_000, a_row(1), ())
    ring.put(6_000_000, a_row(2), (), {"f1": 0.5})
    assert ring.drain_few(6_000_001) is None
    assert ring.drain(6_000_001).steps.times.tolist() == [1_000_000]
    assert ring.drain_few() is None
    assert ring.drain().customs == [(0, {"f1": 0.5})]
    assert ring.drain_few() == b""


def test_a_clock_that_was_set_back_keeps_nothing_of_a_few_waiting():
    ring = FrameRing(8)
    ring.put(9_000_000, a_row(0), ())
    assert points(ring.frames_of(ring.drain_few(5_000_000))) == 1


def test_the_millisecond_under_way_is_left_for_the_next_time():
    ring = FrameRing(8)
    now = 5_000_000
    for step, time in enumerate([4_100_000, 4_900_000, 5_100_000, 5_200_000]):
        ring.put(time, a_row(step), [a_seed("a", step)])
    first = ring.drain(now + 300_000)
    assert first.steps.values[:, 0].tolist() == [0, 1]
    assert first.seeds.values[:, 0].tolist() == [0, 1]
    assert ring.drain(now + 400_000) is None
    ring.put(5_900_000, a_row(4), [a_seed("a", 4)])
    second = ring.drain(now + 1_000_000)
    assert second.steps.values[:, 0].tolist() == [2, 3, 4]
    assert second.steps.tags.tolist() == [1, 2, 3]
    assert second.seeds.values[:, 0].tolist() == [2, 3, 4]


def test_a_clock_that_was_set_back_keeps_nothing_waiting():
    ring = FrameRing(8)
    ring.put(9_000_000, a_row(0), ())
    assert ring.drain(5_000_000).steps.values[:, 0].tolist() == [0]


def test_it_goes_round():
    ring = FrameRing(4)
    taken = []
    for step in range(0, 30, 3):
        for each in range(step, step + 3):
            assert ring.put(each, a_row(each), [a_seed("s", each)])
        frames = ring.drain()
        assert frames.steps.tags.tolist() == [1, 2, 3]
        assert frames.seeds.values[:, 0].tolist() == frames.steps.values[:, 0].tolist()
        taken += frames.steps.values[:, 0].tolist()
    assert taken == list(range(30))


def test_a_full_ring_refuses_the_new_frame_and_counts_its_points():
    ring = FrameRing(2)
    assert ring.put(1, a_row(1), ())
    assert ring.put(2, a_row(2), ())
    assert not ring.put(3, [3.0, 0.5, inf] + [nan] * (WIDTH - 3), [a_seed("s", 1.0)])
    assert (ring.accepted, ring.refused_frames) == (2, 1)
    assert ring.refused_points == 2 + SEED_WIDTH
    assert ring.drain().steps.values[:, 0].tolist() == [1, 2]
    assert ring.put(4, a_row(4), ())


def test_a_frame_whose_seeds_have_no_room_is_refused_whole():
    ring = FrameRing(4)
    assert ring.put(1, a_row(1), [a_seed(name, 1.0) for name in "abc"])
    assert not ring.put(2, a_row(2), [a_seed(name, 2.0) for name in "ab"])
    frames = ring.drain()
    assert len(frames.steps.times) == 1
    assert len(frames.seeds.times) == 3


@pytest.mark.parametrize(
    ("row", "seeds"),
    [
        ([1.0], ()),
        (["loss"] * WIDTH, ()),
        (a_row(1), [a_seed("good", 1.0), ("bad", [1.0])]),
    ],
)
def test_a_row_that_is_none_leaves_no_trace(row, seeds):
    ring = FrameRing(4)
    with pytest.raises(struct.error):
        ring.put(1, row, seeds)
    assert ring.drain() is None
    assert ring.put(2, a_row(2), [a_seed("s", 2.0)])
    frames = ring.drain()
    assert [frames.seed_ids[tag] for tag in frames.seeds.tags] == ["s"]


def test_the_latest_frame_is_there_whether_taken_or_not():
    ring = FrameRing(4)
    assert ring.latest() is None
    for step in range(1, 8):
        seeds = [a_seed(f"s{step}", step)] if step % 2 else []
        ring.put(step, a_row(step), seeds)
        for _ in range(2):
            latest = ring.latest()
            assert latest.steps.values[:, 0].tolist() == [step]
            assert latest.seeds.values[:, 0].tolist() == [step] * len(seeds)
            assert [latest.seed_ids[tag] for tag in latest.seeds.tags] == [
                seed_id for seed_id, _ in seeds
            ]
            ring.drain()


def test_a_part_keeps_frames_and_their_seeds_together():
    ring = FrameRing(16)
    for step in range(6):
        ring.put(step, a_row(step), [a_seed("s", step)] * step)
    frames = ring.drain()
    middle = part(frames, 2, 5)
    assert middle.steps.values[:, 0].tolist() == [2, 3, 4]
    assert middle.steps.tags.tolist() == [2, 5, 9]
    assert middle.seeds.values[:, 0].tolist() == [2, 2, 3, 3, 3, 4, 4, 4, 4]
    assert points(middle) == 3 + 9 * SEED_WIDTH


def test_one_thread_writes_while_another_reads():
    ring = FrameRing(64)
    total = 5000

    def write() -> None:
        step = 0
        while step < total:
            step += ring.put(step, [float(step)] * WIDTH, [a_seed("s", step)])

    writer = threading.Thread(target=write)
    writer.start()
    expected = 0
    while expected < total:
        frames = ring.drain()
        if frames is None:
            continue
        steps = frames.steps.values
        count = len(steps)
        wanted = [float(step) for step in range(expected, expected + count)]
        assert steps.min(axis=1).tolist() == steps.max(axis=1).tolist() == wanted
        assert frames.seeds.values[:, -1].tolist() == wanted
        expected += count
    writer.join()
