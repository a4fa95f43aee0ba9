"""Updates that are checked before they are made, in loops as people write them."""

import contextlib
import warnings

import pytest

torch = pytest.importorskip("torch")

from msgspec import structs  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.leyline import wire  # noqa: E402
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, decision_about  # noqa: E402
from testkit.quiet_trainers import lightning_trainer  # noqa: E402

BAD = 8
"""The step whose batch is not a number."""

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another

GUARDS = [wire.Guard("nonfinite", above=0.0)]


def skips(request):
    """Sends guards with every answer, and has every update that is asked about skipped."""
    if isinstance(request, wire.Check):
        decision = structs.replace(decision_about(request), parameters={"skip_step": 1.0})
        return [wire.encode(wire.Answer(request.request_id, decision, GUARDS))]
    decision = structs.replace(decision_about(request), parameters={}, reason="nominal")
    return [wire.encode(wire.Answer(request.request_id, decision, GUARDS))]


def cuts_once(request):
    if request.step != 3:
        return all_is_well(request)
    return [wire.encode(wire.Answer(request.request_id, decision_about(request)))]


@pytest.fixture
def enforced(captured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")

    @contextlib.contextmanager
    def enforce(reply=skips, mode="enforce"):
        socket = tmp_path / "s.sock"
        with FakeSidecar(socket, reply) as sidecar:
            TorchInstrumentor().instrument(
                skip_dep_check=True,
                mode=mode,
                tamiyo_socket=str(socket),
                tamiyo_deadline_ms=5000,
            )
            try:
                yield sidecar
            finally:
                TorchInstrumentor().uninstrument()

    return enforce


def batch(step):
    x = torch.ones(4, 3) * step
    return x * float("nan") if step == BAD else x


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(model, step):
    return (model(batch(step)) ** 2).mean()


def is_finite(model):
    return all(bool(torch.isfinite(each).all()) for each in model.parameters())


def test_a_batch_that_is_not_a_number_does_not_reach_the_weights(captured, enforced):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    with enforced() as sidecar:
        for step in range(1, 13):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    assert is_finite(model)
    assert [check.step for check in sidecar.checks] == [BAD]
    skipped = [frame["step"] for frame in captured.frames if frame["update_skipped"]]
    assert skipped == [BAD]


def test_in_advise_nothing_is_checked_and_it_does(captured, enforced):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    with enforced(mode="advise") as sidecar:
        for step in range(1, 13):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    assert not is_finite(model)
    assert sidecar.checks == []


def takes_momentum_back(request):
    """Has a momentum of 0.999 made 0.9 in updates that are asked about."""
    asks = isinstance(request, wire.Check)
    parameters = {"momentum_scale": 0.9 / 0.999} if asks else {}
    decision = structs.replace(decision_about(request), parameters=parameters)
    guard = wire.Guard("optimizer_momentum", above=0.95, held_above=0.99, held_to=0.9)
    return [wire.encode(wire.Answer(request.request_id, decision, [guard]))]


def test_a_momentum_that_jumps_trains_as_if_it_had_not(captured, enforced):
    def trained(momentum):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(1, 2 * BAD):
            if step == BAD:
                optimizer.param_groups[0]["betas"] = (momentum, 0.999)
            optimizer.zero_grad()
            (model(torch.ones(4, 3) * step) ** 2).mean().backward()
            optimizer.step()
            assert optimizer.param_groups[0]["betas"][0] == (momentum if step >= BAD else 0.9)
        return nn.utils.parameters_to_vector(model.parameters())

    usual, harmed = trained(0.9), trained(0.999)
    with enforced(takes_momentum_back) as sidecar:
        mended = trained(0.999)
    assert [check.step for check in sidecar.checks] == [BAD]
    used = [frame["optimizer_momentum"] for frame in captured.frames]
    assert used == pytest.approx([0.9] * len(used))
    torch.testing.assert_close(mended, usual)
    assert not torch.allclose(harmed, usual, rtol=0.01)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_what_a_closure_computes_is_checked_before_it_is_used(captured, enforced, kind):
    model = network()
    optimizer = kind(model.parameters(), lr=0.01)
    with enforced() as sidecar:
        for step in range(1, 13):

            def closure(step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert is_finite(model)
    assert [check.step for check in sidecar.checks] == [BAD]
    assert [frame["step"] for frame in captured.frames] == list(range(1, 13))


def test_lightning_which_always_passes_a_closure_is_checked(captured, enforced):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, rows, _):
            return (self.net(rows[0]) ** 2).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    module = Module()
    data = TensorDataset(torch.cat([batch(step) for step in range(1, 13)]))
    with enforced() as sidecar:
        lightning_trainer().fit(module, DataLoader(data, 4))
    assert is_finite(module)
    assert [check.step for check in sidecar.checks] == [BAD]


def test_the_optimizers_behind_the_runs_own_skip_with_it(captured, enforced):
    model = network()
    first = torch.optim.SGD(model[0].parameters(), lr=0.01)
    second = torch.optim.Adam(model[2].parameters())
    with enforced():
        for step in range(1, 13):
            first.zero_grad(), second.zero_grad()
            loss_of(model, step).backward()
            first.step(), second.step()
    assert is_finite(model)


def test_a_second_optimizer_does_not_wait_for_the_answer_about_the_step_it_is_in(
    captured, enforced
):
    model = network()
    first = torch.optim.SGD(model[0].parameters(), lr=0.01)
    second = torch.optim.SGD(model[2].parameters(), lr=0.02)
    used = []
    with enforced(cuts_once):
        for step in range(1, 7):
            loss_of(model, step).backward()
            for optimizer in (first, second):
                before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
                optimizer.step()
                moved = (optimizer.param_groups[0]["params"][0] - before[0]).abs().sum()
                grads = optimizer.param_groups[0]["params"][0].grad.abs().sum()
                used.append(float(moved.detach() / grads))
    # The decision about step 3: both of step 4 are made with it, and neither of step 3.
    assert used[:6] == pytest.approx([0.01, 0.02] * 3, rel=1e-3)
    assert used[6:] == pytest.approx([0.005, 0.01] * 3, rel=1e-3)


def test_a_training_that_follows_begins_with_its_own_rate(captured, enforced):
    with enforced(cuts_once):
        for _ in range(2):
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for step in range(1, 6):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
    scales = [frame["lr_scale"] for frame in captured.frames]
    # It is a run of its own, which is told to cut its rate at step 3 as well.
    assert scales == 2 * [1.0, 1.0, 1.0, 0.5, 0.5]


def test_a_new_optimizer_over_the_same_parameters_goes_on(captured, enforced):
    model = network()
    with enforced(cuts_once):
        for _ in range(2):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for step in range(1, 6):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
    assert [frame["lr_scale"] for frame in captured.frames][5:] == [0.5] * 5


def test_what_is_given_in_place_of_a_closure_is_left_alone(captured, enforced):
    """Some optimizers take the loss, or an epoch."""
    seen = []

    class Odd(torch.optim.SGD):
        def step(self, loss):
            seen.append(loss)

    model = network()
    optimizer = Odd(model.parameters(), lr=0.01)
    with enforced(cuts_once):
        for step in range(1, 6):
            loss_of(model, step).backward()
            optimizer.step(float(step))
    assert seen == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [frame["lr_scale"] for frame in captured.frames] == [1.0] * 3 + [0.5] * 2
