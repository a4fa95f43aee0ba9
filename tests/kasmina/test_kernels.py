"""Fetching: off the training thread, within a budget, and never more than a sentence."""

from __future__ import annotations

import os
import threading
import time
from math import nan

import pytest
import torch
from torch import nn

from esper_otel.kasmina import kernels
from esper_otel.kasmina.blueprints import Blueprint, lookup, registered
from esper_otel.kasmina.kernels import Activation, Fetch, KernelFetcher, misfit
from testkit.patience import PATIENCE_S

pytestmark = pytest.mark.torch

SHAPE = torch.Size((4, 6))
PLENTY_MS = 20_000.0


class Made(nn.Module):
    """A seed that does what a test says."""

    def __init__(self, does) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.does = does

    def forward(self, given):
        return self.does(given, self.weight)


def plan(does, *, factory=None) -> Blueprint:
    return Blueprint("made", factory or (lambda shape: Made(does)), frozenset({2}))


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.001)


@pytest.fixture
def fetcher():
    fetcher = KernelFetcher(PLENTY_MS)
    yield fetcher
    fetcher.stop()


def fetched(fetcher: KernelFetcher, blueprint: Blueprint, shape=SHAPE) -> Fetch:
    fetch = fetcher.request(blueprint, Activation(torch.Size(shape)), seed=7)
    until(fetch.done)
    return fetch


# --- what comes


@pytest.mark.parametrize("name", registered())
def test_every_blueprint_comes_as_it_would_be_built_here(fetcher, name) -> None:
    blueprint = lookup(name)
    shape = {2: (4, 8), 3: (4, 5, 8), 4: (4, 8, 6, 6)}[max(blueprint.ranks)]
    state = torch.get_rng_state()
    fetch = fetched(fetcher, blueprint, shape)
    assert fetch.reason == ""
    assert fetch.latency_ms > 0.0
    assert fetch.module.training
    assert torch.equal(torch.get_rng_state(), state)
    here = blueprint.build(shape, seed=7).state_dict()
    assert all(torch.equal(here[k], v) for k, v in fetch.module.state_dict().items())
    assert all(parameter.grad is None for parameter in fetch.module.parameters())


def test_it_has_the_dtype_of_the_slot(fetcher) -> None:
    activation = Activation(SHAPE, torch.bfloat16)
    fetch = fetcher.request(lookup("residual_mlp"), activation, seed=1)
    until(fetch.done)
    assert {parameter.dtype for parameter in fetch.module.parameters()} == {torch.bfloat16}


def test_trying_it_leaves_its_buffers_alone(fetcher) -> None:
    def factory(shape):
        return nn.BatchNorm1d(shape[-1])

    fetch = fetched(fetcher, plan(None, factory=factory))
    assert torch.equal(fetch.module.running_mean, torch.zeros(6))
    assert fetch.module.num_batches_tracked == 0


def test_the_work_is_done_on_a_thread_of_its_own(fetcher) -> None:
    threads = []

    def factory(shape):
        threads.append(threading.current_thread())
        return nn.Linear(6, 6)

    fetched(fetcher, plan(None, factory=factory))
    fetched(fetcher, plan(None, factory=factory))
    first, second = threads
    assert first is second
    assert first.daemon
    assert first is not threading.current_thread()


# --- what does not


def raises(*_):
    raise RuntimeError("broken weights")


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (raises, "raised RuntimeError: broken weights"),
        (lambda x, w: (x * w)[:, :3], "returned shape (2, 3): expected (2, 6)"),
        (lambda x, w: (x * w).double(), "returned torch.float64: expected torch.float32"),
        (lambda x, w: (x * w,), "returned a tuple: expected a tensor"),
        (lambda x, w: x * w * nan, "returned a value that is not finite"),
        (lambda x, w: (x * w) / 0, "returned a value that is not finite"),
        (lambda x, w: x.clone(), "its output has no gradient"),
        (lambda x, w: x.mul_(2) * w, "it changes its input"),
    ],
)
def test_a_kernel_that_cannot_be_a_seed_says_why(fetcher, does, reason) -> None:
    fetch = fetched(fetcher, plan(does))
    assert fetch.module is None
    assert fetch.reason == reason


