"""Varied workloads: each trains in all of its variants, and its data can go wrong."""

from itertools import islice
from math import isfinite, isnan

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import torch

from bench.scenarios.registry import VARIED, workload_of
from bench.scenarios.suite import EXTENTS, Scenario
from bench.scenarios.varied import VARIANTS, variant_of
from bench.scenarios.workloads import WORKLOADS, epochs

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def made(name, variant):
    work = VARIED[name](variant)
    return work, epochs(work, work.batch_size)


@pytest.mark.parametrize("variant", range(VARIANTS))
@pytest.mark.parametrize("name", VARIED)
def test_a_workload_trains(name, variant):
    work, batches = made(name, variant)
    before = [each.detach().clone() for each in work.model.parameters()]
    for batch in islice(batches, 12):
        work.optimizer.zero_grad()
        loss = work.loss(batch)
        loss.backward()
        work.optimizer.step()
        assert isfinite(loss.item())
    after = list(work.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert isfinite(work.evaluate())


@pytest.mark.parametrize("variant", range(VARIANTS))
@pytest.mark.parametrize("name", VARIED)
def test_a_poisoned_batch_has_no_finite_loss_and_a_corrupted_one_has(name, variant):
    work, batches = made(name, variant)
    batch = next(batches)
    corrupted = work.corrupted(batch)
    assert corrupted[0].shape == batch[0].shape
    assert not torch.equal(corrupted[0], batch[0])
    assert isfinite(work.loss(corrupted).item())
    assert isnan(work.loss(work.poisoned(batch)).item())


def test_a_game_is_played_on_with_weights_that_are_lost():
    for name in ("policy", "dqn"):
        work, batches = made(name, 0)
        next(batches)
        with torch.no_grad():
            for parameter in work.model.parameters():
                parameter.fill_(float("nan"))
        assert len(list(islice(batches, 3))) == 3


def test_both_halves_have_all_variants():
    for name in VARIED:
        extent = EXTENTS[name]
        for half in (0, 1):
            found = {
                variant_of(Scenario(name, kind, seed))
                for kind in extent.healthy_kinds
                for seed in range(half, extent.healthy_seeds, 2)
            }
            assert found == set(range(VARIANTS)), name


def test_every_workload_of_the_suite_can_be_made():
    assert {*WORKLOADS, *VARIED} == set(EXTENTS)
    assert type(workload_of(Scenario("digits", "plain", 0))).__name__ == "Digits"
