"""The step under way: what the loop does, turned into times, losses and phases."""

import pytest
from tolaria.loops import MS, Late

from esper_otel.tolaria.fetches import Source
from esper_otel.tolaria.losses import ConditionalReading
from esper_otel.tolaria.step import MAX_PHASES, REPORTABLE, StepUnderWay


@pytest.fixture
def step(clock):
    step = StepUnderWay(enriched=True)
    step.start_next(clock(), 1)
    return step


def micro_batch(step, clock, loss=1.0, *, fetch=1.0, forward=4.0, backward=6.0):
    asked_for = clock()
    clock.pass_ms(fetch)
    step.batch_came(asked_for, (8, 0))
    clock.pass_ms(forward)
    step.backward_begins()
    clock.pass_ms(backward)
    step.backward_ends(loss)


def names(step):
    return [name for name, _, _ in step.phases]


def test_time_is_tiled(clock, step):
    began = clock()
    micro_batch(step, clock)
    clock.pass_ms(0.25)  # clipping
    hook_began = clock()
    clock.pass_ms(0.5)
    step.optimizer_approaches(hook_began, 3.0)
    clock.pass_ms(0.75)  # a decision is taken, or the update is checked
    step.optimizer_begins(hook_began)
    clock.pass_ms(2.0)
    ended = step.optimizer_ends()
    assert names(step) == [
        "train.input_wait",
        "train.forward",
        "train.backward",
        "train.optimizer",
        "tolaria.gradient_norm",
        "train.optimizer",
    ]
    assert step.norm == 3.0
    assert step.prepare_ns == 1.25 * MS
    assert step.optimizer_ns == 2.25 * MS
    parts = step.wait_ns + step.forward_ns + step.backward_ns + step.optimizer_ns
    assert parts + step.prepare_ns == ended - began == clock() - began


def test_an_optimizer_that_nobody_prepared_has_no_time_of_its_own(clock, step):
    clock.pass_ms(3.0)
    assert step.optimizer_ends() == clock()
    assert step.optimizer_ns == 0
    assert step.phases == []


def test_a_norm_measured_after_the_step_is_no_part_of_the_optimizers_time(clock, step):
    hook_began = clock()
    step.optimizer_begins(hook_began)
    clock.pass_ms(2.0)
    step.optimizer_ends()
    clock.pass_ms(0.5)
    assert step.measured(4.0) == clock()
    assert (step.norm, step.optimizer_ns, step.prepare_ns) == (4.0, 2 * MS, 0.5 * MS)


@pytest.mark.parametrize(
    ("losses", "shares", "expected"),
    [
        ([2.0], False, (2.0, 1)),
        ([1.0, 2.0, 6.0], False, (9.0, 3)),
        ([1.0, 2.0, 6.0], True, (9.0, 1)),
        ([1.0, None], False, (1.0, 1)),
        ([None], False, (None, 0)),
    ],
)
def test_losses_add_up(clock, step, losses, shares, expected):
    if shares:
        step.losses.prescaled()
    for loss in losses:
        micro_batch(step, clock, loss)
    assert step.loss == expected


def test_a_reported_loss_goes_before_what_backward_saw(clock, step):
    step.loop_reported(3.0, {})
    micro_batch(step, clock, 9.0)
    step.loop_reported(5.0, {})
    assert step.loss == (8.0, 2)


def test_of_the_losses_of_a_closure_the_first_counts(clock, step):
    step.closure_begins()
    for loss in (4.0, 2.0, 1.0):
        micro_batch(step, clock, loss)
    assert step.loss == (4.0, 1)


def test_the_loss_of_another_optimizer_is_the_steps_only_when_none_follows(clock, step):
    micro_batch(step, clock, 4.0)
    step.losses.another_stepped()
    assert step.loss == (4.0, 1)
    micro_batch(step, clock, 1.0)
    assert step.loss == (1.0, 1)


def test_what_a_skipped_attempt_learnt_is_forgotten_and_its_time_is_not(clock, step):
    micro_batch(step, clock, 4.0)
    step.loop_reported(4.0, {"accuracy": 0.5})
    step.clipped(7.0)
    step.skipped()
    assert (step.loss, step.norm, step.reported) == ((None, 0), None, {})
    micro_batch(step, clock, 2.0)
    assert step.loss == (2.0, 1)
    assert step.backward_ns == 12 * MS


@pytest.mark.parametrize(("overflowed", "told"), [(0.0, 4.0), (1.0, None)])
def test_whether_it_was_skipped_may_be_told_later(clock, step, overflowed, told):
    micro_batch(step, clock, 4.0)
    step.clipped(4.0)
    doubt = Late()
    step.may_be_skipped(doubt)
    loss, parts = step.loss
    assert isinstance(loss, ConditionalReading)
    assert parts == 1
    assert not loss.ready()
    doubt.number = overflowed
    assert loss.ready()
    assert (loss.value(), step.norm.value()) == (told, told)


@pytest.mark.parametrize("enriched", [True, False])
def test_gated_values_are_taken_only_where_they_are_wanted(enriched):
    step = StepUnderWay(enriched=enriched)
    step.loop_reported(None, {"accuracy": 0.5, "grad_conflict_rate": 0.25})
    step.copied_to_device(1.5)
    expected = {"accuracy": 0.5, "grad_conflict_rate": 0.25} if enriched else {"accuracy": 0.5}
    slots = {REPORTABLE[key]: value for key, value in expected.items()}
    assert len(step.reported) == len(slots) + enriched
    assert slots.items() <= step.reported.items()


def test_a_key_that_no_metric_has_is_a_custom_value_of_this_step_alone(step):
    step.loop_reported(None, {"speed": 1.0, "accuracy": 0.5})
    assert (step.custom, len(step.reported)) == ({"speed": 1.0}, 1)
    step.start_next(1, 1)
    assert step.custom == {}


def test_an_evaluation_is_outside_of_the_step(clock, step):
    for _ in range(3):
        asked_for = clock()
        clock.pass_ms(10)
        step.batch_came(asked_for, (256, 0), Source(7, 8, graded=False))
    step.batches_ended(7)
    micro_batch(step, clock)
    assert step.outside_ns == 30 * MS
    assert step.span_start == clock() - 11 * MS
    assert step.wait_ns == 1 * MS
    assert step.size == (8, 0)


def test_phases_of_a_step_that_never_ends_are_bounded_and_its_times_are_not(clock, step):
    for _ in range(3 * MAX_PHASES):
        micro_batch(step, clock)
        step.phase("optimizer", clock(), clock() + MS)
    assert len(step.phases) <= MAX_PHASES + 4
    assert step.backward_ns == 3 * MAX_PHASES * 6 * MS
    assert step.optimizer_ns >= 3 * MAX_PHASES * MS


def test_nothing_of_a_step_is_left_for_the_next(clock, step):
    fresh = StepUnderWay(enriched=True)
    fresh.losses_prescaled()
    step.losses_prescaled()
    step.losses.prescaled()
    micro_batch(step, clock)
    step.losses.another_stepped()
    step.loop_reported(1.0, {"accuracy": 0.5})
    step.optimizer_approaches(clock(), 2.0)
    step.optimizer_begins(clock())
    step.phase("forward", clock(), clock())
    for each in (step, fresh):
        each.start_next(clock(), 2)
    assert vars(step.losses) == vars(fresh.losses)
    goes_on = {"fetches": None, "losses": None, "backwards": 0, "_batch_sizes": None}
    assert vars(step) | goes_on == vars(fresh) | goes_on
