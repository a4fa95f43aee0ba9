"""The report that a run writes when it is over: from its own recording, or one kept for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from esper_otel.final_report import FinalReport, write_beside
from esper_otel.settings import EsperSettings
from esper_otel.stream import StreamReport
from esper_otel.summary import Summary
from report.made import frames, recorded
from testkit.patience import PATIENCE_S
from testkit.report_data import unpacked

SCRIPT = """
import esper_otel
run = esper_otel.start(mode="off")
for step in range(20):
    run.report(loss=1.0 / (1 + step))
    run.step()
run.close(0.1)
"""


def run_script(tmp_path, *command, **variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    (tmp_path / "tmp").mkdir(exist_ok=True)
    ours = {
        "ESPER_RUN_ID": "digits",
        "ESPER_SPOOL_DIR": str(tmp_path / "spool"),
        "ESPER_FLUSH_TIMEOUT_S": "0.1",
        "TMPDIR": str(tmp_path / "tmp"),
    }
    return subprocess.run(
        [sys.executable, *(command or ("-c", SCRIPT))],
        cwd=tmp_path,
        env=clean | ours | variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_run_writes_its_report_and_the_summary_names_it(tmp_path):
    done = run_script(tmp_path, ESPER_REPORT="run.html")
    assert done.returncode == 0
    assert "  report    run.html\n" in done.stderr
    assert "  recorded  " not in done.stderr
    data = unpacked((tmp_path / "run.html").read_text("utf-8"))
    (run,) = data["runs"]
    assert run["name"] == "digits"
    assert run["ranks"][0]["curves"]["loss"]["total"][0] == 20
    assert list((tmp_path / "tmp").glob("esper-report-*")) == []
    # The summary lies beside it, as ESPER_SUMMARY=json gives it.
    line = (tmp_path / "run.summary.json").read_text("utf-8")
    summary = msgspec.json.decode(line, type=Summary, strict=True)
    assert (summary.run, summary.rank, summary.steps, summary.last_loss) == (
        "digits",
        0,
        20,
        0.05,
    )
    assert (summary.page, summary.recordings) == ("run.html", [])
    assert set(json.loads(line)) == set(Summary.__struct_fields__)


def test_the_command_writes_it_where_it_was_called(tmp_path):
    (tmp_path / "train.py").write_text(f"import os\nos.chdir('tmp')\n{SCRIPT}")
    command = ("-m", "esper_otel", "run", "--report", "r.html", "--run-id", "x", "train.py")
    done = run_script(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert f"  report    {tmp_path / 'r.html'}\n" in done.stderr
    assert unpacked((tmp_path / "r.html").read_text("utf-8"))["runs"][0]["name"] == "x"


def test_a_recording_that_was_asked_for_stays(tmp_path):
    done = run_script(tmp_path, ESPER_REPORT="run.html", ESPER_RECORDING_DIR="kept")
    assert "  recorded  kept/digits-rank0.metrics.otlp" in done.stderr
    assert (tmp_path / "kept" / "digits-rank0.metrics.otlp").exists()
    assert (tmp_path / "run.html").exists()


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path):
    done = run_script(tmp_path, ESPER_REPORT="no/such/folder/run.html")
    assert done.returncode == 0
    assert "no report was made: " in done.stderr
    assert "esper-otel: run digits, 20 steps" in done.stderr


@pytest.mark.parametrize("given", [{}, {"report": "x.html", "rank": 1, "world_size": 2}])
def test_who_is_not_asked_makes_none(given):
    settings = EsperSettings(**given)
    final = FinalReport(settings)
    assert final.recorded(settings) is settings
    assert final.make(settings, "run", StreamReport()) == ""


FORKING = """
import os
import esper_otel
run = esper_otel.start(mode="off")
for step in range(9):
    run.report(loss=1.0)
    run.step()
if not os.fork():
    raise SystemExit
os.wait()
run.report(loss=2.0)
run.step()
run.close(0.1)
"""


def test_a_forked_child_leaves_its_parents_report_alone(tmp_path):
    done = run_script(tmp_path, "-c", FORKING, ESPER_REPORT="run.html")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("  report    run.html\n") == 1
    (run,) = unpacked((tmp_path / "run.html").read_text("utf-8"))["runs"]
    assert run["ranks"][0]["curves"]["loss"]["total"][0] == 10


def test_a_process_without_a_step_writes_none(tmp_path):
    script = "import esper_otel; esper_otel.start(mode='off').close(0.1)"
    done = run_script(tmp_path, "-c", script, ESPER_REPORT="run.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "run.html").exists()
    assert list((tmp_path / "tmp").glob("esper-report-*")) == []


def test_other_ranks_that_recorded_there_are_in_it(tmp_path):
    made = [frames(9, rank=rank, instance=f"i{rank}", loss=float) for rank in (0, 1)]
    paths = [
        recorded(tmp_path / f"run-rank{rank}.metrics.otlp", some)
        for rank, some in enumerate(made)
    ]
    to = tmp_path / "r.html"
    settings = EsperSettings(report=str(to), recording_dir=str(tmp_path), world_size=3)
    final = FinalReport(settings)
    assert final.make(settings, "run", StreamReport(recordings=(paths[0],))) == str(to)
    (run,) = unpacked(to.read_text("utf-8"))["runs"]
    assert [rank["rank"] for rank in run["ranks"]] == [0, 1]


def test_every_key_of_the_summary_is_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text("utf-8")
    told = page.partition("## The summary in JSON")[2].partition("\n## ")[0]
    keys = "".join(line.split("|")[1] for line in told.splitlines() if line.startswith("| `"))
    assert sorted(re.findall("`(.+?)`", keys)) == sorted(Summary.__struct_fields__)


NOTEBOOK = """
import os, sys, types
sys.stdout.reconfigure(line_buffering=True)  # what is held back a fork would print as well
sys.modules["ipykernel"] = types.ModuleType("ipykernel")  # as the kernel of a notebook has it
import esper_otel
run = esper_otel.start(mode="off", run_id="<b>note</b>")
print(run._repr_html_())
try:
    run.report_html()
except RuntimeError as error:
    print(error)
for step in range(20):
    run.report(loss=1.0 / (1 + step))
    run.step()
while run.totals.steps < 20:
    pass
print(run._repr_html_())
run.close(0.1)
page = run.report_html()
open("page.html", "w").write(page)
print(len(os.listdir(os.environ["TMPDIR"])))
if not os.fork():
    sys.exit()
os.wait()
print(len(os.listdir(os.environ["TMPDIR"])))
"""


def test_a_run_in_a_notebook_shows_itself_and_makes_its_report(tmp_path):
    done = run_script(tmp_path, "-c", NOTEBOOK)
    assert done.returncode == 0, done.stderr
    first, refused, card, *kept = done.stdout.splitlines()
    assert first == "<div><b>&lt;b&gt;note&lt;/b&gt;</b>: no step yet</div>"
    assert refused.startswith("this run has no recording for a report: expected ")
    assert card.startswith("<div><b>&lt;b&gt;note&lt;/b&gt;</b>: 20 steps, loss 1 → 0.05")
    assert kept == ["1", "1"]
    assert list((tmp_path / "tmp").iterdir()) == []  # it goes with the process
    (run,) = unpacked((tmp_path / "page.html").read_text("utf-8"))["runs"]
    assert run["ranks"][0]["curves"]["loss"]["total"][0] == 20
    assert "  recorded  " not in done.stderr


def test_a_summary_that_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "run.summary.json").mkdir()
    write_beside(tmp_path / "run.html", "{}")
    assert "no summary was written beside the report: " in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["run.summary.json"]
