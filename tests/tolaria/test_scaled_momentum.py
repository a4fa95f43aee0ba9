"""The momentum of one update is scaled, and put back as it was."""

import numpy as np
import pytest
import torch
from tolaria.probed import change, sgd

from esper_otel.tolaria.updates import AS_IT_IS, UpdateOrder, Updates

pytestmark = pytest.mark.usefixtures("closing_updates")

MOMENTUM = UpdateOrder(momentum_scale=0.5)


@pytest.mark.parametrize(
    ("name", "own", "ours"),
    [
        ("momentum", 0.9, 0.45),
        ("momentum", np.float32(0.5), 0.25),
        ("momentum", torch.tensor(0.5), 0.25),
        ("betas", (0.9, 0.999), (0.45, 0.999)),
        ("betas", [0.9, 0.999, 0.5], [0.45, 0.999, 0.5]),
        ("betas", (torch.tensor(0.5), 0.999), (0.25, 0.999)),
    ],
)
def test_momentum_is_exchanged_and_put_back_as_the_very_object(name, own, ours):
    optimizer, subject = sgd(0.1), Updates()
    (group,) = optimizer.param_groups
    group["momentum"] = None
    group[name] = own
    assert not change(subject, optimizer, 1.0, MOMENTUM), "no rate was scaled"
    assert group[name] == ours
    assert type(group[name]) is type(own)
    subject.put_back(optimizer)
    assert group[name] is own


@pytest.mark.parametrize(
    "own", [None, "fast", (), ("a", 0.9), torch.ones(2), torch.tensor(0.9, device="meta")]
)
def test_a_momentum_that_the_host_cannot_read_is_left_alone(own):
    optimizer, subject = sgd(0.1), Updates()
    (group,) = optimizer.param_groups
    group.update(momentum=None, betas=own)
    change(subject, optimizer, 1.0, MOMENTUM)
    assert group["betas"] is own
    subject.put_back(optimizer)
    assert group["betas"] is own


def test_a_momentum_that_the_step_itself_sets_stays():
    optimizer, subject = sgd(0.1, momentum=0.9), Updates()
    change(subject, optimizer, 1.0, MOMENTUM)
    optimizer.param_groups[0]["momentum"] = 0.7
    subject.put_back(optimizer)
    assert optimizer.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize(
    ("kind", "name", "usual", "leapt"),
    [
        (torch.optim.SGD, "momentum", 0.9, 0.999),
        (torch.optim.Adam, "betas", (0.9, 0.999), (0.999, 0.999)),
        (torch.optim.AdamW, "betas", (0.9, 0.999), (0.9999, 0.999)),
        (torch.optim.RMSprop, "momentum", 0.9, 0.999),
    ],
)
@pytest.mark.parametrize("closure", [False, True])
def test_an_update_with_its_momentum_scaled_is_that_of_the_usual_momentum(
    kind, name, usual, leapt, closure
):
    def trained(value, order):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer, subject = kind([parameter], lr=0.05, **{name: usual}), Updates()
        for step in range(6):

            def loss(step=step):
                assert optimizer.param_groups[0][name] == (value if step >= 3 else usual)
                parameter.grad = torch.cos(parameter.detach() * step)

            if step == 3:
                optimizer.param_groups[0][name] = value
            if not closure:
                loss()
            subject.prepare(optimizer, 1.0, order if step >= 3 else AS_IT_IS)
            optimizer.step(*([loss] if closure else []))
        return parameter.detach()

    first = leapt[0] if name == "betas" else leapt
    scaled = trained(leapt, UpdateOrder(momentum_scale=0.9 / first))
    torch.testing.assert_close(scaled, trained(usual, AS_IT_IS))
    assert not torch.allclose(scaled, trained(leapt, AS_IT_IS))
