"""What is promised of a GPU, on a GPU: run by ``make test-gpu``, skipped where there is none.

``ESPER_GPU_DEVICE=cpu`` runs all that needs no GPU of it, to try these tests themselves.
"""

import contextlib
import os
import warnings

import pytest

torch = pytest.importorskip("torch")

from msgspec import structs  # noqa: E402
from torch import nn  # noqa: E402

from esper_otel import loop, process  # noqa: E402
from esper_otel import run as runs  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.leyline import wire  # noqa: E402
from integrations.captured_streams import CapturedStream  # noqa: E402
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, decision_about  # noqa: E402

DEVICE = os.environ.get("ESPER_GPU_DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        ON_GPU and not torch.cuda.is_available(), reason="no GPU that this torch can use"
    ),
]
only_on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="it is about the device itself")

STEPS, CUT, FACTOR = 40, 20, 0.25
"""Steps of a training; the step whose answer lowers the rate, and by what."""

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "capturable": lambda parameters: torch.optim.Adam(
        parameters, lr=torch.tensor(1e-3, device=DEVICE), capturable=ON_GPU
    ),
}


class Training:
    """A loop that knows nothing of us, and never waits for its device.

    ``scaled_from`` has the script itself lower its rate after that step, as a decision would.
    """

    def __init__(self, kind="adamw", scaler=None, scaled_from=None, lost_at=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).to(DEVICE)
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.scaler = scaler
        self.scaled_from, self.lost_at = scaled_from, lost_at
        made = torch.Generator().manual_seed(1)
        batches = torch.randn(STEPS, 16, 32, generator=made)
        # A copy from memory that is not pinned waits for the device.
        self.batches = list(batches.pin_memory() if ON_GPU else batches)
        self.losses, self.norms, self.after = [], [], []

    def step(self, number):
        batch = self.batches[number - 1].to(DEVICE, non_blocking=True)
        self.optimizer.zero_grad()
        loss = (self.model(batch) - batch.sin()).square().mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.losses.append(loss.detach())
        if self.scaler is None:
            norm = torch.stack([p.grad.norm() for p in self.model.parameters()]).norm()
            self.norms.append(norm)
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if number == self.scaled_from:
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * FACTOR
        if number == self.lost_at:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.fill_(float("nan"))

    def run(self, first=1, last=STEPS):
        for number in range(first, last + 1):
            self.step(number)
        return self

    def weights(self):
        return [parameter.detach().cpu() for parameter in self.model.parameters()]


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """Instruments the process while it lasts; yields what is recorded, and the sidecar."""
    stream = CapturedStream()
    monkeypatch.setattr(runs, "Stream", lambda *_, **__: stream)
    monkeypatch.setenv("ESPER_SPAN_EVERY", "1")
    monkeypatch.setattr(loop, "_told", set())

    @contextlib.contextmanager
    def watch(reply=all_is_well, mode="enforce", **settings):
        socket = tmp_path / "s.sock"
        socket.unlink(missing_ok=True)
        with FakeSidecar(socket, reply) as sidecar:
            chosen = {"tamiyo_deadline_ms": 2000, "release_steps": 10**6} | settings
            TorchInstrumentor().instrument(
                skip_dep_check=True, mode=mode, tamiyo_socket=str(socket), **chosen
            )
            try:
                yield stream, sidecar
            finally:
                process.end_automatic()
                TorchInstrumentor().uninstrument()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield watch


