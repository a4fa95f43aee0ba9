"""Gradients that a script does not clear: told, and cleared where a decision says so."""

import contextlib
import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from esper_otel.integrations.kept_gradients import KeptGradients  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.leyline import wire  # noqa: E402
from esper_otel.leyline.frames import present  # noqa: E402
from esper_otel.leyline.metrics import STEP_KEYS  # noqa: E402
from esper_tamiyo.judging.engine import Engine  # noqa: E402
from esper_tamiyo.language.table_file import load  # noqa: E402
from sidecar.frames_made import frame  # noqa: E402
from tamiyo.fake_sidecar import FakeSidecar, all_is_well  # noqa: E402

STEPS = 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(model, step):
    return (model(torch.ones(4, 3) * step) ** 2).mean()


def to_zero(optimizer, model):
    optimizer.zero_grad(set_to_none=False)


def to_none(optimizer, model):
    optimizer.zero_grad()


def by_model(optimizer, model):
    model.zero_grad(set_to_none=False)


def by_hand(optimizer, model):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)  # a habit of its own, and no forgotten call


def by_data(optimizer, model):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data.zero_()  # as zero_grad once did; torch does not count it


def by_numpy(optimizer, model):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.numpy().fill(0.0)


def by_deletion(optimizer, model):
    for parameter in model.parameters():
        del parameter.grad


def never(optimizer, model):
    pass


CLEARED = [to_zero, to_none, by_model, by_hand, by_data, by_numpy, by_deletion]


def follow(clear, *, micro_batches=1, clip=False, before=True):
    """Whether each update had gradients of the one before, as is seen around the calls."""
    model, subject, seen = network(), KeptGradients(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(STEPS):
        if before:
            clear(optimizer, model)
        for _ in range(micro_batches):
            subject.before_backward()
            loss_of(model, step + 1).backward()
            subject.after_backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        seen.append(subject.after_update(optimizer))
        if not before:
            clear(optimizer, model)
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"micro_batches": 3}, {"clip": True}, {"before": False}]
)
@pytest.mark.parametrize("clear", CLEARED)
def test_gradients_that_are_cleared_are_not_kept(clear, options):
    assert follow(clear, **options) == [False] * STEPS


@pytest.mark.parametrize("options", [{}, {"micro_batches": 3}, {"clip": True}])
def test_gradients_that_nobody_clears_are_kept_from_the_second_update_on(options):
    assert follow(never, **options) == [False] + [True] * (STEPS - 1)


def test_another_optimizers_update_says_nothing():
    model, subject = network(), KeptGradients()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]
    for step in range(4):
        optimizer = optimizers[step % 2]
        subject.before_backward()
        loss_of(model, 1).backward()
        subject.after_backward()
        assert not subject.after_update(optimizer)


def test_gradients_that_are_replaced_before_each_update_are_not_kept():
    model, subject = network(), KeptGradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        subject.before_backward()
        loss_of(model, step + 1).backward()
        subject.after_backward()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert not subject.after_update(optimizer)


