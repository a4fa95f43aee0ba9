"""The report as a whole: what is in the page is what was recorded, whatever recorded it."""

import random
import re
import subprocess
import sys
from contextlib import suppress
from importlib.resources import files

import numpy as np
import pytest

from esper_otel.cli import main
from esper_otel.leyline.terminal import printable
from esper_otel.report import ReportError, page_of, write_report
from esper_otel.report.runs import runs_of
from esper_otel.report.sources import Archive
from report.made import JOURNAL, frames, logs, recorded, spans
from sidecar.frames_made import otlp_of
from sidecar.recorded_runs import FORMATS
from testkit.report_data import unpacked

CURVES = {
    "loss": lambda s: 1 / (1 + s),
    "gradient_norm": lambda s: 3.0 + np.sin(s),
    "lr_scale": lambda s: 1.0 if s < 30 else 0.5,
    "step_latency_ms": lambda s: 10.0 + s % 3,
    "forward_ms": lambda s: 3.0,
}


def report(tmp_path, *paths):
    """The data of the report of ``paths``, and its problems."""
    to = tmp_path / "out" / "report.html"
    to.parent.mkdir(exist_ok=True)
    problems = write_report(paths, to)
    return unpacked(to.read_text("utf-8")), problems


def curve_of(data, key, run=0, rank=0):
    curve = data["runs"][run]["ranks"][rank]["curves"][key]
    return dict(zip(curve["x"].tolist(), curve["y"].tolist(), strict=True))


@pytest.mark.parametrize("form", FORMATS)
def test_the_values_of_every_form_of_file_are_in_the_page(tmp_path, form):
    made = frames(60, seeds=["a"], **CURVES)
    path = tmp_path / "recording"
    path.write_bytes(FORMATS[form]([otlp_of(*made[:25]), otlp_of(*made[25:])]))
    data, problems = report(tmp_path, path)
    assert problems == []
    (run,) = data["runs"]
    assert (run["name"], run["ranks"][0]["count"]) == ("run", 60)
    for key in ("loss", "gradient_norm"):
        expected = {frame.step: np.float32(frame.values[key]) for frame in made}
        assert curve_of(data, key) == expected
    alpha = run["ranks"][0]["seeds"]["a"]["kasmina.seed.alpha"]
    assert alpha["y"].tolist() == [np.float32(step / 60) for step in range(60)]


def test_totals_are_exact(tmp_path):
    made = frames(60, **CURVES)
    data, _ = report(tmp_path, recorded(tmp_path / "run-rank0.metrics.otlp", made))
    count, total, least, at, most, most_at, first, last = data["runs"][0]["ranks"][0]["curves"][
        "loss"
    ]["total"]
    losses = [frame.values["loss"] for frame in made]
    assert (count, least, at, most, most_at) == (60, min(losses), 59, 1.0, 0)
    assert (first, last) == (losses[0], losses[-1])
    assert total == pytest.approx(sum(losses), rel=1e-12)


def test_what_stays_the_same_takes_two_points(tmp_path):
    data, _ = report(tmp_path, recorded(tmp_path / "r.metrics.otlp", frames(60, **CURVES)))
    assert curve_of(data, "lr_scale") == {0: 1.0, 29: 1.0, 30: 0.5, 59: 0.5}


def test_a_long_run_fits_and_keeps_its_extremes(tmp_path):
    rng = np.random.default_rng(1)
    noise = rng.random(3000)
    noise[1234], noise[2345] = 9.0, -9.0
    made = frames(3000, loss=lambda s: float(noise[s]))
    recorded(tmp_path / "in" / "r.metrics.otlp", made)
    archive = Archive()
    archive.read([tmp_path / "in"])
    page = page_of(runs_of(archive), {}, [], most=4000)
    assert len(page) < 140_000  # most of it is the chart library
    loss = curve_of(unpacked(page), "loss")
    assert len(loss) < 1500
    assert (loss[1234], loss[2345]) == (9.0, -9.0)


