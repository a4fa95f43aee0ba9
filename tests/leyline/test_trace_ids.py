"""Ids that both sides work out: equal where they must meet, different everywhere else."""

from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.trace_ids import span_id, trace_id

names = st.text(max_size=20)
steps = st.integers(min_value=0, max_value=2**40)


@given(names, steps)
def test_ids_have_the_size_of_their_kind_and_say_something(run, step):
    assert 0 < trace_id(run, step) < 2**128
    assert 0 < span_id(run, 0, "i", step, "train.step") < 2**64


def test_a_step_is_one_trace_whoever_asks():
    assert trace_id("run", 7) == trace_id("run", 7)
    assert trace_id("run1", 2) != trace_id("run", 12)
    assert len({trace_id(run, step) for run in ("a", "b") for step in range(100)}) == 200


def test_each_span_of_a_step_has_its_own_id():
    ids = {
        span_id("run", rank, instance, step, name)
        for rank in range(3)
        for instance in ("x", "y")
        for step in range(10)
        for name in ("train.step", "tamiyo.decide")
    }
    assert len(ids) == 3 * 2 * 10 * 2