def test_gradients_are_followed_when_the_smallest_parameter_is_trained_no_more():
    model, subject, seen = network(), KeptGradients(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        if step == 3:
            model[2].requires_grad_(False)  # its gradients stay where they are
        subject.before_backward()
        loss_of(model, step + 1).backward()
        subject.after_backward()
        optimizer.step()
        seen.append(subject.after_update(optimizer))
    assert seen == [False, True, True, False, True, True]


def test_no_gradient_is_kept_alive():
    """It may be the only one, of a flat or very large parameter."""
    model, subject = nn.Linear(3, 1, bias=False), KeptGradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_of(model, 1).backward()
    subject.after_update(optimizer)
    gradient = weakref.ref(model.weight.grad)
    assert gradient() is model.weight.grad
    optimizer.zero_grad()
    assert gradient() is None


def test_sparse_gradients_are_cleared():
    model, subject = nn.Embedding(5, 2, sparse=True), KeptGradients()
    optimizer = torch.optim.SparseAdam(model.parameters())
    model(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    subject.after_update(optimizer)
    subject.before_backward()
    assert subject.clear()
    assert not model.weight.grad.to_dense().any()


def test_an_optimizer_that_is_gone_is_not_held_on_to():
    model, subject = network(), KeptGradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 1).backward()
    subject.after_update(optimizer)
    del optimizer, model
    subject.before_backward()
    subject.after_backward()
    assert subject.clear()


def adversarial(clears):
    """A loop whose second loss also reaches what the first optimizer has updated."""
    judge, maker, subject, seen = network(), nn.Linear(3, 3), KeptGradients(), []
    optimizer = torch.optim.SGD(judge.parameters(), lr=0.01)
    other = torch.optim.SGD(maker.parameters(), lr=0.01)

    def backward(loss):
        subject.before_backward()
        loss.backward()
        subject.after_backward()

    for step in range(1, STEPS + 1):
        if clears:
            optimizer.zero_grad(set_to_none=False)
        backward(loss_of(judge, step))
        optimizer.step()
        seen.append(subject.after_update(optimizer))
        other.zero_grad()
        backward(judge(maker(torch.ones(4, 3))).mean())  # adds to the judge's as well
        other.step()
    return seen


@pytest.mark.parametrize("clears", [False, True])
def test_what_another_loss_adds_meanwhile_and_is_cleared_is_not_kept(clears):
    assert adversarial(clears) == [False] + [not clears] * (STEPS - 1)


# --- in a training, beside an engine with the default table


@pytest.fixture
def beside(captured, tmp_path, monkeypatch):
    """The process as ``esper-otel run`` has it in a mode, and the default table."""
    monkeypatch.chdir(tmp_path)
    engine = Engine(load("default"))

    def judged(request):
        if isinstance(request, wire.Check):
            return all_is_well(request)
        values = present(STEP_KEYS, request.values)
        decision = engine.observe(frame(int(values.pop("step")), **values), asked=True)
        return [wire.encode(wire.Answer(request.request_id, decision))]

    @contextlib.contextmanager
    def run(mode):
        socket = tmp_path / "s.sock"
        settings = {"mode": mode, "tamiyo_socket": str(socket), "tamiyo_deadline_ms": 5000}
        with FakeSidecar(socket, judged):
            TorchInstrumentor().instrument(skip_dep_check=True, **settings)
            try:
                yield
            finally:
                TorchInstrumentor().uninstrument()

    return run


FORGOTTEN = 30


def trained(clears=lambda step: step < FORGOTTEN, steps=60, micro_batches=1):
    """Weights after a training, and what its script saw of a gradient behind each backward."""
    model, seen = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, steps + 1):
        if clears(step):
            optimizer.zero_grad()
        for _ in range(micro_batches):
            loss_of(model, 1 + step % 3).backward()
        seen.append(model[0].weight.grad.clone())
        optimizer.step()
        assert model[0].weight.grad is not None
    return nn.utils.parameters_to_vector(model.parameters()).detach(), seen


def kept(captured):
    return [each["step"] for each in captured.frames if each.get("gradients_kept")]


def test_a_script_that_forgets_to_clear_is_told_in_advise(captured, beside):
    bare, _ = trained()
    with beside("advise"):
        told, _ = trained()
    assert torch.equal(told, bare)
    assert kept(captured) == list(range(FORGOTTEN, 61))
    assert "gradients_kept" not in captured.frames[0], (
        "a metric of its own only where it happens"
    )


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_that_a_script_forgets_to_clear_are_cleared(captured, beside, micro_batches):
    _, healthy = trained(lambda step: True, micro_batches=micro_batches)
    with beside("enforce"):
        _, seen = trained(micro_batches=micro_batches)
    steps = kept(captured)
    assert steps == list(range(FORGOTTEN, FORGOTTEN + len(steps)))
    assert 2 <= len(steps) <= 4, "two tell, and the answer comes with the next step"
    largest = max(float(each.norm()) for each in healthy[FORGOTTEN:])
    assert all(float(each.norm()) < 1.1 * largest for each in seen[FORGOTTEN + 4 :])


