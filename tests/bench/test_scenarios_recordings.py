"""Recordings of scenarios: every bit comes back, and damage is told."""

from math import nan

import numpy as np
import pytest
from bench_scenarios_made import recorded
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.scenarios.recordings import (
    RecordingError,
    Wish,
    append,
    forget,
    known,
    packed,
    read,
    unpacked,
)
from bench.scenarios.suite import Scenario, path
from esper_otel.leyline.decisions import Proposal, SeedOperation

NUMBERS = st.one_of(
    st.just(nan),
    st.floats(allow_nan=False, allow_infinity=False, width=64),
    st.floats(0, 100, width=32),
    st.integers(0, 10**9).map(lambda nanoseconds: nanoseconds / 1e6),
)
KEYS = st.sampled_from(
    (
        *("loss", "loss_delta", "loss_ewma", "loss_volatility", "nonfinite"),
        *("gradient_norm", "grad_norm_ewma", "grad_var"),
        *("step_latency_ms", "samples_per_s", "hook_latency_ms"),
    )
)


@st.composite
def columns(draw):
    count = draw(st.integers(1, 30))
    keys = draw(st.sets(KEYS, min_size=1))
    return {
        key: draw(st.lists(NUMBERS, min_size=count, max_size=count)) for key in sorted(keys)
    }


def bits(columns):
    return {key: column.tobytes() for key, column in columns.items()}


@settings(max_examples=60, deadline=None)
@given(columns())
def test_what_is_read_is_what_was_recorded_to_the_last_bit(columns):
    before = recorded(steps=columns)
    assert bits(unpacked(packed(before)).steps) == bits(before.steps)


def test_seeds_and_proposals_come_back_at_their_steps():
    wish = Wish(1, 3, Proposal("a-1", SeedOperation.BLEND))
    before = recorded(
        steps={"loss": [1.0, 2.0, 3.0]},
        seeds=[(1, "a-1", {"kasmina.seed.alpha": 0.25}), (2, "a-1", {})],
        wishes=[wish],
    )
    frames = list(unpacked(packed(before)).frames())
    assert [frame.values for frame, _ in frames] == [
        {"step": 1.0, "loss": 1.0},
        {"step": 2.0, "loss": 2.0},
        {"step": 3.0, "loss": 3.0},
    ]
    assert [frame.seeds for frame, _ in frames] == [
        {},
        {"a-1": {"kasmina.seed.alpha": 0.25}},
        {"a-1": {}},
    ]
    assert [proposal for _, proposal in frames] == [None, wish.proposal, wish.proposal]


def test_a_value_that_is_absent_is_not_in_its_frame():
    (frame, _), _ = unpacked(packed(recorded(steps={"loss": [nan, 2.0]}))).frames()
    assert frame.values == {"step": 1.0}


def test_statistics_cost_next_to_nothing():
    losses = np.random.default_rng(0).random(500).astype(np.float32).astype(np.float64)
    plain = len(packed(recorded(steps={"loss": losses})))
    delta = [nan, *np.diff(losses)]
    assert len(packed(recorded(steps={"loss": losses, "loss_delta": delta}))) < plain + 200


@pytest.mark.parametrize("kept", [-1, 2, 40])
def test_a_damaged_file_is_told_with_its_name(tmp_path, kept):
    file = tmp_path / "x.tapes"
    append(file, [recorded(steps={"loss": [1.0, 2.0]})])
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RecordingError, match=r"x\.tapes: .*record it anew"):
        list(read(file))


def test_a_record_whose_values_are_others_is_refused(tmp_path):
    body = bytearray(packed(recorded(steps={"loss": [1.0, 2.0]})))
    body[len(body) // 2] ^= 1
    file = tmp_path / "x.tapes"
    file.write_bytes(len(body).to_bytes(4, "big") + body)
    with pytest.raises(RecordingError):
        list(read(file))


def test_recording_goes_on_where_it_was_left_and_can_begin_anew(tmp_path):
    first, second = Scenario("digits", "plain", 0), Scenario("digits", "cosine", 0)
    for scenario in (first, second):
        append(path(scenario, tmp_path), [recorded(scenario, steps={"loss": [1.0]})])
    assert known(tmp_path) == {first, second}
    forget({first}, tmp_path)
    assert known(tmp_path) == {second}