def test_phases_of_a_step_stay_together(tmp_path):
    rng = np.random.default_rng(2)
    noise = rng.random((3, 3000))
    keys = ("step_latency_ms", "forward_ms", "backward_ms")
    curves = {
        key: lambda s, row=row: float(row[s]) for key, row in zip(keys, noise, strict=True)
    }
    recorded(tmp_path / "in" / "r.metrics.otlp", frames(3000, **curves))
    archive = Archive()
    archive.read([tmp_path / "in"])
    data = unpacked(page_of(runs_of(archive), {}, [], most=8000))
    whole = curve_of(data, "step_latency_ms")
    assert len(whole) < 1500
    for place, key in enumerate(keys):
        curve = curve_of(data, key)
        assert whole.keys() <= curve.keys()
        assert all(curve[step] == np.float32(noise[place, step]) for step in whole)


def test_decisions_of_spans_are_told_with_their_values(tmp_path):
    recorded(tmp_path / "in" / "run-rank0.metrics.otlp", frames(60, **CURVES))
    spans(tmp_path / "in" / "run-rank0.traces.otlp", "run", 30, 31, 40)
    logs(tmp_path / "in" / "run-rank0.logs.otlp", "run", "seed-1", "It germinated.")
    data, problems = report(tmp_path, tmp_path / "in")
    assert problems == []
    (run,) = data["runs"]
    assert [row[:4] for row in run["decisions"]] == [[0, step, 0, 1.0] for step in (30, 31, 40)]
    assert run["decisions"][2][4:] == [8.5, 40.5]
    (template,) = run["templates"]
    assert template["findings"][0]["keys"] == ["loss", "baseline(loss)"]
    assert template["findings"][0]["text"] == "The loss leapt."
    assert run["rules"] == [
        [0, "loss_spike", "", "firing", 30, 32],
        [0, "loss_spike", "", "firing", 40, 41],
    ]
    assert run["happenings"] == [
        [5, 0, "esper.seed.stage", "WARNING", "It germinated.", "seed-1"]
    ]


def test_a_journal_tells_what_came_of_a_decision(tmp_path):
    recorded(tmp_path / "in" / "run-rank0.metrics.otlp", frames(60, **CURVES))
    spans(tmp_path / "in" / "run-rank0.traces.otlp", "run", 30)
    (tmp_path / "in" / "t.journal").mkdir()
    (tmp_path / "in" / "t.journal" / "journal-000001.jsonl").write_text(JOURNAL)
    data, problems = report(tmp_path, tmp_path / "in")
    assert problems == []
    (run,) = data["runs"]
    # One decision, of which the spans know that it was applied, and the journal the rest.
    assert run["decisions"] == [[0, 30, 0, 1.0, 0.5, 9.0]]
    after = run["aftermaths"]["0"]
    assert after["outcome"] == "improved"
    assert after["sentences"][:2] == [
        "loss is back to its earlier value",
        "none was left alone",
    ]
    assert after["values"] == {"loss": [0.5, 9.0, 0.4]}
    assert run["rules"] == [[0, "loss_spike", "", "firing", 30, 40]]
    assert data["rules"] == {"loss_spike": ["loss_delta above 2", "The loss leapt."]}


def test_a_journal_alone_makes_a_report(tmp_path):
    path = tmp_path / "journal-000001.jsonl"
    path.write_text(JOURNAL + '{"kind":"of tomorrow","rules":5}\n{"kind":"dec')
    data, problems = report(tmp_path, path)
    assert data["runs"][0]["ranks"] == []
    # That it was applied is in the report of what came of it.
    assert [row[1:4] for row in data["runs"][0]["decisions"]] == [[30, 0, 1.0]]
    assert problems == [f"{path}: 1 lines are not journal entries"]


