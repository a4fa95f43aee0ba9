"""What every way in owes, from real training loops of the frameworks themselves.

One table: each way in is run for a while, and has to deliver the same metrics and spans
for the same number of steps. A metric that goes dark in one of them fails here by name.
"""

import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import esper_otel  # noqa: E402
from bench.framework_loops import BATCH, FRAMEWORKS, ROWS, loader, network  # noqa: E402
from bench.loops import unaccounted  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.integrations.training import Training, require  # noqa: E402
from esper_otel.settings import SettingsError  # noqa: E402

METRICS = {
    "step",
    "loss",
    "gradient_norm",
    "samples_per_s",
    "hook_latency_ms",
    "tamiyo_latency_ms",
    "step_latency_ms",
    "forward_ms",
    "backward_ms",
    "optimizer_ms",
    "input_wait_ms",
    "kasmina.apply_ms",
    "kasmina.finalize_ms",
    "loss_delta",
    "loss_ewma",
    "loss_volatility",
    "grad_norm_ewma",
    "grad_var",
    "optimizer_lr",
    "optimizer_momentum",
    "nonfinite",
}
SPANS = {
    "train.input_wait",
    "train.forward",
    "train.backward",
    "train.optimizer",
}

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another


@pytest.fixture
def way(captured, request, tmp_path, monkeypatch):
    """Runs a framework's loop in one of the two ways in; gives what it computed."""
    monkeypatch.setenv("ESPER_SPAN_EVERY", "1")
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")

    def run(framework, automatic, **options):
        pytest.importorskip("torch" if framework == "plain" else framework)
        if not automatic:
            return FRAMEWORKS[framework](watch=True, **options)
        TorchInstrumentor().instrument(skip_dep_check=True)
        try:
            return FRAMEWORKS[framework](**options)
        finally:
            TorchInstrumentor().uninstrument()

    return run


WAYS = [(name, True) for name in FRAMEWORKS] + [
    (name, False) for name in FRAMEWORKS if name != "plain"
]


@pytest.mark.parametrize(("framework", "automatic"), WAYS)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_way_in_delivers_what_it_owes(captured, way, framework, automatic, accumulate):
    losses = way(framework, automatic, accumulate=accumulate)
    steps = ROWS // BATCH // accumulate
    frames = captured.frames
    assert [frame["step"] for frame in frames] == list(range(1, steps + 1))
    # A loader that is a batch ahead has nothing left to fetch in the last step.
    assert METRICS - frames[-2 if accumulate == 1 else -1].keys() == set()
    for timeline in captured.timelines[1 : -1 if accumulate == 1 else None]:
        assert SPANS - {name for name, _, _ in timeline.phases} == set()
    means = [
        sum(losses[i : i + accumulate]) / accumulate for i in range(0, len(losses), accumulate)
    ]
    assert [frame["loss"] for frame in frames] == pytest.approx(means)
    for frame in frames[1:]:
        assert abs(unaccounted(frame)) <= max(0.05 * frame["step_latency_ms"], 0.02)


@pytest.mark.parametrize("framework", ["lightning", "transformers", "accelerate"])
def test_both_ways_in_at_once_count_a_step_once(captured, way, framework):
    way(framework, True, watch=True)
    assert len(captured.frames) == ROWS // BATCH


@pytest.mark.parametrize("framework", ["lightning", "transformers", "accelerate"])
def test_what_a_framework_computes_is_the_same_bits(captured, way, framework):
    pytest.importorskip(framework)
    bare = FRAMEWORKS[framework]()
    assert captured.frames == []
    assert way(framework, False) == bare
    assert way(framework, True) == bare


def test_explicit_and_automatic_count_the_same_step_once(captured):
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        model = network()
        optimizer = torch.optim.Adam(model.parameters())
        run = esper_otel.start(optimizer)
        for x, y in run.batches(loader()):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            run.report(loss=loss)
            optimizer.step()
    finally:
        TorchInstrumentor().uninstrument()
    assert len(captured.frames) == ROWS // BATCH


def test_a_plain_loop_after_a_frameworks_training_is_counted_too(captured):
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        model = network()
        optimizer = torch.optim.Adam(model.parameters())  # outlives its training
        training = Training()
        training.begin(optimizer)
        train(model, optimizer)
        training.end()
        other = network()
        train(other, torch.optim.Adam(other.parameters()))
    finally:
        TorchInstrumentor().uninstrument()
    assert len(captured.frames) == 2 * ROWS // BATCH


def test_a_run_that_cannot_be_closed_does_not_reach_the_framework(captured, caplog):
    training = Training()
    training.begin()
    captured.close = lambda timeout_s=None: 1 / 0
    training.end()
    captured.close = lambda timeout_s=None: captured
    training.run.close()
    assert [record.message for record in caplog.records] == ["the run could not be closed"]


def test_uninstrumenting_takes_the_frameworks_back_as_well(captured):
    trainer = pytest.importorskip("transformers.trainer")
    accelerator = pytest.importorskip("accelerate.accelerator")

    def of_frameworks():
        return [*trainer.DEFAULT_CALLBACKS, accelerator.Accelerator.__dict__["backward"]]

    before = of_frameworks()
    TorchInstrumentor().instrument(skip_dep_check=True)
    during = of_frameworks()
    TorchInstrumentor().uninstrument()
    assert len(during) == len(before) + 1
    assert during[-1] is not before[-1]
    assert of_frameworks() == before


def train(model, optimizer):
    for x, y in loader():
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_framework_that_is_too_old_is_named_with_what_is_expected():
    with pytest.raises(SettingsError, match=r"torch .* is too old .*: expected 999 or newer"):
        require("torch", "999")
