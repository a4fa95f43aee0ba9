"""An evaluation between steps is in no time of a step, and none of its samples count."""

import pytest
from tolaria.loops import MS, make, one_step

from esper_otel.tolaria.fetches import Source


def test_fetches_of_a_validation_loop_are_not_charged_to_training(clock):
    recorder, frames = make()
    one_step(recorder, clock)
    for _ in range(5):
        asked_for = clock()
        clock.pass_ms(100)
        recorder.batch_came(asked_for, (1000, 0), Source(2, 2))
    one_step(recorder, clock, wait=1.0, samples=32)
    _, last = frames.taken[-1]
    assert last["input_wait_ms"] == pytest.approx(1.0)
    assert last["samples_per_s"] == pytest.approx(32e3 / last["step_latency_ms"])


def evaluate(recorder, clock):
    """Five batches of a validation loader, while no gradients are recorded."""
    for _ in range(5):
        asked_for = clock()
        clock.pass_ms(5)
        recorder.batch_came(asked_for, (256, 0), Source(7, 8, graded=False))
        clock.pass_ms(10)
    recorder.batches_ended(7)


def one_step_on_tensors(recorder, clock):
    clock.pass_ms(2)
    recorder.backward_begins()
    clock.pass_ms(2)
    recorder.backward_ends(1.0)
    recorder.optimizer_begins(clock(), 1.0)
    recorder.optimizer_ends()
    recorder.end_step()


def test_an_evaluation_is_in_no_step_that_fetches_nothing_itself(clock):
    recorder, frames = make(span_every=1)
    evaluate(recorder, clock)
    for _ in range(4):
        one_step_on_tensors(recorder, clock)
    evaluate(recorder, clock)
    one_step_on_tensors(recorder, clock)
    first, *others = (values for _, values in frames.taken)
    assert first["forward_ms"] == 2.0
    for frame in others:
        assert frame["step_latency_ms"] == 4.0
        assert frame["forward_ms"] == 2.0
    for frame in (first, *others):
        assert not frame.keys() & {"input_wait_ms", "samples_per_s"}
    last = frames.timelines[-1]
    assert last.end_unix_nano - last.start_unix_nano == 4 * MS
    assert "train.input_wait" not in {name for name, _, _ in last.phases}


def test_an_evaluation_between_micro_batches_is_in_none_of_their_time(clock):
    recorder, frames = make()
    for _ in range(2):
        clock.pass_ms(2)
        recorder.backward_begins()
        recorder.backward_ends(1.0)
        evaluate(recorder, clock)
        one_step(recorder, clock, wait=1.0, norm_ms=0.0)
    _, last = frames.taken[-1]
    assert last["step_latency_ms"] == pytest.approx(2.0 + 13.0)
    assert last["forward_ms"] == pytest.approx(2.0 + 4.0)
    assert last["input_wait_ms"] == pytest.approx(1.0)
