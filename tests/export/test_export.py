"""Exports, each opened by the library of the tool that it is for, and against the recording."""

import base64
import csv
import json
import math
import sys

import pytest
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from esper_otel.cli import main
from esper_otel.commands.recordings import FORMATS
from esper_otel.export import Format
from esper_otel.leyline.stages import Stage
from report.made import BEGAN_NS, JOURNAL, STEP_NS, frames, logs, recorded, spans

STEPS = 120
NAN_AT = 50
PHASES = {"input_wait_ms": 1.0, "forward_ms": 4.0, "backward_ms": 3.0, "optimizer_ms": 1.5}


def made(rank):
    """The steps of a rank, in the middle of which a loss is not finite and a seed grows up."""
    steps = frames(
        STEPS,
        rank=rank,
        instance=f"i{rank}",
        seeds=["seed-a"],
        loss=lambda s: None if s == NAN_AT else 2.0 / (1 + s),
        nonfinite=lambda s: float(s == NAN_AT),
        step_latency_ms=lambda s: 10.0,
        **{key: lambda s, ms=ms: ms for key, ms in PHASES.items()},
    )
    for frame in steps:
        stage = Stage.TRAINING if frame.step < 60 else Stage.BLENDING
        frame.seeds["seed-a"]["kasmina.seed.stage"] = float(stage)
    return steps


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Two ranks of a run, a seed, decisions of spans and of a journal, an event."""
    folder = tmp_path_factory.mktemp("recording")
    for rank in (0, 1):
        recorded(folder / f"run-rank{rank}.metrics.otlp", made(rank))
    spans(folder / "run-rank0.traces.otlp", "run", 30, 31, 100)
    logs(folder / "run-rank0.logs.otlp", "run", "seed-a", "It germinated.")
    (folder / "journal-000001.jsonl").write_text(JOURNAL)
    return folder


def exported(capsys, *arguments):
    """The files that a call names."""
    assert main(["export", *map(str, arguments)]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    return told.out.splitlines()


def recorded_values():
    """(rank, step, key) → value of all that was recorded; a seed's key is "seed key"."""
    found = {}
    for frame in (*made(0), *made(1)):
        for key, value in frame.values.items():
            found[frame.rank, frame.step, key] = value
        for seed, values in frame.seeds.items():
            for key, value in values.items():
                found[frame.rank, frame.step, f"{seed} {key}"] = value
    return {key: value for key, value in found.items() if key[2] != "step"}


def of_table(rows):
    """The same of the rows of a table, what is absent left out."""
    named = ("run", "rank", "seed", "step", "time")
    return {
        (int(row["rank"]), int(row["step"]), f"{row['seed'] or ''} {key}".lstrip()): float(
            value
        )
        for row in rows
        for key, value in row.items()
        if key not in named and value not in ("", None)
    }


def test_csv_holds_every_value_of_the_recording(recording, tmp_path, capsys):
    to = tmp_path / "run.csv"
    files = exported(capsys, recording, "--to", "csv", "-o", to)
    assert files == [str(tmp_path / f"run{more}.csv") for more in ("", ".decisions", ".events")]
    with to.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert of_table(rows) == recorded_values()
    assert {row["time"] for row in rows if row["step"] == "1"} == {
        "2026-09-21T14:13:20.020000Z"
    }
    with (tmp_path / "run.decisions.csv").open(newline="") as file:
        first, *others = csv.DictReader(file)
    assert first.items() >= {
        ("step", "30"),
        ("reason", "loss_spike"),
        ("applied", "true"),
        ("mode", "enforce"),
        ("outcome", "improved"),
    }
    assert json.loads(first["findings"])[0]["text"] == "The loss leapt."
    assert [row["step"] for row in others] == ["31", "100"]
    assert "It germinated." in (tmp_path / "run.events.csv").read_text()