def test_a_script_that_clears_again_and_forgets_again_is_helped_again(captured, beside):
    forgotten = [*range(10, 20), *range(90, 100)]
    with beside("enforce"):
        trained(lambda step: step not in forgotten, steps=110)
    steps = kept(captured)
    assert set(steps) < set(forgotten)
    told = [each.get("gradients_kept") for each in captured.frames]
    assert told[:9] == [None] * 9
    assert set(told[9:]) == {0.0, 1.0}
    assert 2 <= len([step for step in steps if step < 20]) <= 4
    assert 2 <= len([step for step in steps if step > 20]) <= 4


def test_a_script_that_clears_at_some_updates_only_is_helped_at_the_others(captured, beside):
    with beside("enforce"):
        trained(lambda step: step % 4 == 1)
    assert set(kept(captured)) <= {2, 3, 4, 6}


def cleared_by_a_hook(model):
    """The script's own hook is called before ours."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.register_step_post_hook(lambda each, *_: each.zero_grad(set_to_none=False))
    while True:
        loss_of(model, 1).backward()
        optimizer.step()
        yield


def stepped_within_backward(model):
    optimizers = {each: torch.optim.SGD([each], lr=0.01) for each in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad(set_to_none=False)

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)
    while True:
        loss_of(model, 1).backward()
        yield


@pytest.mark.parametrize("loop", [cleared_by_a_hook, stepped_within_backward])
def test_gradients_that_are_cleared_within_other_calls_are_not_kept(captured, beside, loop):
    with beside("enforce"):
        steps = loop(network())
        for _ in range(STEPS):
            next(steps)
    assert len(captured.frames) == STEPS
    assert kept(captured) == []


def test_gradients_of_an_update_that_a_scaler_skips_are_cleared_as_well(captured, beside):
    """An infinite one that stays would have every update skipped from then on."""
    overflow = 30
    with beside("enforce"):
        model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=16.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(1, 50):
            loss = loss_of(model, 1)
            scaler.scale(loss * torch.inf if step == overflow else loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert len(captured.frames) == 49 - 1


def test_a_training_that_is_gone_leaves_no_parameter_behind(captured, beside):
    with beside("enforce"):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(STEPS):
            loss_of(model, 1).backward()
            optimizer.step()
        of_it = [optimizer, *model.parameters(), *(each.grad for each in model.parameters())]
        known = [weakref.ref(each) for each in of_it]
        del model, optimizer, of_it
        gc.collect()
        assert [each() for each in known] == [None] * len(known)


def test_a_gradient_that_cannot_be_followed_takes_nothing_from_the_step(
    captured, beside, monkeypatch
):
    def fail(*_):
        raise RuntimeError("Inference tensors do not track version counter")

    with beside("enforce"):
        trained(lambda step: True, steps=5)
        for name in ("before_backward", "after_backward", "after_update"):
            monkeypatch.setattr(KeptGradients, name, fail)
        trained(lambda step: True, steps=5)
    assert len(captured.frames) == 10
    assert captured.frames[-1].keys() == captured.frames[4].keys()


def test_evaluations_and_penalties_of_a_loop_that_clears_are_no_trouble(captured, beside):
    """Two losses a step, one of them with its graph kept, and gradients taken by hand."""
    with beside("enforce"):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(1, 20):
            model.zero_grad(set_to_none=False)
            loss = loss_of(model, 1)
            loss.backward(retain_graph=True)
            loss_of(model, step).backward()
            torch.autograd.grad(loss, list(model.parameters()))
            optimizer.step()
    assert kept(captured) == []
