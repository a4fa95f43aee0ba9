"""Code of the script that our hooks meet, and must not run, disturb or break."""

import math
import types
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from esper_otel import loop as loops  # noqa: E402
from esper_otel import process  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.integrations.training import watch_deepspeed  # noqa: E402
from testkit.ledger import Ledger, norm_of, train  # noqa: E402
from testkit.loops import unaccounted  # noqa: E402
from testkit.public_trainers import by_torch_func  # noqa: E402


@pytest.fixture
def instrumented(captured, monkeypatch, caplog):
    monkeypatch.setattr(loops, "_told", set())
    TorchInstrumentor().instrument(skip_dep_check=True)
    yield captured
    TorchInstrumentor().uninstrument()
    assert "could not be" not in caplog.text


class Hashed(Dataset):
    """Whose hash and comparison read all of it."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return torch.full((4,), i / 24), torch.full((1,), i / 6)

    def __hash__(self):
        raise AssertionError("hashed")

    def __eq__(self, other):
        raise AssertionError("compared")


class Decoded:
    """A batch that draws its values when it is unpacked, with random numbers."""

    unpacked = 0

    def __iter__(self):
        Decoded.unpacked += 1
        return iter((torch.rand(8, 4), torch.rand(8, 1)))

    def __getattr__(self, name):
        raise RuntimeError(f"looked at: {name}")


def test_data_sets_and_batches_are_not_looked_at(instrumented):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(Ledger(), model, optimizer, batches=DataLoader(Hashed(), batch_size=8))
    batches = DataLoader(Hashed(), batch_size=8, collate_fn=lambda _: Decoded())
    train(Ledger(), model, optimizer, batches=batches)
    assert Decoded.unpacked == 3
    assert all("input_wait_ms" in frame for frame in instrumented.frames)
    assert ["samples_per_s" in frame for frame in instrumented.frames] == [True] * 3 + [
        False
    ] * 3


@dataclass
class Compared(torch.optim.SGD):
    """An optimizer that cannot be hashed."""

    rate: float
    parameters: list

    def __post_init__(self):
        super().__init__(self.parameters, lr=self.rate)


def test_optimizers_are_known_by_their_identity(instrumented):
    model = nn.Linear(4, 1)
    optimizer = Compared(0.01, list(model.parameters()))
    with pytest.raises(TypeError, match="unhashable"):
        hash(optimizer)
    other = Compared(0.01, [nn.Parameter(torch.ones(1))])
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        other.step()
    assert [frame["optimizer_lr"] for frame in instrumented.frames] == [0.01] * 3


class Raises:
    def __getattr__(self, name):
        raise RuntimeError(f"asked for {name}")


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "betas": None},
        {"lr": 0.1, "betas": ()},
        {"lr": 0.1, "betas": (Raises(),)},
        {"lr": torch.tensor([0.1, 0.2]), "momentum": 0.9},
        {"lr": Raises(), "momentum": Raises(), "initial_lr": Raises()},
        {"lr": "fast", "momentum": "slow"},
        {"lr": torch.empty((), device="meta")},
        {},
    ],
    ids=lambda options: " ".join(
        f"{key}={type(each).__name__}" for key, each in options.items()
    ),
)
def test_what_is_odd_in_a_group_takes_nothing_else_along(instrumented, options):
    class Odd(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, dict(options))

        def step(self, closure=None):
            pass

    model = nn.Linear(4, 1)
    optimizer = Odd(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    known = {"loss", "gradient_norm", "backward_ms", "lr_scale"}
    assert [known <= frame.keys() for frame in instrumented.frames] == [True, True]
    assert ["optimizer_lr" in frame for frame in instrumented.frames] == [
        options.get("lr") == 0.1 if isinstance(options.get("lr"), float) else False
    ] * 2


@pytest.mark.skipif(
    not hasattr(nn.utils, "get_total_norm"), reason="before 2.6 PyTorch cannot compile this"
)
def test_what_torch_compiles_as_one_graph_may_clip_in_any_way(instrumented):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def clip():
        parameters = list(model.parameters())
        nn.utils.clip_grad_value_(parameters, 0.5)
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, 1e-3, norm)
        return norm

    compiled = torch.compile(clip, backend="eager", fullgraph=True)
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        norms.append(norm_of(model.parameters()))
        compiled()
        assert norm_of(model.parameters()) == pytest.approx(1e-3, rel=1e-2)
        optimizer.step()
    # What a graph does to gradients nobody can tell; they were measured before.
    assert [frame["gradient_norm"] for frame in instrumented.frames] == pytest.approx(norms)
    torch.compiler.reset()


def test_time_without_backward_is_forward_and_not_ours(instrumented):
    by_torch_func(Ledger())
    for frame in instrumented.frames[1:]:
        assert abs(unaccounted(frame)) <= max(0.05 * frame["step_latency_ms"], 0.02)
        assert frame["forward_ms"] > 0.0
        assert not frame.keys() & {"loss", "backward_ms"}


def test_gradients_that_are_only_multiplied_are_measured_after_that(instrumented):
    """Once that is known: by three steps, in which what ``backward`` left counts."""
    torch.manual_seed(1)  # of weights that are fitted at once, gradients are rounding errors
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for i in range(6):
        optimizer.zero_grad()
        F.mse_loss(model(torch.ones(4, 4)), torch.full((4, 1), 9.0), reduction="sum").backward()
        for p in model.parameters():
            p.grad /= 4
        norms.append(norm_of(model.parameters()) * (4 if i < 3 else 1))
        optimizer.step()
    assert [frame["gradient_norm"] for frame in instrumented.frames] == pytest.approx(norms)


@pytest.mark.parametrize("from_step", [0, 5])
def test_gradients_of_which_the_script_makes_others_are_measured_as_the_update_gets_them(
    instrumented, from_step
):
    """As a projection of the gradients of several tasks: no norm behind ``backward`` is it."""
    torch.manual_seed(1)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tasks = [lambda out: out[:, 0].square().mean(), lambda out: out[:, 1].sub(9.0).abs().mean()]
    norms = []
    for i in range(9):
        made = [torch.zeros_like(p) for p in model.parameters()]
        for task in tasks if i >= from_step else tasks[:1]:
            optimizer.zero_grad()
            task(model(torch.ones(4, 4))).backward()
            for total, p in zip(made, model.parameters(), strict=True):
                total += p.grad * (3 if i % 2 else 2)
        if i >= from_step:
            for total, p in zip(made, model.parameters(), strict=True):
                p.grad = total
        norms.append(norm_of(model.parameters()))
        optimizer.step()
    assert [frame["gradient_norm"] for frame in instrumented.frames] == pytest.approx(norms)


def test_what_a_script_takes_out_of_its_gradients_is_no_trouble(instrumented):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        model.bias.grad.fill_(math.nan)
        nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        torch.nan_to_num_(model.bias.grad)
        torch.nan_to_num_(model.weight.grad)
        optimizer.step()
    assert len(instrumented.frames) == 2


def test_what_was_assumed_of_several_calls_is_said_once(instrumented, caplog):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(14):
        for _ in range(2):
            (model(torch.ones(2, 4)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    said = [r.getMessage() for r in caplog.records if "several times a step" in r.getMessage()]
    assert said == [
        "esper-otel: backward is called several times a step; the loss recorded is the sum, as "
        "each is divided by their number"
    ]
    expected = model(torch.ones(2, 4)).square().mean().item()
    assert [f["loss"] for f in instrumented.frames] == pytest.approx([expected] * 14)


def test_deepspeeds_engines_tell_their_norm_from_before_clipping(captured):
    """By the function of its module, and by the optimizer that wraps another."""

    def clip_grad_norm_(parameters, max_norm, norm_type=2, mpu=None):
        norm = torch.tensor(norm_of(parameters))
        for p in parameters:
            p.grad.data.mul_(max_norm / norm)
        return norm

    model = nn.Linear(4, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)

    class Engine:
        def backward(self, loss):
            loss.backward()

        def step(self):
            if self.optimizer is inner:
                module.clip_grad_norm_(
                    parameters=list(model.parameters()), max_norm=0.1, mpu=None
                )
            self.optimizer.step()

    class Zero:
        def step(self):
            self._global_grad_norm = norm_of(model.parameters())
            for p in model.parameters():
                p.grad = p.grad * 0.01
            inner.step()

    module = types.ModuleType("deepspeed.runtime.engine")
    module.clip_grad_norm_, module.DeepSpeedEngine = clip_grad_norm_, Engine
    Zero._global_grad_norm = 0.0
    norms = []
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        watch_deepspeed(TorchInstrumentor._watch, module)
        engine = Engine()
        for engine.optimizer in (inner, inner, Zero(), Zero()):
            inner.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            norms.append(norm_of(model.parameters()))
            engine.step()
    finally:
        TorchInstrumentor().uninstrument()
        process.end_automatic()
    assert module.clip_grad_norm_ is clip_grad_norm_
    assert [frame["gradient_norm"] for frame in captured.frames] == pytest.approx(norms)


def test_deepspeeds_losses_are_those_that_its_engines_are_given(captured):
    """Whatever it divides them by, and multiplies them with, before tensors see them."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Engine:
        def backward(self, loss, retain_graph=False, scale_wrt_gas=True):
            shares = loss / 3 if scale_wrt_gas else loss
            (shares * 1024.0).backward(retain_graph=retain_graph)
            return shares

        def step(self):
            for p in model.parameters():
                p.grad /= 1024.0
            optimizer.step()
            optimizer.zero_grad()

    module = types.ModuleType("deepspeed.runtime.engine")
    module.DeepSpeedEngine = Engine
    expected = []
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        watch_deepspeed(TorchInstrumentor._watch, module)
        engine = Engine()
        for step in range(4):
            batches = [torch.full((2, 4), each) for each in (1.0, 2.0, float(step))]
            losses = [model(batch).square().mean() for batch in batches]
            expected.append(sum(loss.item() for loss in losses) / 3)
            shares = [engine.backward(losses[0]), engine.backward(loss=losses[1])]
            shares.append(engine.backward(losses[2], retain_graph=False))
            assert sum(shares).item() == pytest.approx(expected[-1])
            engine.step()
    finally:
        TorchInstrumentor().uninstrument()
        process.end_automatic()
    assert [frame["loss"] for frame in captured.frames] == pytest.approx(expected)


def test_gradients_that_grow_behind_backward_are_told_as_the_update_gets_them(instrumented):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    norms = []
    for step in range(12):
        optimizer.zero_grad()
        model(torch.ones(8, 4)).square().mean().backward()
        for parameter in model.parameters():
            if step == 8:
                parameter.grad.mul_(1e4)  # what a faulty device or reduction does
            elif step > 8:
                parameter.grad.mul_(0.5)  # clipped by hand
        before = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        norms.append(before * 2 if step > 8 else before)
        optimizer.step()
    told = [frame["gradient_norm"] for frame in instrumented.frames]
    assert told == pytest.approx(norms, rel=1e-4)
