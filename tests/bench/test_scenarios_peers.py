"""Rules of other projects as judges of recordings."""

from math import nan

import pytest
from bench_scenarios_made import recorded

from bench.scenarios.peers import PEERS, KillLossSpike, SkipStep, peer_outcome
from bench.scenarios.suite import Scenario

STEADY = [1.0, 1.1] * 100


def acted(judge, losses, norms=None):
    """Numbers of the steps at which it acts, from 0."""
    norms = [1.0] * len(losses) if norms is None else norms
    return [
        step
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True))
        if judge.acts({"loss": loss, "gradient_norm": norm} if loss == loss else LOST)
    ]


LOST = {"nonfinite": 1.0}
"""Values of a step whose loss and gradients were not finite."""


@pytest.mark.parametrize("sign", [1, -1])
def test_skip_step_acts_on_a_loss_beyond_six_deviations(sign):
    # The deviation of the steady loss is 0.05.
    losses = [*STEADY, 1.05 + sign * 0.25, 1.0, 1.05 + sign * 0.4, 1.0]
    assert acted(SkipStep(), losses, [*STEADY, *STEADY[:4]]) == [202]


def test_skip_step_acts_on_a_gradient_norm_as_well_and_not_before_it_has_a_past():
    assert acted(SkipStep(), STEADY[:64], [*STEADY[:62], 9.0, 1.0]) == []
    assert acted(SkipStep(), STEADY[:65], [*STEADY[:63], 9.0, 1.0]) == [63]


def test_skip_step_acts_on_what_is_not_finite_and_as_long_as_it_remembers_it():
    losses = [*STEADY[:100], nan, *STEADY[:160]]
    found = acted(SkipStep(), losses, [*STEADY, *STEADY][: len(losses)])
    assert found == list(range(100, 229))


def test_kill_loss_spike_acts_on_the_fifth_outlier_in_a_row():
    losses = [*[1.0] * 100, *[2.5] * 4, 1.0, *[2.5] * 6]
    assert acted(KillLossSpike(1000), losses) == [109, 110]


def test_kill_loss_spike_acts_where_half_of_its_window_is_above_the_first_one():
    losses = [*[1.0] * 100, *[1.0] * 100, *[1.5] * 52]
    assert acted(KillLossSpike(1000), losses)[:1] == [250]


def test_kill_loss_spike_waits_for_a_window_of_a_twentieth_of_the_run():
    losses = [*[1.0] * 150, *[9.0] * 6]
    assert acted(KillLossSpike(1000), losses) == [154, 155]
    assert acted(KillLossSpike(4000), losses) == []


def test_an_action_before_the_trouble_is_false_and_one_after_it_an_answer():
    run = recorded(
        Scenario("digits", "lr_times_50", 1),
        steps={
            "loss": [*STEADY[:100], 9.0, *STEADY[:99], 9.0, 9.0],
            "gradient_norm": [*STEADY, 1.0, 1.0],
        },
        at=201,
    )
    found = peer_outcome([run], PEERS["OLMo's SkipStepOptimizer"])
    assert [step for step, _ in found.acted] == [101]
    assert (found.answered, found.acted_on, found.healthy) == (201, 201, 200)
