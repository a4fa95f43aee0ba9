"""Values out of requests: whoever wrote them, however they were cut, equal to protobuf's."""

from itertools import cycle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.protobuf import FieldError
from esper_otel.report.columns import ColumnReader, Producer
from esper_otel.report.layouts import Layout, attribute, fields
from esper_otel.report.trainers import CLOCK, TrainerCurves
from report.made import STEP_NS, frames
from sidecar.frames_made import otlp_of, put
from sidecar.recorded_runs import cut


def read(*requests):
    """TrainerCurves by source, settled."""
    reader, trainers = ColumnReader(), {}
    for request in requests:
        for source, block in reader.read(request.SerializeToString()):
            trainers.setdefault(source, TrainerCurves(source)).take_in(block)
    for trainer in trainers.values():
        trainer.assemble_rest()
    return trainers


def curve(trainer, key, seed=None):
    steps, values = trainer.curves[seed, key].points()
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def test_every_value_of_a_recording_is_in_a_curve():
    made = frames(300, seeds=["a", "b"], loss=lambda s: 1 / (s + 1), lr_scale=lambda s: 1.0)
    ((source, trainer),) = read(otlp_of(*made[:120]), otlp_of(*made[120:])).items()
    assert source == Producer("run", 0, "one")
    assert curve(trainer, "loss") == {frame.step: frame.values["loss"] for frame in made}
    assert curve(trainer, "kasmina.seed.alpha", "b") == {s: s / 300 for s in range(300)}
    assert trainer.steps() == (300, 0, 299)
    clock = trainer.curves[None, CLOCK].points().values
    assert np.allclose(np.diff(clock), STEP_NS, atol=600)
    assert trainer.lost == 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12))
def test_requests_cut_inside_a_step_lose_nothing(sizes, count):
    made = frames(count, seeds=["a"], loss=float, gradient_norm=lambda s: s / 7)
    ((_, trainer),) = read(*cut(made, cycle(sizes))).items()
    for key in ("loss", "gradient_norm"):
        assert curve(trainer, key) == {frame.step: frame.values[key] for frame in made}
    assert curve(trainer, "kasmina.seed.alpha", "a") == {s: s / count for s in range(count)}
    assert trainer.lost == 0


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                key: st.floats(allow_nan=False, allow_infinity=False, width=64)
                for key in ("loss", "accuracy", "gradient_norm", "samples_per_s")
            },
        ),
        min_size=1,
        max_size=40,
    )
)
def test_steps_with_other_metrics_each_are_read_alike(values):
    made = frames(
        len(values), **{k: lambda s, k=k: values[s].get(k) for k in ("loss", "accuracy")}
    )
    ((_, trainer),) = read(otlp_of(*made)).items()
    for key in ("loss", "accuracy"):
        expected = {frame.step: frame.values[key] for frame in made if key in frame.values}
        if expected:
            assert curve(trainer, key) == expected
        else:
            assert (None, key) not in trainer.curves


def test_what_was_sent_again_counts_once(monkeypatch):
    monkeypatch.setattr("esper_otel.report.trainers.AT_ONCE", 20)
    made = frames(30, seeds=["a"], loss=lambda s: 1.0 + s)
    first, second = otlp_of(*made[:15]), otlp_of(*made[15:])
    ((_, trainer),) = read(first, first, second, second).items()
    assert trainer.steps()[0] == 30
    assert trainer.curves[None, "loss"].total.sum == sum(range(1, 31))
    assert trainer.curves["a", "kasmina.seed.alpha"].total.count == 30


def test_what_a_step_with_broken_values_lacks_is_a_gap():
    made = frames(
        50,
        loss=lambda s: None if 20 <= s < 23 else 1.0 + s,
        nonfinite=lambda s: 1.0 if 20 <= s < 23 else 0.0,
    )
    ((_, trainer),) = read(otlp_of(*made)).items()
    loss = curve(trainer, "loss")
    assert [step for step, value in loss.items() if np.isnan(value)] == [20, 21, 22]
    assert trainer.curves[None, "loss"].total.count == 47


