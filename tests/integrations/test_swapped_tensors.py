"""Models that torch converts by swapping tensors, after a training that was recorded."""

import contextlib
import weakref

import pytest

torch = pytest.importorskip("torch")

from msgspec import structs  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.leyline import wire  # noqa: E402
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, decision_about  # noqa: E402

STEPS = 24
RESTORED = 12


@pytest.fixture
def beside(captured, tmp_path):
    """The process as ``esper-otel run`` has it in enforce, with snapshots."""
    socket = tmp_path / "s.sock"

    @contextlib.contextmanager
    def run(parameters=None):
        """``parameters`` are decided about one of the steps."""

        def reply(request):
            if parameters is None or request.step != RESTORED:
                return all_is_well(request)
            decision = structs.replace(decision_about(request), parameters=parameters)
            return [wire.encode(wire.Answer(request.request_id, decision))]

        settings = {"mode": "enforce", "tamiyo_deadline_ms": 5000, "snapshot_every": 4}
        with FakeSidecar(socket, reply):
            TorchInstrumentor().instrument(
                skip_dep_check=True, tamiyo_socket=str(socket), **settings
            )
            try:
                yield
            finally:
                TorchInstrumentor().uninstrument()

    return run


@pytest.fixture
def swaps():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def doubled():
    """A model whose parameters are tensors of a subclass, of two tensors each."""
    internal = pytest.importorskip("torch.testing._internal.two_tensor")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    for module in (model[0], model[2]):
        for name, each in list(module.named_parameters(recurse=False)):
            data = each.detach()
            setattr(module, name, nn.Parameter(internal.TwoTensor(data, data.clone())))
    return model


ROWS = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


def train(model, optimizer, steps=STEPS, calls=1, clears=True, data=ROWS):
    batches = DataLoader(data, batch_size=16)
    step = 0
    while step < steps:
        for batch in batches:
            step += 1
            if clears:
                optimizer.zero_grad()
            for _ in range(calls):
                batch = batch.to(next(model.parameters()).dtype)
                (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()


def tensors_of(model, optimizer):
    yield from model.parameters()
    yield from (each.grad for each in model.parameters() if each.grad is not None)
    yield from model.buffers()
    for state in optimizer.state.values():
        yield from (each for each in state.values() if isinstance(each, torch.Tensor))


def bits(value):
    """``value`` in plain tensors and numbers, bit by bit."""
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [bits(each) for each in value]
    if hasattr(value, "__tensor_flatten__"):
        return [bits(getattr(value, name)) for name in value.__tensor_flatten__()[0]]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    return value


def converted(make, convert, **options):
    """What a training leaves whose model is converted after it, trained on, and once more."""
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, **options)
    convert(model)
    optimizer.zero_grad()
    later = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, later, steps=4)
    convert(model)
    return bits([model.state_dict(), optimizer.state_dict(), later.state_dict()])


def loads_state(model):
    model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()})


def assigns_state(model):
    state = {name: each.clone() for name, each in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


CONVERSIONS = {
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.float64),
    "cpu": lambda model: model.cpu(),
    "half and back": lambda model: model.to(torch.bfloat16).float(),
    "load_state_dict": loads_state,
    "assign": assigns_state,
}

LOOPS = [{}, {"calls": 2}, {"clears": False}]


@pytest.mark.parametrize("options", LOOPS, ids=str)
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_model_is_converted_by_swapping_as_without_us(beside, swaps, convert, options):
    bare = converted(network, convert, **options)
    with beside():
        assert converted(network, convert, **options) == bare


@pytest.mark.parametrize("options", LOOPS, ids=str)
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_model_of_a_subclass_is_converted_as_without_us(beside, convert, options, caplog):
    bare = converted(doubled, convert, **options)
    with beside():
        assert converted(doubled, convert, **options) == bare
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("options", LOOPS, ids=str)
@pytest.mark.parametrize("make", [network, doubled])
def test_no_tensor_of_the_script_has_a_weak_reference_of_ours(beside, make, options):
    model = make()
    with beside({"restore": 1.0}):
        for kind in (torch.optim.Adam, torch.optim.SGD):
            optimizer = kind(model.parameters(), lr=0.01)
            train(model, optimizer, **options)
            tensors = list(tensors_of(model, optimizer))
            assert len(tensors) >= 8
            assert not any(map(weakref.getweakrefs, tensors))


def test_a_tensor_as_a_data_set_has_none_either(beside):
    model, rows = network(), torch.ones(32, 4)
    with beside():
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), data=rows)
    assert weakref.getweakrefs(rows) == []


def test_what_was_swapped_since_is_not_put_back(beside, swaps, caplog):
    """The snapshots of before are of other tensors; the script goes on."""
    model = network()
    with beside({"restore": 1.0}):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        train(model, optimizer, steps=RESTORED - 1)
        model.load_state_dict({key: each + 1 for key, each in model.state_dict().items()})
        model.double()
        optimizer.zero_grad()
        train(model, optimizer, steps=STEPS - RESTORED + 1)
    assert "the parameters are not those of the snapshot" in caplog.text
