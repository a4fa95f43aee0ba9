"""What a script reports and says of its run, as a report has it."""

import re

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from esper_otel.leyline.events import CONFIGURED
from esper_otel.leyline.metrics import RUN_ID
from esper_otel.leyline.otlp_file import framed
from esper_otel.report import write_report
from report.made import BEGAN_NS, STEP_NS, frames, recorded
from sidecar.frames_made import add_point, otlp_of, put
from testkit.report_data import unpacked


def data_of(tmp_path, *paths):
    to = tmp_path / "out.html"
    problems = write_report(paths, to)
    assert problems == []
    text = to.read_text("utf-8")
    return unpacked(text), re.search("<title>(.*?)</title>", text)[1]


def curves_of(data, key):
    return [
        dict(zip(curves[key]["x"].tolist(), curves[key]["y"].tolist(), strict=True))
        for run in data["runs"]
        for curves in (rank["curves"] for rank in run["ranks"])
        if key in curves
    ]


def config(path, run, **values):
    request = ExportLogsServiceRequest()
    group = request.resource_logs.add()
    put(group.resource.attributes, RUN_ID, run)
    record = group.scope_logs.add().log_records.add(
        event_name=CONFIGURED, time_unix_nano=BEGAN_NS, severity_number=9
    )
    record.body.string_value = "2 hyper-parameters"
    for key, value in values.items():
        put(record.attributes, f"esper.config.{key}", value)
    put(record.attributes, "other", "x")
    with path.open("ab") as file:
        file.write(framed(request.SerializeToString()))


def every(steps, of):
    return lambda step: of(step) if step % steps == 0 and step else None


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_evaluations_are_at_the_step_that_was_measured_and_others_at_their_own(
    tmp_path, at_once
):
    own = {"custom.kl": every(2, float), "custom.val_loss": every(10, lambda s: 1 / s)}
    made = frames(40, loss=float, **own)
    data, _ = data_of(tmp_path, recorded(tmp_path / "run.metrics.otlp", made, at_once))
    assert curves_of(data, "custom.kl") == [{s: float(s) for s in range(2, 40, 2)}]
    (evaluated,) = curves_of(data, "custom.val_loss")
    assert list(evaluated) == [9, 19, 29]
    assert data["metrics"]["custom.val_loss"]["evaluation"] is True
    assert data["metrics"]["custom.kl"]["evaluation"] is False


def test_one_before_the_first_step_and_one_behind_the_last_have_a_place(tmp_path):
    own = {"custom.val_loss": lambda step: 5.0 if step == 1 else None}
    made = frames(9, first=1, **own)
    path = recorded(tmp_path / "run.metrics.otlp", made)
    request = otlp_of(made[-1])
    scope = request.resource_metrics[0].scope_metrics
    del scope[:]
    end = BEGAN_NS + 100 * STEP_NS
    point = add_point(scope.add(), "custom.val_loss", end, 0.5)
    assert point.attributes
    with path.open("ab") as file:
        file.write(framed(request.SerializeToString()))
    data, _ = data_of(tmp_path, path)
    assert curves_of(data, "custom.val_loss") == [{0: 5.0, 9: 0.5}]


def test_a_step_that_was_not_finite_makes_no_gap_in_what_was_not_due(tmp_path):
    own = {"custom.val_loss": every(10, float), "nonfinite": lambda s: float(s == 15)}
    made = frames(30, loss=lambda s: None if s == 15 else 1.0, **own)
    data, _ = data_of(tmp_path, recorded(tmp_path / "run.metrics.otlp", made))
    assert list(curves_of(data, "custom.val_loss")[0]) == [9, 19]


def test_names_are_data_and_what_is_no_value_of_ours_is_passed_over(tmp_path):
    hostile = "custom.</script><b>val_loss"
    made = frames(5, loss=float, **{hostile: float})
    request = otlp_of(made[0])
    add_point(request.resource_metrics[0].scope_metrics[0], "tolaria.custom", 7, 1.0)
    path = recorded(tmp_path / "run.metrics.otlp", made)
    with path.open("ab") as file:
        file.write(framed(request.SerializeToString()))
    data, _ = data_of(tmp_path, path)
    assert hostile in data["metrics"]
    assert {key for key in data["metrics"] if key.startswith("custom.")} == {hostile}


def test_name_tags_and_config_are_settings_and_the_name_is_in_the_title(tmp_path):
    paths = []
    for run, rate in (("one", "0.1"), ("two", "0.2")):
        path = tmp_path / f"{run}-rank0.metrics.otlp"
        request = otlp_of(*frames(4, run=run, instance=run, loss=float))
        attributes = request.resource_metrics[0].resource.attributes
        put(attributes, "esper.run.name", "base")
        put(attributes, "esper.run.tag.team", "vision")
        path.write_bytes(framed(request.SerializeToString()))
        config(tmp_path / f"{run}-rank0.logs.otlp", run, lr="7", depth="3")
        config(tmp_path / f"{run}-rank0.logs.otlp", run, lr=rate)
        paths.append(path)
    data, title = data_of(tmp_path, *paths)
    assert title == "base (one), base (two) · esper-otel report"
    first, second = data["runs"]
    assert (first["name"], first["title"]) == ("one", "base (one)")
    told = {
        k: v for k, v in second["settings"].items() if k.startswith(("esper.run.", "esper.c"))
    }
    assert told == {
        "esper.run.name": "base",
        "esper.run.tag.team": "vision",
        "esper.config.lr": "0.2",
        "esper.config.depth": "3",
    }
    assert first["happenings"] == []


def test_the_card_of_a_run_at_home_is_no_part_of_it(tmp_path):
    recorded(tmp_path / "home" / "run-rank0.metrics.otlp", frames(4, loss=float))
    for name in ("run.json", "run-attempt2.json"):
        (tmp_path / "home" / name).write_text("{}")
    data, _ = data_of(tmp_path, tmp_path / "home")
    assert [run["name"] for run in data["runs"]] == ["run"]