def test_parquet_is_read_by_pyarrow_with_types(recording, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    to = tmp_path / "run.parquet"
    exported(capsys, recording, "--to", "parquet", "-o", to)
    table = parquet.read_table(to)
    assert of_table(table.to_pylist()) == recorded_values()
    types = {
        name: str(kind)
        for name, kind in zip(table.schema.names, table.schema.types, strict=True)
    }
    assert types["time"] == "timestamp[us, tz=UTC]"
    assert (types["step"], types["loss"]) == ("int64", "double")
    decisions = parquet.read_table(tmp_path / "run.decisions.parquet").to_pylist()
    assert [(d["step"], d["applied"]) for d in decisions] == [
        (30, True),
        (31, True),
        (100, True),
    ]


def test_tensorboard_reads_scalars_of_steps_and_seeds_and_decisions(
    recording, tmp_path, capsys
):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    exported(capsys, recording, "--to", "tensorboard", "-o", tmp_path / "logs")
    events = reader.EventAccumulator(
        str(tmp_path / "logs" / "run-rank0"), size_guidance={reader.SCALARS: 0}
    )
    events.Reload()
    expected = {
        (step, key): value for (rank, step, key), value in recorded_values().items() if not rank
    }
    for tag, key in (
        ("loss", "loss"),
        ("kasmina.seed.alpha/seed-a", "seed-a kasmina.seed.alpha"),
    ):
        for scalar in events.Scalars(tag):
            assert scalar.value == pytest.approx(expected.pop((scalar.step, key)), rel=1e-6)
            assert scalar.wall_time == (BEGAN_NS + (scalar.step + 1) * STEP_NS) / 1e9
        assert not [step for step, of in expected if of == key]
    told = events.Tensors("decisions")
    assert [one.step for one in told] == [30, 31, 100]
    assert b"PAUSE HIGH by loss_spike, applied" in told[0].tensor_proto.string_val[0]
    assert events.PluginTagToContent("text").keys() == {"decisions"}


@pytest.fixture
def trace(recording, tmp_path, capsys):
    """A trace in the classes of Perfetto: (names of tracks, parents, packets of events)."""
    types = pytest.importorskip(
        "perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="perfetto is not installed"
    )
    to = tmp_path / "run.perfetto-trace"
    exported(capsys, recording, "--to", "perfetto", "-o", to)
    packets = types.Trace.FromString(to.read_bytes()).packet
    tracks = {p.track_descriptor.uuid: p.track_descriptor for p in packets}
    events = [packet for packet in packets if packet.HasField("track_event")]
    assert {packet.trusted_packet_sequence_id for packet in packets} == {1}
    return types.TrackEvent, tracks, events


def way(tracks, uuid):
    """The names of a track and of those above it."""
    track = tracks[uuid]
    own = track.name or track.process.process_name
    return (*way(tracks, track.parent_uuid), own) if track.parent_uuid else (own,)


def slices(trace, *named):
    """(name, begin, end) of the slices on a track, in order of their ends."""
    kinds, tracks, events = trace
    found, open_ones = [], []
    for packet in events:
        event = packet.track_event
        if way(tracks, event.track_uuid) != named:
            continue
        if event.type == kinds.TYPE_SLICE_BEGIN:
            open_ones.append((event.name, packet.timestamp))
        elif event.type == kinds.TYPE_SLICE_END:
            found.append((*open_ones.pop(), packet.timestamp))
    assert not open_ones
    return found


def test_a_trace_has_ranks_as_processes_and_steps_with_their_phases(trace):
    for rank in (0, 1):
        found = slices(trace, f"run rank {rank}", "steps")
        steps = [one for one in found if one[0].startswith("step ")]
        assert [name for name, _, _ in steps] == [f"step {step}" for step in range(STEPS)]
        _, began, ended = steps[7]
        # Times of a recording are held to 256 ns.
        assert ended == pytest.approx(BEGAN_NS + 8 * STEP_NS, abs=256)
        assert ended - began == pytest.approx(10e6, abs=512)
        within = [one for one in found if began <= one[1] < ended and one not in steps]
        assert [name for name, _, _ in within] == [
            "input wait",
            "forward",
            "backward",
            "optimizer",
        ]
        lasted = [(end - start) / 1e6 for _, start, end in within]
        assert lasted == pytest.approx(list(PHASES.values()))
        assert within[0][1] == began


def test_a_trace_has_decisions_rules_and_seeds(trace):
    kinds, tracks, events = trace
    instants = [p for p in events if p.track_event.type == kinds.TYPE_INSTANT]
    decided = [
        packet
        for packet in instants
        if way(tracks, packet.track_event.track_uuid) == ("run rank 0", "decisions")
    ]
    assert [packet.track_event.name for packet in decided] == ["PAUSE: loss_spike"] * 3
    notes = {note.name: note for note in decided[0].track_event.debug_annotations}
    assert notes["applied"].bool_value is True
    assert notes["loss_spike"].string_value == "The loss leapt."
    assert notes["outcome"].string_value == "improved"
    assert decided[0].timestamp == pytest.approx(BEGAN_NS + 31 * STEP_NS, abs=256)
    ((state, began, ended),) = slices(trace, "run rank 0", "rules", "loss_spike")
    assert (state, ended - began) == ("firing", pytest.approx(10 * STEP_NS, abs=512))
    stages = slices(trace, "run rank 1", "seeds", "seed-a")
    assert [name for name, _, _ in stages] == ["TRAINING", "BLENDING"]
    assert ("run rank 0", "events") in {way(tracks, p.track_event.track_uuid) for p in instants}


def test_a_trace_has_a_counter_for_every_other_metric(trace):
    _, tracks, events = trace
    found = {}
    for packet in events:
        event = packet.track_event
        counters = zip(
            event.extra_double_counter_track_uuids,
            event.extra_double_counter_values,
            strict=True,
        )
        for uuid, value in counters:
            rank, key = way(tracks, uuid)
            found.setdefault((int(rank[-1]), key), []).append(value)
    values = recorded_values()
    for key in ("loss", "nonfinite", "step_latency_ms"):
        expected = [values[1, step, key] for step in range(STEPS) if (1, step, key) in values]
        assert found[1, key] == expected
    assert not {key for _, key in found} & {*PHASES}


def test_otlp_json_lines_are_the_requests_of_the_recording(recording, tmp_path, capsys):
    to = tmp_path / "run.jsonl"
    status = main(["export", str(recording), "--to", "otlp-json", "-o", str(to)])
    assert (status, capsys.readouterr().err) == (
        1,
        f"esper-otel: export: {recording}/journal-000001.jsonl: a journal is not OTLP, and is "
        "skipped\n",
    )
    lines = [json.loads(line) for line in to.read_text().splitlines()]
    kinds = [next(iter(line)) for line in lines]
    assert set(kinds) == {"resourceMetrics", "resourceLogs", "resourceSpans"}
    original = (recording / "run-rank0.metrics.otlp").read_bytes()
    first = ParseDict(lines[kinds.index("resourceMetrics")], ExportMetricsServiceRequest())
    assert first.SerializeToString() in original
    (span, *_) = lines[kinds.index("resourceSpans")]["resourceSpans"][0]["scopeSpans"][0][
        "spans"
    ]
    assert span["traceId"] == (b"t" * 16).hex()
    assert span["spanId"] == (b"s" * 8).hex()
    told = json.dumps(lines[kinds.index("resourceSpans")])
    for ids in (b"t" * 16, b"s" * 8):
        told = told.replace(ids.hex(), base64.b64encode(ids).decode())
    spans_request = ParseDict(json.loads(told), ExportTraceServiceRequest())
    assert (
        spans_request.SerializeToString() in (recording / "run-rank0.traces.otlp").read_bytes()
    )


def test_otlp_json_is_exported_again_as_it_is_and_read_by_other_exports(
    recording, tmp_path, capsys
):
    lines, again = tmp_path / "run.jsonl", tmp_path / "again.jsonl"
    metrics = recording / "run-rank1.metrics.otlp"
    exported(capsys, metrics, "--to", "otlp-json", "-o", lines)
    exported(capsys, lines, "--to", "otlp-json", "-o", again)
    assert again.read_bytes() == lines.read_bytes()
    exported(capsys, lines, "--to", "csv", "-o", tmp_path / "a.csv")
    exported(capsys, metrics, "--to", "csv", "-o", tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_only_some_steps(recording, tmp_path, capsys):
    for wanted, steps in (("10:12", {10, 11, 12}), ("118:", {118, 119}), (":1", {0, 1})):
        exported(
            capsys, recording, "--to", "csv", "--steps", wanted, "-o", tmp_path / "run.csv"
        )
        with (tmp_path / "run.csv").open(newline="") as file:
            assert {int(row["step"]) for row in csv.DictReader(file)} == steps


def test_a_long_run_is_not_thinned_out(tmp_path, capsys):
    steps = frames(40_000, loss=lambda s: math.sin(s) + s % 7)
    recorded(tmp_path / "long.metrics.otlp", steps, at_once=4000)
    exported(capsys, tmp_path / "long.metrics.otlp", "--to", "csv", "-o", tmp_path / "long.csv")
    with (tmp_path / "long.csv").open(newline="") as file:
        found = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    assert found == [(frame.step, frame.values["loss"]) for frame in steps]


def test_without_o_it_lies_here_under_the_name_of_the_run(
    recording, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    one = recording / "run-rank1.metrics.otlp"
    assert exported(capsys, one, "--to", "csv") == ["run-rank1.csv"]
    assert exported(capsys, one, "--to", "otlp-json") == ["run-rank1.otlp.jsonl"]


@pytest.mark.parametrize(
    ("to", "library"),
    [("parquet", "pyarrow"), ("tensorboard", "tensorboard"), ("perfetto", "perfetto")],
)
def test_a_library_that_is_missing_is_one_line(
    recording, tmp_path, capsys, monkeypatch, to, library
):
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["export", str(recording), "--to", to, "-o", str(tmp_path / "x")]) == 1
    told = capsys.readouterr()
    assert told.err == (
        f"esper-otel: export: --to {to} needs {library}: pip install 'esper-otel[export]'\n"
    )
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--to", "excel"], "invalid choice: 'excel'"),
        (["--to", "csv", "--steps", "7"], "7: expected FIRST:LAST, such as 100:200 or 100:"),
        (["--to", "csv", "--steps", "9:7"], "9:7: expected the first step before the last"),
    ],
)
def test_a_mistake_in_the_call(recording, capsys, given, told):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(recording), *given])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_what_cannot_be_exported_is_one_line_and_what_can_be_is_there(
    recording, tmp_path, capsys
):
    to = tmp_path / "run.csv"
    to.write_text("of before")
    empty = tmp_path / "empty.metrics.otlp"
    empty.touch()
    assert main(["export", str(empty), "--to", "csv", "-o", str(to)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"esper-otel: export: {empty}: byte 0: the file is empty"
    assert to.read_text() == "of before"
    cut = tmp_path / "cut.metrics.otlp"
    cut.write_bytes((recording / "run-rank0.metrics.otlp").read_bytes()[:-10])
    assert main(["export", str(cut), "--to", "csv", "-o", str(to)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; read up to there")
    assert len(to.read_text().splitlines()) > 100
    nowhere = tmp_path / "no" / "such" / "x.csv"
    assert main(["export", str(recording), "--to", "csv", "-o", str(nowhere)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No such file or directory" in line
    assert main(["export", str(tmp_path / "none"), "--to", "otlp-json", "-o", str(to)]) == 1
    assert "none: No such file or directory" in capsys.readouterr().err


def test_the_command_has_the_formats_that_there_are():
    assert {*FORMATS} == {*Format}
