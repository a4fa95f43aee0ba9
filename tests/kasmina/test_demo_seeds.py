"""The demo's table of seeds, made from a recording while it is being written."""

from io import StringIO

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.otlp_file import framed
from esper_otel.leyline.stages import Stage

pytest.importorskip("rich")

from rich.console import Console

from examples.demo_seeds import Growing


def gauge(metrics, name, value, seed_id=""):
    point = metrics.add(name=name).gauge.data_points.add(as_double=value)
    if seed_id:
        point.attributes.add(key="seed_id").value.string_value = seed_id


def recorded(step, **seeds):
    """One step as it lies in the file, with the stage and alpha of each seed."""
    request = ExportMetricsServiceRequest()
    metrics = request.resource_metrics.add().scope_metrics.add().metrics
    gauge(metrics, "tolaria.step", step)
    gauge(metrics, "tolaria.loss_ewma", 0.25)
    for seed_id, (stage, alpha) in seeds.items():
        gauge(metrics, "kasmina.seed.stage", stage, seed_id)
        gauge(metrics, "kasmina.seed.alpha", alpha, seed_id)
    return framed(request.SerializeToString())


@pytest.fixture
def shows(tmp_path):
    """Appends bytes to the recording and gives the table's rows, in words."""
    path = tmp_path / "grow.otlp"
    growing = Growing(path)

    def show(written):
        with path.open("ab") as file:
            file.write(written)
        growing.read()
        console = Console(width=200, file=StringIO())
        console.print(growing.picture())
        rows = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
        return {row[0]: row[1:] for row in rows if row and row[0] in growing.seeds}

    return show


def test_each_seed_s_stage_and_alpha_are_shown_as_they_move(shows):
    first = shows(recorded(7, a=(Stage.TRAINING, 0.0)))
    assert first == {"a": ["TRAINING", "0.00", "training", "7"]}
    seeds = {"a": (Stage.BLENDING, 0.5), "b": (Stage.GERMINATED, 0.0)}
    second = shows(recorded(8, **seeds))
    assert second["a"][:3] == ["BLENDING", "0.50", "█" * 6]
    assert second["a"][-2:] == ["blending", "8"]
    assert second["b"] == ["GERMINATED", "0.00", "germinated", "8"]


def test_a_seed_that_stopped_reporting_was_culled(shows):
    shows(recorded(7, a=(Stage.TRAINING, 0.0)) + recorded(8) + recorded(9))
    assert shows(recorded(10))["a"][0] == "culled"


def test_a_request_that_is_still_being_written_waits(shows):
    whole = recorded(8, a=(Stage.BLENDING, 0.25))
    shows(recorded(7, a=(Stage.TRAINING, 0.0)))
    for end in range(1, len(whole)):
        assert shows(whole[end - 1 : end])["a"][0] == "TRAINING"
    assert shows(whole[-1:])["a"][:2] == ["BLENDING", "0.25"]