def test_ranks_of_a_run_and_other_runs_are_laid_side_by_side(tmp_path):
    for rank in (1, 0):
        made = frames(20, rank=rank, instance=f"i{rank}", **CURVES)
        recorded(tmp_path / "in" / f"run-rank{rank}.metrics.otlp", made)
    recorded(tmp_path / "in" / "other-rank0.metrics.otlp", frames(10, run="other", **CURVES))
    data, problems = report(tmp_path, tmp_path / "in")
    assert problems == []
    assert [(run["name"], [r["rank"] for r in run["ranks"]]) for run in data["runs"]] == [
        ("other", [0]),
        ("run", [0, 1]),
    ]


def test_a_run_that_went_on_in_another_process_is_one(tmp_path):
    recorded(tmp_path / "in" / "a.metrics.otlp", frames(20, **CURVES))
    later = frames(20, first=20, instance="two", at_s=60, **CURVES)
    recorded(tmp_path / "in" / "b.metrics.otlp", later)
    data, problems = report(tmp_path, tmp_path / "in")
    assert problems == []
    ((rank,),) = (run["ranks"] for run in data["runs"])
    assert (rank["count"], rank["last"]) == (40, 39)
    assert list(curve_of(data, "loss")) == list(range(40))


def test_a_run_without_a_name_is_shown(tmp_path):
    data, _ = report(
        tmp_path, recorded(tmp_path / "a.metrics.otlp", frames(9, run="", **CURVES))
    )
    assert [run["name"] for run in data["runs"]] == ["(no run id)"]


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    recorded(tmp_path / "in" / "a.metrics.otlp", frames(20, **CURVES))
    again = frames(30, instance="two", at_s=60, **CURVES)
    recorded(tmp_path / "in" / "b.metrics.otlp", again)
    data, (problem,) = report(tmp_path, tmp_path / "in")
    assert problem == "run run: recorded 2 times under one name, shown as run (1) to (2)"
    assert [(run["name"], run["ranks"][0]["count"]) for run in data["runs"]] == [
        ("run (1)", 20),
        ("run (2)", 30),
    ]


HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; alert(1) //",
    "a\u202etxt.exe",
    "new\nline\x1b[31m\x00",
    "<!--",
    "${title}",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_becomes_markup(tmp_path, name):
    folder = tmp_path / "in"
    recorded(folder / "x.metrics.otlp", frames(5, run=name, seeds=[name], **CURVES))
    spans(folder / "x.traces.otlp", name, 3, rule=name, text=name)
    logs(folder / "x.logs.otlp", name, name, name)
    data, _ = report(tmp_path, folder)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert data["runs"][0]["name"] == name
    assert data["runs"][0]["templates"][0]["reason"] == name
    without_title = re.sub(r"<title>[^<]*</title>", "", page)
    assert "alert(1)" not in without_title
    assert "<img" not in page
    assert page.count("<script") == 4
    assert printable(name).isprintable()


