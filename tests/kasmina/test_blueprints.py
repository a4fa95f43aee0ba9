"""Blueprints: shapes, beginnings, and where their random numbers come from."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from esper_otel.kasmina import blueprints
from esper_otel.kasmina.blueprints import (
    PrivateRandomness,
    RandomNumbersError,
    UnknownBlueprintError,
    blueprint,
    lookup,
    registered,
)

pytestmark = pytest.mark.torch

SHAPES = {2: (3, 8), 3: (3, 5, 8), 4: (3, 8, 4, 6)}
EVERY = [
    pytest.param(name, SHAPES[rank], id=f"{name}-{rank}d")
    for name in registered()
    for rank in sorted(lookup(name).ranks)
]
every_blueprint = pytest.mark.parametrize(("name", "shape"), EVERY)


def noise(shape, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own(monkeypatch):
    """Registering that is undone after the test."""
    monkeypatch.setattr(blueprints, "_registry", dict(blueprints._registry))
    return blueprint


def test_there_are_six_that_are_useful() -> None:
    assert registered()[:6] == (
        "residual_mlp",
        "bottleneck_conv",
        "depthwise_conv",
        "squeeze_excite",
        "low_rank",
        "self_attention",
    )
    assert all(lookup(name).about for name in registered())


@every_blueprint
def test_the_output_has_the_shape_of_the_input(name, shape) -> None:
    seed = lookup(name).build(shape, seed=1)
    for batch in (1, shape[0]):
        assert seed(noise((batch, *shape[1:]))).shape == (batch, *shape[1:])


@every_blueprint
@pytest.mark.parametrize("channels", [1, 2, 3, 6, 20])
def test_any_number_of_channels_will_do(name, shape, channels) -> None:
    dim = 1 if len(shape) == 4 else len(shape) - 1
    shape = tuple(channels if d == dim else size for d, size in enumerate(shape))
    assert lookup(name).build(shape, seed=1)(noise(shape)).shape == shape


@every_blueprint
def test_it_begins_near_identity_but_alive(name, shape) -> None:
    seed = lookup(name).build(shape, seed=1)
    given = noise(shape)
    made = seed(given)
    change = (made - given).norm() / given.norm()
    assert 1e-4 < change < 0.5
    (made * noise(shape, 2)).sum().backward()
    for parameter_name, parameter in seed.named_parameters():
        assert parameter.grad.norm() > 0, parameter_name


@every_blueprint
def test_it_can_learn(name, shape) -> None:
    seed = lookup(name).build(shape, seed=1)
    given = noise(shape)
    wanted = given + 0.3 * noise(shape, 2)
    optimizer = torch.optim.Adam(seed.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (seed(given) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_blueprint
def test_the_seed_alone_decides_its_parameters_and_the_run_is_not_touched(name, shape) -> None:
    plan = lookup(name)
    state = torch.get_rng_state()
    first, again, other = (plan.build(shape, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert any(
        not torch.equal(value, other.state_dict()[key])
        for key, value in first.state_dict().items()
    )


def test_the_usual_initialisation_is_torchs_own() -> None:
    torch.manual_seed(5)
    expected = nn.Linear(4, 3)
    with PrivateRandomness(torch.Generator().manual_seed(5)):
        made = nn.Linear(4, 3)
    assert torch.equal(made.weight, expected.weight)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(3),
        lambda: torch.randn(3),
        lambda: torch.randperm(5),
        lambda: torch.randint(10, (4,)),
        lambda: torch.randint(3, 10, (4,)),
        lambda: torch.empty(3).normal_(),
        lambda: torch.normal(torch.zeros(3), 1.0),
        lambda: torch.bernoulli(torch.full((3,), 0.5)),
        lambda: torch.multinomial(torch.ones(4), 2),
        lambda: nn.init.trunc_normal_(torch.empty(3)),
        lambda: nn.init.orthogonal_(torch.empty(3, 3)),
        lambda: nn.functional.dropout(torch.ones(8)),
        lambda: nn.LSTM(2, 3).weight_ih_l0.detach(),
    ],
)
def test_whatever_draws_inside_draws_from_the_private_generator(draw) -> None:
    state = torch.get_rng_state()

    def drawn(seed: int) -> torch.Tensor:
        with PrivateRandomness(torch.Generator().manual_seed(seed)):
            return draw()

    assert torch.equal(drawn(1), drawn(1))
    assert torch.equal(torch.get_rng_state(), state)
    with (
        pytest.raises(RandomNumbersError, match="draws random numbers"),
        PrivateRandomness(None),
    ):
        draw()


def test_what_cannot_be_given_a_generator_is_refused() -> None:
    state = torch.get_rng_state()
    with (
        pytest.raises(RandomNumbersError, match="native_dropout"),
        PrivateRandomness(torch.Generator()),
    ):
        torch.native_dropout(torch.ones(2), 0.5, True)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dropout_that_is_off_draws_nothing() -> None:
    tokens = noise((1, 2, 3, 4))
    with PrivateRandomness(None):
        nn.functional.dropout(tokens, 0.0)
        nn.functional.dropout(tokens, training=False)
        nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


def test_other_threads_draw_as_ever() -> None:
    drawn = []
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with PrivateRandomness(None):
        thread = threading.Thread(target=lambda: drawn.append(torch.rand(4)))
        thread.start()
        thread.join()
    assert torch.equal(drawn[0], expected)


def test_nothing_of_the_process_is_left_set() -> None:
    # torch.compile skips every function while such a flag is up, in any thread.
    from torch.utils import _python_dispatch as dispatch

    with PrivateRandomness(None):
        assert not dispatch.is_in_torch_dispatch_mode()
    assert not dispatch.is_in_torch_dispatch_mode()
    assert dispatch._get_current_dispatch_mode() is None


def test_a_blueprint_of_ones_own(own) -> None:
    @own("mine", ranks=(2,), channels=4, about="a layer")
    def mine(shape):
        return nn.Linear(shape[-1], shape[-1])

    assert registered()[-1] == "mine"
    assert lookup("mine").about == "a layer"
    state = torch.get_rng_state()
    assert lookup("mine").build((2, 8), seed=1).weight.shape == (8, 8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 3), "'mine' is for 2 dimensions, the activation has shape (2, 8, 3)"),
        ((2, 6), "'mine' is for multiples of 4 channels, the activation of shape (2, 6) has 6"),
    ],
)
def test_a_shape_it_is_not_for(own, shape, message) -> None:
    own("mine", ranks=(2,), channels=4)(lambda shape: nn.Linear(shape[-1], shape[-1]))
    assert lookup("mine").misfit(torch.Size(shape)).endswith(message)
    with pytest.raises(ValueError, match="'mine' is for"):
        lookup("mine").build(shape, seed=1)


def test_a_factory_that_makes_no_module(own) -> None:
    own("mine", ranks=(2,))(lambda shape: 3)
    with pytest.raises(TypeError, match=r"'mine' returned a int: expected a torch\.nn\.Module"):
        lookup("mine").build((2, 2), seed=1)


def test_a_name_is_taken_once(own) -> None:
    def first(shape):
        return nn.Identity()

    own("mine", ranks=(2,))(first)
    own("mine", ranks=(2, 3))(first)  # the same function again, as after a reload
    assert lookup("mine").ranks == {2, 3}
    with pytest.raises(ValueError, match="'mine' is already registered"):
        own("mine", ranks=(2,))(lambda shape: nn.Identity())


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownBlueprintError) as raised:
        lookup("conv9")
    assert str(raised.value).startswith("blueprint 'conv9': expected one of residual_mlp, ")
    assert isinstance(raised.value, KeyError)
