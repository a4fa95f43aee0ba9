"""One training with several optimizers is one run."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from integrations.trainings import Training, X, all_steps, whole  # noqa: E402
from testkit.loops import generator_and_critic, generator_first  # noqa: E402


def sac(cycles, *, frozen=False, first=0):
    """Actor, critic and temperature, of disjoint parameters, step in each cycle."""
    actor, critic = nn.Linear(4, 2), nn.Linear(6, 1)
    temperature = torch.zeros(1, requires_grad=True)
    of_critic = torch.optim.Adam(critic.parameters())
    of_actor = torch.optim.Adam(actor.parameters())
    of_temperature = torch.optim.Adam([temperature])
    for cycle in range(first + cycles):
        of_critic.zero_grad()
        action = actor(X).detach()
        (critic(torch.cat([X, action], 1)) - 1).square().mean().backward()
        of_critic.step()
        if cycle < first:
            continue
        critic.requires_grad_(not frozen)
        of_actor.zero_grad()
        (-critic(torch.cat([X, actor(X)], 1)).mean()).backward()
        of_actor.step()
        critic.requires_grad_(True)
        of_temperature.zero_grad()
        (temperature.exp() * 0.5).sum().backward()
        of_temperature.step()
    return cycles


@pytest.mark.parametrize("frozen", [False, True], ids=["through the critic", "frozen critic"])
def test_an_actor_its_critic_and_their_temperature_are_one_training(watched, frozen):
    sac(30, frozen=frozen)
    assert all_steps(watched) == {"job": whole(30)}


def test_a_second_agent_is_a_training_of_its_own(watched):
    sac(30)
    sac(25)
    assert all_steps(watched) == {"job": whole(30), "job-2": whole(25)}


@pytest.mark.parametrize("frozen", [False, True], ids=["through the critic", "frozen critic"])
def test_an_actor_that_begins_late_takes_over(watched, frozen):
    sac(10, first=20, frozen=frozen)
    steps = all_steps(watched)
    assert list(steps) == ["job"]
    # The critic steps once more before the actor does. Where no gradient shows that they belong
    # together, the actor's first step is held back and then no step of the run's.
    actors = 10 - frozen
    assert [frame["phase"] for frame in watched.frames("job")] == [0.0] * 21 + [1.0] * actors


@pytest.mark.parametrize("loop", [generator_and_critic, generator_first])
def test_a_generator_and_its_critic_are_one_training(watched, loop):
    cycles = loop()
    assert all_steps(watched) == {"job": whole(cycles)}


def test_two_optimizers_that_share_a_model_are_one_training(watched):
    """As Muon for matrices and AdamW for the rest."""
    model = Training().model
    matrices = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.01)
    rest = torch.optim.AdamW([p for p in model.parameters() if p.dim() < 2])
    for _ in range(30):
        model.zero_grad()
        model(X).square().mean().backward()
        matrices.step()
        rest.step()
    assert all_steps(watched) == {"job": whole(30)}


@pytest.mark.parametrize("within", [True, False], ids=["within backward", "behind it"])
def test_many_optimizers_of_one_model_are_one_training_in_one_phase(watched, within):
    for _ in range(2):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(15)))
        optimizers = {p: torch.optim.SGD([p], lr=0.001) for p in model.parameters()}

        def step(parameter, optimizers=optimizers):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            if within:
                parameter.register_post_accumulate_grad_hook(step)
        for _ in range(12):
            model(X).square().mean().backward()
            for parameter in () if within else optimizers:
                step(parameter)
    assert all_steps(watched) == {"job": whole(12), "job-2": whole(12)}
    phases = {frame["phase"] for name in ("job", "job-2") for frame in watched.frames(name)}
    assert phases == {0.0}


def test_a_weighted_copy_changes_nothing(watched):
    training = Training()
    average = torch.optim.swa_utils.AveragedModel(training.model)
    for _ in range(30):
        training.train(1)
        average.update_parameters(training.model)
    assert all_steps(watched) == {"job": whole(30)}