def test_whole_numbers_and_metrics_of_others_are_read_past():
    request = otlp_of(*frames(3, loss=float))
    scope = request.resource_metrics[0].scope_metrics[1]
    scope.metrics[0].gauge.data_points[0].as_int = 1  # its step
    other = scope.metrics.add(name="http.server.duration")
    other.histogram.data_points.add(count=3, sum=1.5, bucket_counts=[1, 2])
    ((_, trainer),) = read(request).items()
    assert curve(trainer, "loss") == {0: 0.0, 1: 1.0, 2: 2.0}
    assert {key for _, key in trainer.curves} == {"step", "loss", CLOCK}


def test_how_a_run_ended_is_known_and_no_value_of_a_step():
    request = otlp_of(*frames(3, loss=float))
    scope = request.resource_metrics[0].scope_metrics.add()
    metric = scope.metrics.add(name="tolaria.run.ended", unit="{step}")
    point = metric.gauge.data_points.add(time_unix_nano=7, as_double=2.0)
    put(point.attributes, "esper.run.ended", "exception")
    put(point.attributes, "exception.type", "ValueError")
    reader = ColumnReader()
    trainer = TrainerCurves(Producer("run", 0, "one"))
    for _, block in reader.read(request.SerializeToString()):
        trainer.take_in(block)
    trainer.assemble_rest()
    assert reader.ends == {Producer("run", 0, "one"): "exception ValueError"}
    assert (trainer.lost, trainer.steps()[0]) == (0, 3)


def test_values_at_a_time_of_no_step_are_counted():
    request = otlp_of(*frames(3, loss=float))
    request.resource_metrics[0].scope_metrics[2].metrics[0].name = "another"
    ((_, trainer),) = read(request).items()
    assert trainer.steps()[0] == 2
    assert trainer.lost == 1


def test_the_resource_says_whose_they_are():
    request = otlp_of(*frames(1))
    attributes = request.resource_metrics[0].resource.attributes
    put(attributes, "service.name", "trainer")
    attributes.add(key="ok").value.bool_value = True
    attributes.add(key="negative").value.int_value = -3
    attributes.add(key="share").value.double_value = 0.25
    attributes.add(key="list").value.array_value.values.add(string_value="x")
    reader = ColumnReader()
    list(reader.read(request.SerializeToString()))
    found = reader.attributes[Producer("run", 0, "one")]
    assert found["service.name"] == "trainer"
    assert (found["ok"], found["negative"], found["share"]) == (True, -3, 0.25)
    assert found["list"] == ""


def test_more_layouts_of_one_size_than_are_kept(monkeypatch):
    monkeypatch.setattr("esper_otel.report.columns._MOST_ALIKE", 3)
    monkeypatch.setattr("esper_otel.report.columns._MOST_LAYOUTS", 10)
    seeds = [f"seed-{number:02}" for number in range(20)]
    made = frames(40, seeds=seeds, loss=float)
    ((_, trainer),) = read(otlp_of(*made[:20]), otlp_of(*made[20:])).items()
    for seed in seeds:
        assert curve(trainer, "kasmina.seed.alpha", seed) == {s: s / 40 for s in range(40)}


@given(st.binary(max_size=200))
def test_bytes_of_anything_are_refused_or_empty(data):
    try:
        for _, block in ColumnReader().read(b"\x0a" + bytes([len(data)]) + data + b"tolaria."):
            assert block.values.shape == (len(block.times), len(block.keys))
    except FieldError:
        pass


@pytest.mark.parametrize(
    "data", [b"\x0a", b"\x0a\x05ab", b"\xff" * 12, b"\x0b", b"\x09\x00", b"\x80"]
)
def test_a_message_that_ends_early_is_no_message(data):
    with pytest.raises(FieldError):
        list(fields(data, 0, len(data)))


def test_a_layout_knows_its_own_and_no_other():
    one, other = (
        otlp_of(frame).resource_metrics[0].scope_metrics[0].SerializeToString()
        for frame in (frames(1, loss=lambda s: 2.0)[0], frames(1, loss=lambda s: 5.0)[0])
    )
    alien = one.replace(b"tolaria.loss", b"tolaria.boss")
    rows = np.frombuffer(one + other + alien, np.uint8).reshape(3, -1)
    assert Layout(one).is_of(rows).tolist() == [True, True, False]


def test_an_attribute_without_a_value_is_empty():
    assert attribute(b"\x0a\x01k", 0, 3) == ("k", "")
