"""Optimizers with odd groups lose nothing but their own metric."""

import pytest
from tolaria.guarded import INSIDE, OUTSIDE, guarded
from tolaria.loops import Optimizer, one_step
from tolaria.sidecars import decided

ODD = {
    "betas is None": ({"lr": 0.1, "betas": None}, {"optimizer_lr": 0.1}),
    "betas is empty": ({"lr": 0.1, "betas": ()}, {"optimizer_lr": 0.1}),
    "betas holds none": ({"lr": 0.1, "betas": (None, 0.9)}, {"optimizer_lr": 0.1}),
    "momentum is text": ({"lr": 0.1, "momentum": "fast"}, {"optimizer_lr": 0.1}),
    "lr is None": ({"lr": None, "momentum": 0.9}, {"optimizer_momentum": 0.9}),
    "lr is text": ({"lr": "fast", "momentum": 0.9}, {"optimizer_momentum": 0.9}),
    "no lr": ({"momentum": 0.9}, {"optimizer_momentum": 0.9}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("enforce", [True, False])
@pytest.mark.parametrize(("group", "told"), ODD.values(), ids=ODD)
def test_an_odd_group_loses_nothing_but_its_own_metric(clock, caplog, group, told, enforce):
    recorder, frames, sidecar = guarded(clock, decided(2, skip_step=1.0), enforce=enforce)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder.optimizer = Optimizer(group)
    for loss in (INSIDE, OUTSIDE, INSIDE):
        one_step(recorder, clock, loss=loss)
    assert not caplog.records
    assert len(sidecar.asked) == 3
    assert len(sidecar.checked) == enforce
    first, second, third = frames.rows
    for key in ("optimizer_lr", "optimizer_momentum"):
        assert first.get(key) == told.get(key)
    assert (first["loss"], second["loss"], third["loss"]) == (INSIDE, OUTSIDE, INSIDE)
    assert first["nonfinite"] == 0.0


def test_a_vector_of_rates_loses_nothing_but_its_own_metric(clock, caplog):
    torch = pytest.importorskip("torch")
    recorder, frames, sidecar = guarded(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    rates = torch.tensor([0.1, 0.2])
    recorder.optimizer = Optimizer({"lr": rates, "momentum": 0.9})
    used = []
    for _ in range(3):
        recorder.backward_ends(INSIDE)
        recorder.optimizer_begins(clock(), 2.0, recorder.optimizer)
        used.append(recorder.optimizer.param_groups[0]["lr"].tolist())
        recorder.optimizer_ends(recorder.optimizer)
        recorder.end_step()
    assert not caplog.records
    assert used[0] == rates.tolist()
    assert used[1] == used[2] == (rates / 2).tolist(), "and it is scaled as any other"
    assert "optimizer_lr" not in frames.rows[0]
    assert frames.column("optimizer_momentum") == [0.9] * 3
