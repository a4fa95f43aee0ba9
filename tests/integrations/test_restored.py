"""Weights that a decision puts back, in loops as people write them."""

import contextlib
import copy
import warnings

import pytest

torch = pytest.importorskip("torch")

from msgspec import structs  # noqa: E402
from torch import nn  # noqa: E402

from esper_otel import loop, process  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.leyline import wire  # noqa: E402
from esper_otel.leyline.decisions import Action, Severity  # noqa: E402
from sidecar.running import sidecar  # noqa: E402
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, decision_about  # noqa: E402

EVERY = 10
ASKED = 30
"""The step whose answer asks for the snapshot. Made at steps 2 and 13, it is that of 13."""

GOOD = 13

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def asks_once(request):
    if request.step != ASKED:
        return all_is_well(request)
    parameters = {"restore": 1.0, "lr_scale": 0.5}
    decision = structs.replace(decision_about(request), parameters=parameters)
    return [wire.encode(wire.Answer(request.request_id, decision))]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


class Loop:
    """A loop that knows nothing of us; what it saw of its weights after each step."""

    def __init__(self, kind="adam", steps=45, closure=False, lost_at=()):
        self.model = network()
        self.optimizer = KINDS[kind](self.model.parameters())
        self.steps, self.closure, self.lost_at = steps, closure, lost_at
        self.after = {}
        self.losses = {}

    def loss(self, step):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
        return (self.model(x) - x.sum(1, keepdim=True).sin()).square().mean()

    def bits(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def backward(self, step):
        self.optimizer.zero_grad()
        loss = self.loss(step)
        loss.backward()
        self.losses[step] = loss.item()
        return loss

    def run(self):
        for step in range(1, self.steps + 1):
            if self.closure:
                self.optimizer.step(lambda step=step: self.backward(step))
            else:
                self.backward(step)
                self.optimizer.step()
            if step in self.lost_at:
                with torch.no_grad():
                    for parameter in self.model.parameters():
                        parameter.fill_(float("nan"))
            self.after[step] = self.bits()
        return self

    def evaluate(self):
        with torch.no_grad():
            return sum(self.loss(10**6 + each).item() for each in range(8)) / 8


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture
def instrumented(captured, tmp_path, monkeypatch):
    """Instruments the process while it lasts; yields what it is answered by."""
    monkeypatch.setenv("ESPER_SPAN_EVERY", "1")
    monkeypatch.setattr(loop, "_told", set())
    warnings.simplefilter("ignore")

    @contextlib.contextmanager
    def instrument(reply=asks_once, mode="enforce", **settings):
        socket = tmp_path / "s.sock"
        socket.unlink(missing_ok=True)
        with FakeSidecar(socket, reply) as fake:
            TorchInstrumentor().instrument(
                skip_dep_check=True,
                mode=mode,
                tamiyo_socket=str(socket),
                tamiyo_deadline_ms=5000,
                **{"snapshot_every": EVERY, **settings},
            )
            try:
                yield fake
            finally:
                TorchInstrumentor().uninstrument()

    return instrument


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_snapshots_change_no_bit_of_a_training(instrumented, kind, closure):
    bare = Loop(kind, closure=closure).run()
    with instrumented(all_is_well):
        watched = Loop(kind, closure=closure).run()
        assert process.automatic()._responses.restoring.report.taken > 2
    assert watched.losses == bare.losses
    assert same(watched.after, bare.after)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_back_is_the_training_as_it_was_after_the_good_step(
    captured, instrumented, kind, closure
):
    with instrumented():
        watched = Loop(kind, closure=closure).run()
    twin = Loop(kind, closure=closure).run()
    back = ASKED + 1
    assert same(watched.after[ASKED], twin.after[ASKED])
    assert same(watched.after[back], twin.after[GOOD])
    assert not same(watched.after[back + 1], watched.after[back])
    column = {frame["step"]: frame for frame in captured.frames}
    assert [step for step, frame in column.items() if frame["restored"]] == [back]
    assert [step for step, frame in column.items() if frame["update_skipped"]] == [back]
    assert [column[step]["lr_scale"] for step in (ASKED, back + 1)] == [1.0, 0.5]
    (timeline,) = [each for each in captured.timelines if each.step == ASKED]
    assert timeline.applied
    events = {each.step: [event.name for event in each.events] for each in captured.timelines}
    assert events[back] == ["esper.weights.restored"]


def test_in_advise_nothing_is_copied_or_put_back(captured, instrumented):
    with instrumented(mode="advise"):
        watched = Loop().run()
        assert process.automatic()._responses.restoring.report is None
    assert same(watched.after, Loop().run().after)
    assert all("restored" not in frame for frame in captured.frames)


def test_without_snapshots_the_rate_is_cut_all_the_same_and_the_reason_told(
    captured, instrumented, caplog
):
    with instrumented(snapshot_every=0):
        Loop().run()
        report = process.automatic()._responses.restoring.report
    assert report.refused == {"no snapshots are kept (ESPER_SNAPSHOT_EVERY)": 1}
    assert captured.frames[ASKED + 1]["lr_scale"] == 0.5
    assert not any(frame["update_skipped"] for frame in captured.frames)
    told = [r.getMessage() for r in caplog.records if "requests a restore" in r.getMessage()]
    assert len(told) == 1


def test_a_check_before_the_update_puts_back_at_once(captured, instrumented):
    """A gradient that is not finite, and an answer that asks for the snapshot."""
    guards = [wire.Guard("nonfinite", above=0.0)]

    def reply(request):
        if isinstance(request, wire.Check):
            decision = structs.replace(decision_about(request), parameters={"restore": 1.0})
        else:
            decision = structs.replace(
                decision_about(request),
                action=Action.CONTINUE,
                severity=Severity.NORMAL,
                reason="nominal",
                parameters={},
            )
        return [wire.encode(wire.Answer(request.request_id, decision, guards))]

    lost = 29
    with instrumented(reply) as fake:
        watched = Loop(lost_at=[lost]).run()
    twin = Loop().run()
    assert [check.step for check in fake.checks] == [lost + 1]
    assert same(watched.after[lost + 1], twin.after[GOOD])
    assert [frame["step"] for frame in captured.frames if frame["restored"]] == [lost + 1]


def test_an_optimizer_that_follows_makes_no_update_of_lost_weights(instrumented):
    """Its gradients were computed with what was lost."""
    generator, critic = network(), network()
    optimizers = [KINDS["adam"](each.parameters()) for each in (critic, generator)]
    seen = {}
    with instrumented():
        for step in range(1, 40):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            fake = generator(x).expand(8, 4)
            for optimizer in optimizers:
                optimizer.zero_grad()
            critic(fake.detach()).mean().backward()
            optimizers[0].step()
            critic(fake).square().mean().backward()
            before = copy.deepcopy(generator.state_dict())
            optimizers[1].step()
            after = generator.state_dict()
            seen[step] = not all(torch.equal(before[key], after[key]) for key in before)
    assert [step for step, changed in seen.items() if not changed] == [ASKED + 1]


def test_explicit_loops_can_name_what_is_copied(captured, tmp_path, monkeypatch):
    import esper_otel

    monkeypatch.setattr(loop, "_told", set())
    work = Loop()
    average = copy.deepcopy(work.model).requires_grad_(False)
    socket = tmp_path / "s.sock"
    with FakeSidecar(socket, asks_once):
        run = esper_otel.start(
            work.optimizer,
            mode="enforce",
            tamiyo_socket=str(socket),
            tamiyo_deadline_ms=5000,
            snapshot_every=EVERY,
        )
        run.protect(work.model, average)
        kept = {}
        for step in range(1, 40):
            work.backward(step)
            run.report(loss=work.losses[step])
            work.optimizer.step()
            kept[step] = copy.deepcopy(average.state_dict())
            for mean, weight in zip(average.parameters(), work.model.parameters(), strict=True):
                mean.lerp_(weight, 0.1)
        run.close()
    assert same(kept[ASKED + 1], kept[GOOD])
    with pytest.raises(TypeError, match="expected modules, got Tensor"):
        run.protect(torch.ones(1))


@pytest.mark.parametrize("closure", [False, True])
def test_weights_that_are_lost_come_back_by_the_default_table(
    captured, tmp_path, monkeypatch, closure
):
    """With the real engine: NaN weights at a step, and a run that ends near its twin."""
    monkeypatch.setattr(loop, "_told", set())
    twin = Loop(steps=150, closure=closure).run()
    socket = tmp_path / "s.sock"
    settings = {"mode": "enforce", "tamiyo_socket": str(socket), "tamiyo_deadline_ms": 5000}

    def trained(steps, **more):
        TorchInstrumentor().instrument(skip_dep_check=True, **settings, **more)
        try:
            return Loop(steps=steps, closure=closure, lost_at=[50]).run().evaluate()
        finally:
            TorchInstrumentor().uninstrument()

    with sidecar(socket):
        without = trained(60)
        first = len(captured.frames)
        ended = trained(150, snapshot_every=10, release_steps=10)
    assert without != without
    restored = [frame["step"] for frame in captured.frames[first:] if frame.get("restored")]
    assert restored == [53]
    assert ended < 1.25 * twin.evaluate()
