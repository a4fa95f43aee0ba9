"""What an enforced decision does to the learning rate, in loops as people write them.

A decision about step 20 scales the rate by a quarter. Every update from step 21 on must use
exactly the script's own rate times that, and the script must not be able to tell: all that it
sees of its rates is bit-identical to the same loop without us.
"""

import contextlib
import warnings

import pytest

torch = pytest.importorskip("torch")

from msgspec import structs  # noqa: E402
from torch import nn  # noqa: E402

from esper_otel import loop  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.leyline import wire  # noqa: E402
from integrations.rate_loops import (  # noqa: E402
    LOOPS,
    STEPS,
    Rates,
    backward,
    network,
    raw_step,
)
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, decision_about  # noqa: E402

CUT, FACTOR = 20, 0.25
"""The step whose answer lowers the rate, once, and by what."""

NEVER = 10**6

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another


def cut_once(ask):
    if ask.step != CUT:
        return all_is_well(ask)
    decision = structs.replace(decision_about(ask), parameters={"lr_scale": FACTOR})
    return [wire.encode(wire.Answer(ask.request_id, decision))]


@pytest.fixture
def steered(captured, tmp_path, monkeypatch):
    """Instruments the process while it lasts; yields the sidecar that steers it."""
    monkeypatch.setenv("ESPER_SPAN_EVERY", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "_told", set())
    warnings.simplefilter("ignore")

    @contextlib.contextmanager
    def steer(reply=cut_once, mode="enforce", **settings):
        socket = tmp_path / "s.sock"
        socket.unlink(missing_ok=True)
        with FakeSidecar(socket, reply) as sidecar:
            TorchInstrumentor().instrument(
                skip_dep_check=True,
                mode=mode,
                tamiyo_socket=str(socket),
                **{"tamiyo_deadline_ms": 2000, "release_steps": NEVER} | settings,
            )
            try:
                yield sidecar
            finally:
                TorchInstrumentor().uninstrument()

    return steer


def rates_of(name):
    for module in LOOPS[name].needs:
        pytest.importorskip(module)
    rates = Rates()
    LOOPS[name].run(rates)
    return rates


@pytest.mark.parametrize("name", [name for name, loop in LOOPS.items() if loop.scaled])
def test_each_update_uses_the_scripts_rate_times_the_factor(captured, steered, name):
    bare = rates_of(name)
    with steered() as sidecar:
        enforced = rates_of(name)
    assert [ask.step for ask in sidecar.asks] == list(range(1, STEPS + 1))
    assert enforced.used.keys() == bare.used.keys()
    for optimizer, own in bare.used.items():
        used = enforced.used[optimizer]
        assert len(used) == len(own) == STEPS
        # What steps after the one whose steps are the run's, its generator for example, may
        # still make the update of that step in the old way.
        cut = CUT - 1 if name == "two optimizers" and optimizer == "generator" else CUT
        assert used[:cut] == own[:cut]
        assert used[CUT:] == [[rate * FACTOR for rate in rates] for rates in own[CUT:]]
    assert enforced.seen == bare.seen
    assert sum(timeline.applied for timeline in captured.timelines) == 1


@pytest.mark.parametrize("name", ["no schedule", "LambdaLR", "two optimizers", "LBFGS"])
def test_advice_changes_no_update(captured, steered, name):
    bare = rates_of(name)
    with steered(mode="advise") as sidecar:
        advised = rates_of(name)
    assert len(sidecar.asks) == STEPS
    assert advised.used == bare.used
    assert advised.seen == bare.seen
    assert not any(timeline.applied for timeline in captured.timelines)
    assert {frame.get("lr_scale") for frame in captured.frames} == {1.0}


@pytest.mark.parametrize(
    "name", ["no schedule", "LambdaLR", "by hand, per step", "tensor rate, LambdaLR"]
)
def test_the_telemetry_tells_the_rate_that_was_used_and_the_factor(captured, steered, name):
    with steered():
        rates = rates_of(name)
    used = [rate for (rate,) in rates.used[""]]
    assert [frame["optimizer_lr"] for frame in captured.frames] == pytest.approx(used)
    assert [frame["lr_scale"] for frame in captured.frames] == [1.0] * CUT + [FACTOR] * (
        STEPS - CUT
    )


def test_where_there_is_no_rate_nothing_is_told_as_applied(captured, steered):
    bare = rates_of("Adafactor, relative")
    with steered() as sidecar:
        enforced = rates_of("Adafactor, relative")
    assert len(sidecar.asks) == STEPS
    assert enforced.used == bare.used
    assert enforced.seen == bare.seen
    assert all(torch.equal(a, b) for a, b in zip(enforced.weights, bare.weights, strict=True))
    assert not any(timeline.applied for timeline in captured.timelines)


RELEASE = 5