def test_a_kernel_that_draws_random_numbers_is_refused(fetcher) -> None:
    state = torch.get_rng_state()
    for draw in (nn.functional.dropout, torch.rand_like):
        fetch = fetched(fetcher, plan(lambda x, w, draw=draw: x * w * draw(x)))
        assert "draws random numbers" in fetch.reason
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (raises, "raised RuntimeError: broken weights"),
        (lambda shape: 3, "raised TypeError: blueprint 'made' returned a int"),
        (lambda shape: nn.Identity(), "it has no parameter to train"),
    ],
)
def test_a_factory_that_fails_says_why(fetcher, factory, reason) -> None:
    fetch = fetched(fetcher, plan(None, factory=factory))
    assert fetch.module is None
    assert fetch.reason.startswith(reason)


def test_a_backward_that_fails_is_found_before_it_is_the_users(fetcher) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            return given.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no derivative")

    fetch = fetched(fetcher, plan(lambda x, w: Broken.apply(x * w)))
    assert fetch.reason == "raised RuntimeError: no derivative"


def test_a_shape_it_is_not_for_says_so(fetcher) -> None:
    fetch = fetched(fetcher, plan(None), (2, 3, 4))
    assert "'made' is for 2 dimensions" in fetch.reason


# --- the budget


class Hanging:
    """A factory that waits until the test lets it go on."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.done = threading.Event()

    def __call__(self, shape):
        self.began.set()
        self.go_on.wait(20)
        self.done.set()
        return nn.Linear(6, 6)


@pytest.fixture
def hanging():
    factories = []

    def make() -> Hanging:
        factories.append(Hanging())
        return factories[-1]

    yield make
    for factory in factories:
        factory.go_on.set()


def test_what_is_too_slow_is_abandoned_and_its_result_ignored(hanging) -> None:
    now = [0]
    fetcher = KernelFetcher(10.0, clock=lambda: now[0])
    factory = hanging()
    fetch = fetcher.request(plan(None, factory=factory), Activation(SHAPE), 1)
    assert not fetch.done()
    now[0] = 10_000_000
    assert not fetch.done()
    now[0] = 10_000_001
    assert fetch.done()
    assert fetch.reason == "took longer than 10 ms"
    assert fetch.latency_ms > 10.0
    factory.go_on.set()
    until(factory.done.is_set)
    fetcher.stop(timeout_s=5)
    assert fetch.module is None
    assert fetch.reason == "took longer than 10 ms"


def test_what_came_too_late_is_refused_though_nobody_looked(hanging) -> None:
    now = [0]
    fetcher = KernelFetcher(10.0, clock=lambda: now[0])
    factory = hanging()
    fetch = fetcher.request(plan(None, factory=factory), Activation(SHAPE), 1)
    until(factory.began.is_set)
    now[0] = 11_000_000
    factory.go_on.set()
    fetcher.stop(timeout_s=5)
    assert fetch.done()
    assert fetch.module is None
    assert fetch.reason in {"took longer than 10 ms", "the fetcher was stopped"}


def test_one_that_hangs_does_not_keep_the_next_waiting(fetcher, hanging) -> None:
    slow = fetcher.request(plan(None, factory=hanging()), Activation(SHAPE), 1)
    assert fetched(fetcher, lookup("low_rank")).module is not None
    assert not slow.done()


def test_there_is_a_limit_to_how_many_may_hang(fetcher, hanging) -> None:
    factories = [hanging() for _ in range(kernels.MOST_WORKERS)]
    for factory in factories:
        fetcher.request(plan(None, factory=factory), Activation(SHAPE), 1)
    refused = fetcher.request(lookup("low_rank"), Activation(SHAPE), 1)
    assert refused.done()
    assert refused.reason == f"{kernels.MOST_WORKERS} others still run"
    factories[0].go_on.set()
    until(lambda: any(not worker.busy for worker in fetcher._workers))
    assert fetched(fetcher, lookup("low_rank")).module is not None


@pytest.mark.parametrize("budget", [0, -1.0, nan])
def test_a_budget_must_be_one(budget) -> None:
    with pytest.raises(ValueError, match="budget_ms="):
        KernelFetcher(budget)


# --- the end


def test_stopping_gives_up_what_is_under_way_without_waiting_for_it(fetcher, hanging) -> None:
    factory = hanging()
    fetch = fetcher.request(plan(None, factory=factory), Activation(SHAPE), 1)
    until(factory.began.is_set)
    began = time.monotonic()
    fetcher.stop(timeout_s=0.05)
    assert time.monotonic() - began < 5.0
    assert fetch.done()
    assert fetch.reason == "the fetcher was stopped"
    after = fetcher.request(lookup("low_rank"), Activation(SHAPE), 1)
    assert after.reason == "the fetcher was stopped"
    fetcher.stop()


def test_stopping_ends_the_threads() -> None:
    fetcher = KernelFetcher(PLENTY_MS)
    (thread,) = (worker.thread for worker in fetcher._workers)
    fetcher.stop(timeout_s=10)
    assert not thread.is_alive()


def test_in_a_forked_child_a_fetch_runs_out_of_its_budget() -> None:
    fetcher = KernelFetcher(50.0)
    child = os.fork()
    if child == 0:
        fetch = fetcher.request(lookup("low_rank"), Activation(SHAPE), 1)
        end = time.monotonic() + PATIENCE_S
        while not fetch.done() and time.monotonic() < end:
            time.sleep(0.001)
        os._exit(0 if fetch.reason == "took longer than 50 ms" else 1)
    _, status = os.waitpid(child, 0)
    fetcher.stop()
    assert os.waitstatus_to_exitcode(status) == 0


# --- compiling


def test_a_seed_is_compiled_beside_the_training_thread(hanging) -> None:
    wait = hanging()
    given = []

    def compiler(module, example):
        wait(None)
        given.append(tuple(example.shape))
        return lambda x: module(x) + 1

    fetcher = KernelFetcher(PLENTY_MS, compiler=compiler)
    module = nn.Linear(6, 6)
    compilation = fetcher.compile(module, Activation(SHAPE))
    assert not compilation.done()
    assert fetched(fetcher, lookup("low_rank")).module is not None
    wait.go_on.set()
    until(compilation.done)
    x = torch.ones(1, 6)
    assert torch.equal(compilation.call(x), module(x) + 1)
    assert given == [(4, 6)]
    fetcher.stop()


def test_a_compiler_that_fails_says_why() -> None:
    fetcher = KernelFetcher(PLENTY_MS, compiler=raises)
    compilation = fetcher.compile(nn.Linear(6, 6), Activation(SHAPE))
    until(compilation.done)
    assert compilation.call is None
    assert compilation.reason == "raised RuntimeError: broken weights"
    fetcher.stop()


def test_without_a_compiler_a_seed_is_called_as_it_is(fetcher) -> None:
    compilation = fetcher.compile(nn.Linear(6, 6), Activation(SHAPE))
    assert compilation.done()
    assert compilation.call is None


# --- what fits


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (torch.zeros(2, 3), ""),
        (None, "returned a NoneType: expected a tensor"),
        (torch.zeros(3, 2), "returned shape (3, 2): expected (2, 3)"),
        (torch.zeros(2, 3, device="meta"), "returned a tensor on meta: expected cpu"),
        (torch.zeros(2, 3).half(), "returned torch.float16: expected torch.float32"),
    ],
)
def test_what_can_take_the_place_of_an_activation(made, reason) -> None:
    assert misfit(made, torch.zeros(2, 3)) == reason
