"""What every way in owes, from real training loops of the frameworks themselves.

One table: each way in is run for a while, and has to deliver the same metrics and spans
for the same number of steps. A metric that goes dark in one of them fails here by name.
"""

import pytest

pytest.importorskip("torch")

from esper_otel.integrations.torch import TorchInstrumentor
from integrations.ways_in import METRICS, WAYS, WITH_TRAINERS
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, answer
from testkit.framework_loops import BATCH, FRAMEWORKS, ROWS
from testkit.loops import unaccounted

SPANS = {
    "train.input_wait",
    "train.forward",
    "train.backward",
    "train.optimizer",
}

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another


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


@pytest.mark.parametrize(("framework", "automatic"), WAYS)
def test_every_way_in_says_once_that_the_training_is_done(captured, way, framework, automatic):
    way(framework, automatic)
    assert captured.ends == [(ROWS // BATCH, "done")]


HALVED = 3
"""The step whose answer halves the learning rate, once."""


def reply(ask):
    return answer(ask) if ask.step == HALVED else all_is_well(ask)


@pytest.mark.parametrize(("framework", "automatic"), WAYS)
def test_a_decision_is_applied_in_every_way_in(
    captured, way, framework, automatic, tmp_path, monkeypatch
):
    way(framework, automatic)
    rates = [frame["optimizer_lr"] for frame in captured.frames]
    captured.frames.clear()
    captured.timelines.clear()
    monkeypatch.setenv("ESPER_MODE", "enforce")
    monkeypatch.setenv("ESPER_TAMIYO_SOCKET", str(tmp_path / "s.sock"))
    monkeypatch.setenv("ESPER_TAMIYO_DEADLINE_MS", "5000")
    with FakeSidecar(tmp_path / "s.sock", reply) as sidecar:
        way(framework, automatic)
    steps = ROWS // BATCH
    assert [ask.step for ask in sidecar.asks] == list(range(1, steps + 1))
    assert [t.step for t in captured.timelines if t.applied] == [HALVED]
    for timeline in captured.timelines:
        names = {name for name, _, _ in timeline.phases}
        applied = set() if timeline.step == steps else {"kasmina.apply"}  # no step follows
        assert names >= {"tamiyo.decide"} | applied
    decisions = {timeline.step: timeline.decision for timeline in captured.timelines}
    assert [decisions[step].reason for step in (HALVED - 1, HALVED)] == ["nominal", "a_rule"]
    # A frame tells what asking about the step before it took.
    frames = captured.frames
    assert all(frame["tamiyo_latency_ms"] > 0 for frame in frames[1:])
    scales = [0.5 if i >= HALVED else 1.0 for i in range(steps)]
    assert [frame["lr_scale"] for frame in frames] == scales
    assert [frame["optimizer_lr"] for frame in frames] == pytest.approx(
        [rate * scale for rate, scale in zip(rates, scales, strict=True)]
    )


@pytest.mark.parametrize("framework", WITH_TRAINERS)
def test_what_a_framework_computes_is_the_same_bits(captured, way, framework):
    pytest.importorskip(framework)
    bare = FRAMEWORKS[framework]()
    assert captured.frames == []
    assert way(framework, False) == bare
    assert way(framework, True) == bare


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
