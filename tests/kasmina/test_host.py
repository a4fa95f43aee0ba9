import logging

import pytest
import torch
from kasmina.driven import Driven
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR

from esper_otel.integrations.torch import TorchInstrumentor
from esper_otel.kasmina.host import DEFAULT_RATE, adamw, join, learning_rate_of, leave
from esper_otel.leyline.stages import Stage
from esper_otel.process import start

SCHEDULERS = {
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "MultiStepLR": lambda o: MultiStepLR(o, [1, 2]),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 10),
}


def pair(kind=SGD, **options):
    host, seed = nn.Linear(3, 3), nn.Linear(3, 3)
    return host, seed, kind(host.parameters(), **options), adamw(list(seed.parameters()), 0.1)


def stepped(optimizer, *modules):
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (None, DEFAULT_RATE),
        (lambda p: SGD(p, lr=0.3), 0.3),
        (lambda p: Adam([{"params": p, "lr": 0.2}], lr=0.1), 0.2),
        (lambda p: Adam(p, lr=torch.tensor(0.25), capturable=False, foreach=False), 0.25),
    ],
)
def test_a_seed_learns_at_the_rate_of_the_host_s_first_group(optimizer, rate):
    host = None if optimizer is None else optimizer(list(nn.Linear(2, 2).parameters()))
    assert learning_rate_of(host) == rate
    assert isinstance(adamw(list(nn.Linear(2, 2).parameters()), rate), AdamW)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_a_fossil_joins_as_a_group_with_the_settings_of_the_first(kind):
    host, seed, optimizer, own = pair(kind, lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.05
    stepped(optimizer, host)
    join(optimizer, own)
    first, second = optimizer.param_groups
    assert second["params"] == list(seed.parameters())
    assert {k: v for k, v in second.items() if k != "params"} == {
        k: v for k, v in first.items() if k != "params"
    }
    before = seed.weight.detach().clone()
    stepped(optimizer, host, seed)
    assert not torch.equal(seed.weight, before)
    join(optimizer, own)  # once more adds nothing twice
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_as_if_nothing_had_joined(name):
    host, seed, optimizer, own = pair(SGD, lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    alone_host, _, alone, _ = pair(SGD, lr=0.1)
    beside = SCHEDULERS[name](alone)
    for step in range(6):
        if step == 2:
            join(optimizer, own)
        stepped(optimizer, host, seed)
        stepped(alone, alone_host)
        scheduler.step()
        beside.step()
        assert {group["lr"] for group in optimizer.param_groups} == set(beside.get_last_lr())
    assert all(
        parameter in optimizer.state or parameter.grad is not None
        for parameter in seed.parameters()
    )


@pytest.mark.parametrize("scheduled", [True, False])
def test_what_joined_can_leave_again(scheduled):
    host, seed, optimizer, own = pair(Adam, lr=0.1)
    if scheduled:
        LambdaLR(optimizer, lambda step: 1.0)
    stepped(optimizer, host)
    before = [list(group["params"]) for group in optimizer.param_groups]
    join(optimizer, own)
    stepped(optimizer, host, seed)
    leave(optimizer, list(seed.parameters()))
    assert [list(group["params"]) for group in optimizer.param_groups] == before
    assert set(optimizer.state) == set(host.parameters())


@pytest.mark.parametrize(("fossils", "groups"), [("join", 2), ("stay", 1)])
def test_a_fossil_goes_on_learning_whoever_trains_it(fossils, groups):
    driven = Driven(slots=["1"], settings={"fossils": fossils})
    host_optimizer = driven.optimizer
    driven.until(lambda: driven.garden.slots["1"] is Stage.FOSSILIZED)
    assert driven.optimizer is host_optimizer
    assert len(host_optimizer.param_groups) == groups
    parameters = list(driven.garden.slot("1").hook.parameters())
    before = [each.detach().clone() for each in parameters]
    driven.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(each.grad is None for each in parameters)


def test_gradients_accumulate_over_micro_batches_as_the_host_s_do():
    norms = []
    for parts in (1, 3):
        driven = Driven(slots=["1"], settings={"training_steps": 1})
        driven.step()
        driven.garden.germinate("1", "residual_mlp", "s")
        driven.until(lambda driven=driven: driven.garden.stages.get("s") is Stage.TRAINING)
        x, y = driven.batch()
        for _ in range(parts):
            (nn.functional.mse_loss(driven.host(x), y) / parts).backward()
        driven.garden.learn(driven.optimizer)
        norms.append(driven.garden.slot("1").seed.norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert norms[0] > 0.0


@pytest.fixture
def quiet_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "none")
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    monkeypatch.setenv("ESPER_MODE", "off")
    logging.getLogger("esper_otel").setLevel(logging.ERROR)
    yield
    logging.getLogger("esper_otel").setLevel(logging.NOTSET)


def test_a_seed_s_optimizer_never_counts_as_the_run_s(quiet_environment):
    instrumentor = TorchInstrumentor()
    instrumentor.instrument(skip_dep_check=True)
    try:
        driven = Driven(garden=False)
        run = start()
        garden = run.plant(
            driven.host, ["1"], growth="autonomous", training_steps=3, kernel_budget_ms=5000
        )
        driven.train()
        garden.germinate("1", "residual_mlp", "s")
        for _ in range(5000):
            driven.train()
            if garden.stages["s"] >= Stage.BLENDING:
                break
        assert garden.stages["s"] >= Stage.BLENDING
        assert run._recorder.step == driven.steps
        assert garden.is_seed_optimizer(garden.slot("1").seed.optimizer)
        assert not garden.is_seed_optimizer(driven.optimizer)
        # A second model's training is a run of its own, and the seeds' do not get in its way.
        other = Driven(garden=False)
        seen = run._recorder.step
        for _ in range(30):
            other.train()
        assert run._recorder.step == seen
        assert len(run._jobs.totals) == 1
        garden.uproot()
    finally:
        instrumentor.uninstrument()