@pytest.mark.parametrize(
    "name",
    [
        "no schedule",
        "MultiStepLR",  # drops by a tenth while the cut is held
        "LinearLR warm-up",
        "SequentialLR",
        "OneCycleLR",
        "by hand, per step",
        "two groups",
        "tensor rate, LambdaLR",
    ],
)
def test_what_was_taken_is_given_back_exactly_and_never_more(captured, steered, name):
    bare = rates_of(name).used[""]
    with steered(release_steps=RELEASE):
        used = rates_of(name).used[""]
    ratios = [
        [a / b for a, b in zip(rates, own, strict=True) if b]
        for rates, own in zip(used, bare, strict=True)
    ]
    assert max(max(each) for each in ratios) <= 1 + 1e-6
    held = ratios[CUT : CUT + RELEASE]
    assert held == [pytest.approx([FACTOR] * len(each)) for each in held]
    rising = [round(each[-1], 5) for each in ratios[CUT:]]
    assert rising == sorted(rising)
    # Given back over as many steps as were waited for.
    assert used[CUT + 2 * RELEASE + 1 :] == bare[CUT + 2 * RELEASE + 1 :]


def test_what_is_held_stays_held_while_nobody_judges(steered):
    """The sidecar falls silent three steps after its decision."""

    def reply(ask):
        return cut_once(ask) if ask.step <= CUT + 3 else []

    bare = rates_of("LambdaLR").used[""]
    with steered(reply, release_steps=RELEASE, tamiyo_deadline_ms=100):
        used = rates_of("LambdaLR").used[""]
    assert used[CUT:] == [[rate * FACTOR for rate in rates] for rates in bare[CUT:]]


# Steps that raise.


class Raises(torch.optim.SGD):
    """Raises in its own step, in the middle of the update, when it is told to."""

    error = None

    def step(self, closure=None):
        result = raw_step(torch.optim.SGD)(self, closure)
        if self.error is not None:
            error, Raises.error = self.error, None
            raise error
        return result


ERRORS = [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit(1)]
RAISED = 30


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_a_step_that_raises_leaves_the_scripts_rate_behind(steered, error, tensor):
    rates = Rates()
    with steered():
        model = network()
        rate = torch.tensor(0.5) if tensor else 0.5
        optimizer = rates.probed(Raises)(model.parameters(), lr=rate, foreach=False)
        for step in range(1, 41):
            backward(model)
            if step == RAISED:
                Raises.error = error
                with pytest.raises(type(error)):
                    optimizer.step()
                left = optimizer.param_groups[0]["lr"]
                assert float(left) == 0.5
                assert left is rate or not tensor
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert rates.used[""] == [[0.5]] * CUT + [[0.5 * FACTOR]] * 20


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SGD])
def test_a_closure_that_raises_leaves_the_scripts_rate_behind(steered, error, kind):
    rates = Rates()
    with steered():
        model = network()
        optimizer = rates.probed(kind)(model.parameters(), lr=0.5)

        def closure():
            optimizer.zero_grad()
            if step == RAISED:
                raise error
            return backward(model)

        for step in range(1, 41):
            if step == RAISED:
                with pytest.raises(type(error)):
                    optimizer.step(closure)
                assert optimizer.param_groups[0]["lr"] == 0.5
            else:
                optimizer.step(closure)
    assert rates.used[""] == [[0.5]] * CUT + [[0.5 * FACTOR]] * 20


def test_a_step_within_backward_that_raises_leaves_the_scripts_rate_behind(steered):
    with steered():
        model = nn.Linear(4, 1, bias=False)
        kind = Rates().probed(Raises)
        optimizer = kind(model.parameters(), lr=0.5)
        model.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
        for step in range(1, 41):
            if step == RAISED:
                Raises.error = RuntimeError("out of memory")
                with pytest.raises(RuntimeError, match="out of memory"):
                    backward(model)
            else:
                backward(model)
            assert optimizer.param_groups[0]["lr"] == 0.5
            model.zero_grad()


# Compiled.


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_a_compiled_step_uses_it_and_is_not_compiled_at_every_step(steered, tensor):
    """Gradients of one everywhere: how far the weights go is the rate."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    with steered() as sidecar:
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        rate = torch.tensor(0.5, dtype=torch.float64) if tensor else 0.5
        optimizer = torch.optim.SGD([weight], lr=rate, foreach=False)

        @torch.compile(backend=counter)
        def step():
            optimizer.step()

        went, compiled = [], []
        for _ in range(STEPS):
            before = weight.detach().clone()
            weight.grad = torch.ones_like(weight)
            step()
            went.append(float((before - weight.detach()).mean()))
            compiled.append(counter.frame_count)
            left = optimizer.param_groups[0]["lr"]
            assert left is rate if tensor else left == 0.5
    torch._dynamo.reset()
    assert len(sidecar.asks) == STEPS
    assert went == pytest.approx([0.5] * CUT + [0.5 * FACTOR] * (STEPS - CUT))
    # Once at the beginning, and for a float, which is a constant to a compiler, once more when
    # the factor changes.
    assert compiled[2] == compiled[CUT - 2]
    assert compiled[CUT + 2] == compiled[-1]
