"""Copies of a training, and the way back: every bit, into the very same tensors."""

import copy
import gc

import pytest
import torch
from torch import nn

from esper_otel.tolaria.snapshots import Protected, Snapshot, SnapshotError, root_modules_of

KINDS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, history_size=3),
}


class Training:
    """A small model with buffers, and an optimizer."""

    def __init__(self, kind="adam"):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)
        )
        self.optimizer = KINDS[kind](self.model.parameters())

    def step(self, number):
        def closure():
            self.optimizer.zero_grad()
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)

    def protected(self, whole=True):
        found = Protected()
        found.add_optimizer(self.optimizer)
        if whole:
            found.add_module(self.model, whole=True)
        return found

    def bits(self):
        """Everything that a checkpoint has, copied."""
        both = self.model.state_dict(), self.optimizer.state_dict()["state"]
        return copy.deepcopy(both)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def spoil(training):
    """Weights, buffers and optimizer state become NaN."""
    with torch.no_grad():
        for tensor in (*training.model.parameters(), *training.model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
        for state in training.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    value.fill_(float("nan"))


def snapshot_of(training, step=5):
    made = Snapshot()
    made.copy_from(training.protected().parts(), step)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_back_are_the_very_bits_in_the_very_tensors(kind):
    training = Training(kind)
    for step in range(5):
        training.step(step)
    tensors = [*training.model.parameters(), *training.model.buffers()]
    before, made = training.bits(), snapshot_of(training)
    for step in range(5, 9):
        training.step(step)
    spoil(training)
    made.copy_back(training.protected().parts())
    assert same(training.bits(), before)
    now = [*training.model.parameters(), *training.model.buffers()]
    assert all(one is other for one, other in zip(now, tensors, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_went_back_goes_on_as_the_one_it_was(kind):
    training, twin = Training(kind), Training(kind)
    for each in (training, twin):
        for step in range(4):
            each.step(step)
    made = snapshot_of(training)
    for step in range(40, 47):
        training.step(step)
    made.copy_back(training.protected().parts())
    for each in (training, twin):
        for step in range(4, 8):
            each.step(step)
    assert same(training.bits(), twin.bits())


def test_the_state_of_an_optimizer_keeps_its_tensors():
    training = Training("adam")
    training.step(1)
    first = next(training.model.parameters())
    moments = training.optimizer.state[first]["exp_avg"]
    made = snapshot_of(training)
    training.step(2)
    made.copy_back(training.protected().parts())
    assert training.optimizer.state[first]["exp_avg"] is moments


def test_state_that_came_after_the_copy_is_gone_again():
    training = Training("momentum")
    made = snapshot_of(training)
    training.step(1)
    assert training.optimizer.state
    made.copy_back(training.protected().parts())
    assert not training.optimizer.state


def test_learning_rates_are_the_schedules_own():
    training = Training()
    made = snapshot_of(training)
    training.optimizer.param_groups[0]["lr"] = 0.5
    made.copy_back(training.protected().parts())
    assert training.optimizer.param_groups[0]["lr"] == 0.5


def test_a_copy_goes_into_the_memory_of_the_one_before():
    training = Training()
    training.step(1)
    made = snapshot_of(training)
    places = [held.copy.data_ptr() for held in made._tensors]
    size = made.size
    training.step(2)
    made.copy_from(training.protected().parts(), 6)
    assert [held.copy.data_ptr() for held in made._tensors] == places
    assert (made.step, made.size) == (6, size)


def test_its_size_is_that_of_all_it_holds():
    model = nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    protected = Protected()
    protected.add_optimizer(optimizer)
    made = Snapshot()
    made.copy_from(protected.parts(), 1)
    assert made.size == 2 * 100 * 4


def test_autograd_sees_no_change():
    """The graph of another loss may hold the weights, and is used after they were put back."""
    training = Training()
    made = snapshot_of(training)
    loss = training.model(torch.ones(4, 4)).sum()
    made.copy_back(training.protected().parts())
    loss.backward()
    assert all(p.requires_grad and p.is_leaf for p in training.model.parameters())


def replaced(training):
    training.model[0].weight = nn.Parameter(torch.zeros(8, 4))
    training.optimizer = KINDS["adam"](training.model.parameters())


def resized(training):
    training.model[0].weight.data = torch.zeros(9, 4)


def grown(training):
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def recast(training):
    training.model[1].running_mean = training.model[1].running_mean.double()


@pytest.mark.parametrize("change", [replaced, resized, grown, recast])
def test_what_has_changed_since_is_found_before_anything_is_put_back(change):
    training = Training()
    made = snapshot_of(training)
    change(training)
    before = training.bits()
    with pytest.raises(SnapshotError, match="snapshot"):
        made.copy_back(training.protected().parts())
    assert same(training.bits(), before)


def test_kinds_of_tensors_that_cannot_simply_be_copied_are_refused():
    sparse = torch.eye(3).to_sparse().requires_grad_()
    optimizer = torch.optim.SGD([sparse], lr=0.1)
    protected = Protected()
    protected.add_optimizer(optimizer)
    with pytest.raises(SnapshotError, match="layout"):
        Snapshot().copy_from(protected.parts(), 1)
    meta = torch.optim.SGD([nn.Parameter(torch.zeros(2, device="meta"))], lr=0.1)
    protected = Protected()
    protected.add_optimizer(meta)
    with pytest.raises(SnapshotError, match="on meta"):
        Snapshot().copy_from(protected.parts(), 1)


def test_state_of_any_kind_is_copied_and_put_back():
    training = Training("momentum")
    first = next(training.model.parameters())
    odd = {
        "step": 3,
        "history": [torch.ones(2), (torch.zeros(1), "text")],
        "nested": {"a": torch.full((2,), 5.0), 1: None},
        "set": {1, 2},
    }
    training.optimizer.state[first] = copy.deepcopy(odd)
    training.optimizer.state["of all"] = {"count": 7}
    made = snapshot_of(training)
    state = training.optimizer.state
    state[first]["step"] = 9
    state[first]["history"].append(torch.ones(1))
    state[first]["nested"]["a"].zero_()
    state[first]["set"].add(3)
    state["of all"]["count"] = 8
    state["later"] = {"count": 1}
    for _ in range(2):  # the copy itself is not changed by what follows
        made.copy_back(training.protected().parts())
        assert same(state[first], odd)
        assert state["of all"] == {"count": 7}
        assert "later" not in state
        state[first]["history"][0].zero_()
        state[first]["set"].add(4)


# --- what there is to copy


def test_modules_are_found_by_the_parameters_of_the_optimizer():
    training, other = Training(), Training()
    roots = root_modules_of({id(each) for each in training.model.parameters()})
    assert roots == [training.model]
    others = training.protected(whole=False).parts().others
    assert {id(each) for each in others} == {id(each) for each in training.model.buffers()}
    assert other.model not in roots


def test_of_a_module_that_was_named_all_parameters_are_copied_and_of_one_found_those_trained():
    training = Training()
    training.model[3].requires_grad_(False)
    training.optimizer = torch.optim.SGD(training.model[:3].parameters(), lr=0.1)
    frozen = {id(each) for each in training.model[3].parameters()}
    assert frozen <= {id(each) for each in training.protected().parts().others}
    found = training.protected(whole=False).parts().others
    assert not frozen & {id(each) for each in found}


def test_an_average_of_the_weights_is_copied_when_it_is_named():
    training, average = Training(), Training().model.requires_grad_(False)
    protected = training.protected(whole=False)
    protected.add_module(average, whole=True)
    others = {id(each) for each in protected.parts().others}
    assert {id(each) for each in average.parameters()} <= others
    assert {id(each) for each in training.model.buffers()} <= others, "found all the same"


def test_caches_are_left_alone():
    training = Training()
    training.model.register_buffer("mask", torch.ones(3), persistent=False)
    others = training.protected().parts().others
    assert not any(each is training.model.mask for each in others)


def test_nothing_is_kept_alive():
    training = Training()
    protected, made = training.protected(), snapshot_of(training)
    del training
    gc.collect()
    assert protected.parts() == ([], [], [], False)
    assert made.misfit(protected.parts())


def test_an_optimizer_whose_parameters_are_in_no_module_has_no_buffers():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    protected = Protected()
    protected.add_optimizer(optimizer)
    parts = protected.parts()
    assert [each is weight for each in parts.weights] == [True]
    assert (parts.others, parts.found_modules) == ([], False)
