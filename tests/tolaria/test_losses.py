"""What several calls of ``backward`` in one step, and reports, make of its loss."""

import pytest
from tolaria.loops import Late, make, one_step

from esper_otel.tolaria.losses import Assumed, Evaluation, Follows, StepLosses

QUARTER = Evaluation(divisor=4.0)
OWN_BATCH = Evaluation(batch=7)
MSE, NLL = ("MseLossBackward0", "AddmmBackward0"), ("NllLossBackward0", "LogSoftmaxBackward0")


def loss_of(losses, *calls):
    """The loss of a step with these (loss, evaluation)."""
    for loss, evaluation in calls:
        losses.add(loss, evaluation, optimizing=False)
    total, parts = losses.value
    return total / parts


@pytest.mark.parametrize(
    ("calls", "loss", "assumed"),
    [
        ([(3.0, Evaluation())], 3.0, None),
        ([(3.0, Evaluation(divisor=32.0))], 3.0, None),  # by the number of its samples
        ([(1.0, None), (3.0, None)], 2.0, None),  # of which nobody knows anything
        ([(1.0, Evaluation()), (3.0, Evaluation())], 2.0, Assumed.MEAN),
        ([(1.0, OWN_BATCH), (3.0, OWN_BATCH)], 2.0, None),  # that is certain
        ([(2.0, QUARTER)] * 4, 8.0, Assumed.SHARES),
        ([(2.0, QUARTER)] * 3, 2.0, Assumed.MEAN),  # not by their number
        ([(1.0, Evaluation(4.0)), (3.0, Evaluation(4 / 3))], 4.0, Assumed.SHARES),
        ([(1.0, Evaluation(keeps_graph=True)), (3.0, Evaluation())], 4.0, Assumed.SEPARATE),
        (
            [
                (1.0, Evaluation(batch=7, spares_others=True)),
                (3.0, Evaluation(spares_others=True)),
            ],
            4.0,
            Assumed.SEPARATE,
        ),
        (
            [(1.0, Evaluation(operations=MSE)), (3.0, Evaluation(operations=NLL))],
            4.0,
            Assumed.SEPARATE,
        ),
        # Two losses of each of two batches: the mean of the sums.
        (
            [
                (each, Evaluation(batch=batch, spares_others=True))
                for each, batch in ((1.0, 7), (3.0, 0), (5.0, 7), (7.0, 0))
            ],
            8.0,
            Assumed.SEPARATE,
        ),
        # Batches of their own, although a loop has another optimizer: micro-batches.
        (
            [
                (1.0, OWN_BATCH._replace(spares_others=True)),
                (3.0, OWN_BATCH._replace(spares_others=True)),
            ],
            2.0,
            None,
        ),
        # With other weights (SAM), and with gradients of before thrown away.
        ([(1.0, Evaluation()), (3.0, Evaluation(follows=Follows.AFRESH))], 1.0, None),
        ([(1.0, Evaluation()), (3.0, Evaluation(follows=Follows.INSTEAD))], 3.0, None),
    ],
)
def test_a_step_has_the_loss_that_its_calls_make(calls, loss, assumed):
    losses = StepLosses()
    assert loss_of(losses, *calls) == loss
    assert losses.assumed == assumed


def test_a_step_with_fewer_shares_has_the_mean_of_what_was_divided():
    losses = StepLosses()
    assert loss_of(losses, *[(2.0, QUARTER)] * 4) == 8.0
    losses.start_next()
    assert loss_of(losses, (2.0, QUARTER), (3.0, QUARTER)) == 10.0
    losses.start_next()
    assert loss_of(losses, (3.0, QUARTER)) == 12.0
    losses.start_next()
    assert loss_of(losses, (3.0, Evaluation())) == 3.0


@pytest.mark.parametrize(
    ("evaluation", "loss"),
    [(QUARTER, 8.0), (Evaluation(keeps_graph=True), 8.0), (OWN_BATCH, 2.0)],
)
def test_steps_that_nobody_looks_at_any_more_are_as_those_before(evaluation, loss):
    losses = StepLosses()
    for known in (evaluation, None):
        assert loss_of(losses, *[(2.0, known)] * 4) == loss
        losses.start_next()


def test_what_is_said_goes_before_what_is_found():
    losses = StepLosses()
    losses.prescaled(always=True)
    losses.start_next()
    assert loss_of(losses, (1.0, OWN_BATCH), (3.0, OWN_BATCH)) == 4.0
    assert losses.assumed is None
    losses.report(5.0)
    assert losses.value == (5.0, 1)


def test_a_training_takes_over_what_another_has_of_the_step_under_way():
    ours, others = StepLosses(), StepLosses()
    others.add(3.0, OWN_BATCH, optimizing=False)
    ours.take_over(others)
    assert (ours.value, others.value) == ((3.0, 1), (None, 0))


def test_the_loss_of_micro_batches_is_their_mean_and_their_samples_add_up(clock):
    recorder, frames = make()
    for _ in range(2):
        for loss in (1.0, 2.0, 6.0):
            recorder.batch_came(clock(), (8, 0))
            recorder.backward_begins()
            clock.pass_ms(2)
            recorder.backward_ends(loss)
        recorder.optimizer_begins(clock(), 1.0)
        recorder.optimizer_ends()
        recorder.end_step()
    _, last = frames.taken[-1]
    assert last["loss"] == 3.0
    assert last["backward_ms"] == 6.0
    assert last["samples_per_s"] == pytest.approx(24 / 6e-3)


def test_a_reported_loss_takes_the_place_of_what_backward_saw(clock):
    recorder, frames = make()
    recorder.loop_reported(0.25, {})
    one_step(recorder, clock, loss=9.0)
    one_step(recorder, clock, loss=9.0)
    assert [values["loss"] for _, values in frames.taken] == [0.25, 9.0]


def test_losses_that_are_shares_add_up_until_they_are_none_any_more(clock):
    recorder, frames = make()

    def step():
        for loss in (1.0, 2.0, 6.0):
            recorder.backward_begins()
            recorder.backward_ends(loss)
        recorder.end_step()

    step()
    recorder.losses_prescaled()
    step()
    step()
    recorder.losses_prescaled(False)
    step()
    recorder.under_way.losses.prescaled()
    step()
    step()
    assert [values["loss"] for _, values in frames.taken] == [3.0, 9.0, 9.0, 3.0, 9.0, 3.0]


def test_frames_that_wait_for_a_device_keep_what_their_losses_were(clock):
    recorder, frames = make()
    late = Late(), Late()
    recorder.losses_prescaled()
    for loss in late:
        recorder.backward_begins()
        recorder.backward_ends(loss)
    recorder.end_step()
    recorder.losses_prescaled(False)
    late[0].number, late[1].number = 1.0, 2.0
    recorder.flush()
    assert frames.taken[0][1]["loss"] == 3.0


def test_reported_losses_are_nobodys_shares(clock):
    """A loop reports what it computed; a framework divides what backward begins from."""
    recorder, frames = make()
    recorder.losses_prescaled()
    recorder.loop_reported(1.0, {})
    recorder.loop_reported(3.0, {})
    one_step(recorder, clock, loss=9.0)
    assert frames.taken[0][1]["loss"] == 2.0