def test_the_page_allows_itself_and_nothing_else(tmp_path):
    report(tmp_path, recorded(tmp_path / "r.metrics.otlp", frames(5, **CURVES)))
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src &#x27;none&#x27;; script-src &#x27;sha256-")
    assert "unsafe" not in policy
    found = set(re.findall(r"https?://[\w./-]+", page))
    assert found == {"https://github.com/leeoniya/uPlot", "http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.metrics.otlp", b"", "the file is empty"),
        ("text.txt", b"hello, this is no recording at all", "expected the size of a request"),
        ("x.json", b'{"a": 1}\n', "not an OTLP request"),
        ("x.metrics.otlp", b"\x00\x00\x00\x02\xff\xff", ""),
    ],
)
def test_what_is_no_recording_is_said_in_a_line(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    assert main(["report", str(path), "-o", str(tmp_path / "r.html")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("esper-otel: report: ")
    assert words in line
    assert not (tmp_path / "r.html").exists()


def test_a_recording_of_another_program_is_said_to_be_one(tmp_path):
    request = otlp_of(*frames(3))
    for scope in request.resource_metrics[0].scope_metrics:
        scope.metrics[0].name = "http.requests"
    path = tmp_path / "x.otlp"
    path.write_bytes(FORMATS["json"]([request]))
    with pytest.raises(ReportError, match=r"x\.otlp: it has no data of esper-otel"):
        write_report([path], tmp_path / "r.html")


def test_nothing_at_a_path_and_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=r"nowhere: No such file.*empty: a folder without"):
        write_report([tmp_path / "nowhere", tmp_path / "empty"], tmp_path / "r.html")


def test_a_recording_cut_anywhere_shows_what_came_before(tmp_path, capsys):
    whole = recorded(tmp_path / "r.metrics.otlp", frames(60, **CURVES), at_once=10)
    data = whole.read_bytes()
    for size in range(10, len(data), len(data) // 23):
        whole.write_bytes(data[:size])
        status = main(["report", str(whole), "-o", str(tmp_path / "r.html")])
        lines = capsys.readouterr().err.splitlines()
        assert status == 1
        assert all(line.startswith("esper-otel: report: ") for line in lines)
        if size > len(data) // 3:
            loss = curve_of(unpacked((tmp_path / "r.html").read_text("utf-8")), "loss")
            assert list(loss) == list(range(len(loss)))
            assert len(loss) >= 10


def test_whatever_bytes_are_changed_it_is_said_or_shown(tmp_path):
    folder = tmp_path / "in"
    recorded(folder / "r.metrics.otlp", frames(30, seeds=["a"], nonfinite=float, **CURVES))
    spans(folder / "r.traces.otlp", "run", 3, 4)
    logs(folder / "r.logs.otlp", "run", "a", "x")
    (folder / "journal-000001.jsonl").write_text(JOURNAL)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    chance = random.Random(0)
    for _ in range(40):
        for path, data in whole.items():
            changed = bytearray(data)
            for _ in range(chance.choice([1, 1, 3, 10])):
                place = chance.randrange(len(changed))
                if chance.random() < 0.7:
                    changed[place] = chance.randrange(256)
                else:
                    del changed[place : place + chance.randrange(1, 20)]
            path.write_bytes(changed)
        with suppress(ReportError):
            write_report([folder], tmp_path / "r.html")


def test_a_folder_of_other_files_takes_few_lines(tmp_path, capsys):
    for number in range(9):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.csv").write_text("step,loss\n1,2\n")
    to = str(tmp_path / "r.html")
    assert main(["report", str(tmp_path / "in"), "-o", to]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; and 4 more")
    recorded(tmp_path / "in" / "run.metrics.otlp", frames(5, **CURVES))
    assert main(["report", str(tmp_path / "in"), "-o", to]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[-1] == "esper-otel: report: 4 more are in the page"


def test_where_it_cannot_be_written_it_is_said(tmp_path, capsys):
    path = recorded(tmp_path / "r.metrics.otlp", frames(5, **CURVES))
    assert main(["report", str(path), "-o", str(tmp_path / "no" / "r.html")]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_the_command_names_the_file_and_shows_no_progress_in_a_pipe(tmp_path):
    path = recorded(tmp_path / "r.metrics.otlp", frames(5, **CURVES))
    done = subprocess.run(
        [sys.executable, "-m", "esper_otel", "report", str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "report.html\n", "")
    assert (tmp_path / "report.html").stat().st_size < 200_000


def test_progress_is_one_line_that_goes_again(monkeypatch, capsys):
    from esper_otel.leyline import terminal

    clock = iter(range(100))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(terminal.sys.stderr, "isatty", lambda: True, raising=False)
    shown = terminal.Progress("report", 2_000_000)
    shown.reached(500_000)
    shown.end()
    assert capsys.readouterr().err == "\rreport: 25% of 2 MB\x1b[K\r\x1b[K"


def test_the_chart_library_comes_with_its_licence():
    folder = files("esper_otel.report") / "page" / "uplot"
    assert "The MIT License" in (folder / "LICENSE").read_text("utf-8")
    assert "(v1.6.32)" in (folder / "uPlot.iife.min.js").read_text("utf-8")[:80]