@contextlib.contextmanager
def nobody_waits():
    """Whoever makes the host wait for the device raises."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def asks_for(**parameters):
    def reply(request):
        if request.step != CUT or not isinstance(request, wire.Ask):
            return all_is_well(request)
        decision = structs.replace(decision_about(request), parameters=parameters)
        return [wire.encode(wire.Answer(request.request_id, decision))]

    return reply


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_are_bit_identical_and_nobody_waits_for_the_device(kind, watched):
    bare = Training(kind).run().weights()
    with watched() as (stream, sidecar):
        training = Training(kind)
        training.run(last=5)  # what is made once may wait: pinned memory, streams
        with nobody_waits():
            training.run(first=6)
        assert equal(training.weights(), bare)
    assert [frame["step"] for frame in stream.frames] == [*map(float, range(1, STEPS + 1))]
    assert len(sidecar.asks) == STEPS


def test_losses_and_norms_are_those_of_their_steps(watched):
    with watched() as (stream, _):
        training = Training().run()
        if ON_GPU:
            torch.cuda.synchronize()
    losses = [loss.item() for loss in training.losses]
    norms = [norm.item() for norm in training.norms]
    for frame in stream.frames:
        place = int(frame["step"]) - 1
        for key, known in (("loss", losses), ("gradient_norm", norms)):
            if key in frame:
                assert frame[key] == pytest.approx(known[place], rel=1e-5)
    # What the device has not told when a step is sealed is left out, and never guessed.
    assert sum("loss" in frame for frame in stream.frames) > STEPS // 2


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_decision_scales_rates_wherever_they_lie(kind, watched):
    own = Training(kind, scaled_from=CUT).run().weights()
    with watched(asks_for(lr_scale=FACTOR)):
        training = Training(kind)
        training.run(last=5)
        with nobody_waits():
            training.run(first=6)
        enforced = training.weights()
        rates = [group["lr"] for group in training.optimizer.param_groups]
    assert equal(enforced, own)
    assert [float(rate) for rate in rates] == pytest.approx([0.05 if kind == "sgd" else 1e-3])


@only_on_a_gpu
@pytest.mark.parametrize("kind", ["adamw", "fused"])
def test_what_a_grad_scaler_skips_is_counted_and_changes_nothing(kind, watched):
    def scaler():
        # The first steps overflow in half a dozen halvings.
        return torch.amp.GradScaler("cuda", init_scale=2.0**130, growth_interval=10**6)

    bare = Training(kind, scaler()).run()
    with watched() as (stream, _):
        training = Training(kind, scaler()).run()
        torch.cuda.synchronize()
    assert equal(training.weights(), bare.weights())
    assert training.scaler.get_scale() == bare.scaler.get_scale() < 2.0**130
    assert len(stream.frames) <= STEPS
    assert all(torch.isfinite(weight).all() for weight in training.weights())


@only_on_a_gpu
def test_a_step_in_a_cuda_graph_is_captured_and_replayed_as_without_us(watched):
    def graphed():
        training = Training("capturable")
        still = training.batches[0].to(DEVICE)

        def step():
            training.optimizer.zero_grad(set_to_none=True)
            loss = (training.model(still) - still.sin()).square().mean()
            loss.backward()
            training.optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(10):
            graph.replay()
        return training.weights()

    bare = graphed()
    with watched() as (stream, _):
        ours = graphed()
    assert equal(ours, bare)
    assert len(stream.frames) >= 3


@only_on_a_gpu
def test_device_metrics_are_there(watched):
    with watched() as (stream, _):
        Training().run()
        torch.cuda.synchronize()
    newest = stream.frames[-1]
    assert newest["gpu_mem_used_gb"] > 0.0
    assert newest["gpu_mem_free_gb"] > 0.0
    assert any(frame.get("h2d_copy_ms", 0.0) > 0.0 for frame in stream.frames)
    pynvml = pytest.importorskip("pynvml")
    del pynvml
    assert any("gpu_util_percent" in frame for frame in stream.frames)


def test_a_snapshot_is_taken_without_waiting_and_put_back(watched):
    with watched(asks_for(restore=1.0), snapshot_every=5) as (stream, _):
        training = Training(lost_at=CUT)
        training.run(last=8)
        with nobody_waits():
            training.run(first=9, last=CUT)
        training.run(first=CUT + 1)
        weights = training.weights()
    restored = [frame["step"] for frame in stream.frames if frame.get("restored")]
    assert restored == [float(CUT + 1)]
    assert all(torch.isfinite(weight).all() for weight in weights)
