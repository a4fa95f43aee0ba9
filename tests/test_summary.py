"""The summary at the end of a run: of what was recorded, for people and for machines."""

import json
import os
import subprocess
import sys
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest

from esper_otel.leyline.decisions import FAILED_OPEN, Action, Decision, Severity, unanswered
from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.settings import EsperSettings, Summaries
from esper_otel.stream import Account, StreamReport
from esper_otel.stream.totals import MOST_TOTALS, PARTS, LossCurve, RunTotals, shortened
from esper_otel.summary import summary_of, tell_summary
from esper_otel.tolaria.restoring import SnapshotReport
from testkit.fork_server import fork_server
from testkit.patience import PATIENCE_S

ESPER = str(Path(sys.executable).with_name("esper-otel"))

SCRIPT = """
import sys, torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(int(sys.argv[1])):
    optimizer.zero_grad()
    model(torch.ones(4, 2)).square().mean().backward()
    optimizer.step()
print("done", file=sys.stderr)
"""

FORKING = """
import os, sys, time, esper_otel
run = esper_otel.start(mode="off", stream_interval_ms=1.0)
run.step()
while not run._stream.totals.steps:
    time.sleep(0.001)
class Agreement:
    def close(self):
        print("left the others", file=sys.stderr)
run._sharing.agreement = Agreement()
if os.fork() == 0:
    sys.exit()
os.wait()
print("done", file=sys.stderr)
"""


def rows(*values):
    array = np.full((len(values), len(STEP_KEYS)), nan)
    for row, given in zip(array, values, strict=True):
        for key, value in given.items():
            row[STEP_SLOT[key]] = value
    return array


def tally_of(*values):
    totals = RunTotals()
    for i, row in enumerate(values):
        totals.add(np.array([10**9 * (i + 1)]), rows(row))
    return totals


def timeline(decision, applied=False):
    return StepTimeline(1, 0, 1, [], decision=decision, applied=applied)


def test_means_are_over_the_steps_that_had_a_value_and_parts_over_all():
    totals = tally_of(
        {"loss": 4.0, "forward_ms": 2.0},
        {"loss": 2.0, "forward_ms": 4.0, "step_latency_ms": 9.0, "nonfinite": 0.0},
        {"nonfinite": 2.0, "step_latency_ms": 11.0},
    )
    summary = summary_of("r", 0, totals, StreamReport())
    assert (summary.steps, summary.seconds) == (3, 2.0)
    assert summary.step_ms == 10.0
    assert summary.phases == {"forward": 2.0}
    assert summary.slowest == "forward"
    assert (summary.first_loss, summary.last_loss) == (4.0, 2.0)
    assert summary.nonfinite_steps == 1


def test_decisions_are_counted_and_what_was_applied_of_them():
    totals = tally_of({})
    spike = Decision("d", "r", 1, 1, Action.PAUSE, Severity.HIGH, "loss_spike")
    for applied in (True, False, True):
        totals.count_decision(timeline(spike, applied))
    totals.count_decision(timeline(unanswered("r", 1, "timeout")))
    totals.count_decision(timeline(None))
    summary = summary_of("r", 0, totals, StreamReport())
    (told,) = summary.decisions
    assert (told.action, told.reason, told.times, told.applied) == ("PAUSE", "loss_spike", 3, 2)
    assert summary.unanswered == ["timeout"]
    assert "PAUSE loss_spike × 3 (2 applied)" in summary.as_text()
    assert "did not answer (no answer within the deadline)" in summary.as_text()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            SnapshotReport(
                taken=12,
                good_step=1200,
                bytes=3_210_000,
                copy_ms=0.45678,
                restored=[(900, 1003)],
                refused={"no snapshot is good yet": 2},
            ),
            "snapshots 12 made in 0.457 ms each, good: the last of step 1,200; they take "
            "3.21 MB of host memory; step 900 restored at step 1,003; requested and not "
            "restored × 2: no snapshot is good yet",
        ),
        (SnapshotReport(0, None, 0, 0.0, [], {}), "snapshots none made"),
        (
            SnapshotReport(0, None, 0, 0.0, [], {"no snapshots are kept": 1}),
            "snapshots requested and not restored × 1: no snapshots are kept",
        ),
    ],
)
def test_what_became_of_snapshots_is_told(told, said):
    summary = summary_of("r", 0, tally_of({}), StreamReport(), snapshots=told)
    assert f"  {said}\n" in summary.as_text()
    assert "snapshots" not in summary_of("r", 0, tally_of({}), StreamReport()).as_text()


def test_updates_that_decisions_left_out_are_counted():
    totals = tally_of({"update_skipped": 1.0}, {"update_skipped": 0.0}, {"update_skipped": 1.0})
    summary = summary_of("r", 0, totals, StreamReport())
    assert summary.skipped_updates == 2
    assert "  updates   2 skipped by decisions\n" in summary.as_text()
    none = summary_of("r", 0, tally_of({"update_skipped": 0.0}, {}), StreamReport())
    assert none.skipped_updates == 0
    assert "skipped" not in none.as_text()


@pytest.mark.parametrize(
    ("rows_of", "unjudged", "held", "said"),
    [
        ([{"unjudged_steps": 0.0, "lr_scale": 1.0}], 0, 0, None),
        ([{}], 0, 0, None),
        (
            [{"unjudged_steps": float(step), "lr_scale": 1.0} for step in (0, 1, 2, 0)],
            2,
            0,
            "did not answer for 2 steps",
        ),
        (
            [{"unjudged_steps": float(step), "lr_scale": 0.25} for step in (0, 1, 2, 3)]
            + [{"unjudged_steps": 0.0, "lr_scale": 0.25}],
            3,
            3,
            "did not answer for 3 steps; for 3 of them the learning rate stayed scaled",
        ),
    ],
)
def test_how_long_nobody_judged_and_what_was_held_meanwhile(rows_of, unjudged, held, said):
    summary = summary_of("r", 0, tally_of(*rows_of), StreamReport())
    assert (summary.unjudged_steps, summary.held_unjudged_steps) == (unjudged, held)
    text = summary.as_text()
    assert said in text if said else "Tamiyo" not in text
    assert json.loads(summary.as_json())["held_unjudged_steps"] == held


def test_updates_that_decisions_changed_before_they_were_made_are_told_apart_from_steps():
    totals = tally_of(
        {"lr_scale": 1.0, "update_skipped": 0.0},
        {"lr_scale": 0.25, "update_skipped": 0.0},
        {"lr_scale": 0.25, "update_skipped": 1.0},
        {},
    )
    update = Decision("d", "r", 1, 1, Action.OPTIMIZER, Severity.HIGH, "gradient_exploding")
    totals.count_decision(timeline(unanswered("r", 1, "nominal"))._replace(update=update))
    totals.count_decision(timeline(None)._replace(update=update))
    summary = summary_of("r", 0, RunTotals.sum_of([totals]), StreamReport())
    assert summary.decisions == []  # none was one about a step
    assert summary.before_updates == {"gradient_exploding": 2}
    assert (summary.scaled_updates, summary.skipped_updates) == (1, 1)
    text = summary.as_text()
    assert "  decided   gradient_exploding × 2 before an update\n" in text
    assert "  updates   1 made with a scaled learning rate, 1 skipped by decisions\n" in text
    assert json.loads(summary.as_json())["before_updates"] == {"gradient_exploding": 2}


def test_the_loss_is_drawn_from_its_first_to_its_last_value():
    falling = tally_of(*({"loss": 8.0 - step} for step in range(8)))
    summary = summary_of("r", 0, falling, StreamReport())
    assert summary.as_text().splitlines()[1] == "  loss      █▇▆▅▄▃▂▁ 8 → 1"
    assert json.loads(summary.as_json())["losses"] == [8.0 - step for step in range(8)]


def test_what_was_no_finite_loss_is_a_mark_in_the_curve_and_what_is_not_known_a_gap():
    values = [{"loss": 2.0}, {}, {"nonfinite": 1.0}, {"loss": 1.0}]
    summary = summary_of("r", 0, tally_of(*values), StreamReport())
    assert "  loss      █ ×▁ 2 → 1" in summary.as_text()
    assert json.loads(summary.as_json())["losses"] == [2.0, None, None, 1.0]


def test_the_curve_of_a_long_run_is_as_small_as_that_of_a_short_one():
    curve, every = LossCurve(), np.arange(100_000, dtype=float)
    whole = np.zeros(len(every), bool)
    for start in range(0, len(every), 1000):
        curve.extend(every[start : start + 1000], whole[start : start + 1000])
    at_once = LossCurve()
    at_once.extend(every, whole)
    assert curve.means(PARTS) == at_once.means(PARTS)
    means = curve.means(24)
    assert 12 <= len(means) <= 24
    assert means == sorted(means)
    width = means[1] - means[0]  # each is the mean of as many steps
    assert means[0] == (width - 1) / 2


@pytest.mark.parametrize(
    ("forward_ms", "said"), [(6.0, ", most of it forward: "), (4.0, " ms: forward 4 (40%)")]
)
def test_a_phase_is_most_of_a_step_only_when_it_is(forward_ms, said):
    totals = tally_of({}, {"step_latency_ms": 10.0, "forward_ms": forward_ms})
    assert said in summary_of("r", 0, totals, StreamReport()).as_text()


def advice(totals, report=None):
    lines = summary_of("r", 0, totals, report or StreamReport()).as_text().splitlines()
    return [line.removeprefix("  next      ") for line in lines if line.startswith("  next")]


def test_what_to_do_next_is_said_where_something_is_wrong_and_only_there():
    steps = [{"step_latency_ms": 100.0, "input_wait_ms": 20.0}] * 30
    fine = tally_of(*steps)
    assert advice(fine) == []
    starved = tally_of(*({**step, "input_wait_ms": 60.0} for step in steps))
    (told,) = advice(starved)
    assert "waits for data for 60% of its time: more workers" in told
    alone = tally_of(*steps)
    alone.count_decision(timeline(unanswered("r", 1, "breaker_open")))
    (told,) = advice(alone, StreamReport(files=()))
    assert told.startswith("is the sidecar running? `tamiyo serve` starts it")
    assert advice(fine, StreamReport(files=(Path("left.otlp"),))) == [
        "esper-otel resend left.otlp"
    ]
    assert advice(tally_of(*steps[:2], {"unjudged_steps": 1.0})) == [
        "`tamiyo status` shows the health of the sidecar and its answer times"
    ]


def test_waiting_for_data_in_a_run_of_a_moment_is_not_worth_a_word():
    assert advice(tally_of({}, {"step_latency_ms": 2.0, "input_wait_ms": 1.5})) == []


@pytest.mark.parametrize("why", sorted(FAILED_OPEN))
def test_people_read_why_nobody_judged_in_words(why):
    totals = tally_of({})
    totals.count_decision(timeline(unanswered("r", 1, why)))
    text = summary_of("r", 0, totals, StreamReport()).as_text()
    assert "did not answer (" in text
    assert why not in text


def test_what_a_receiver_rejects_is_said_as_that():
    report = StreamReport(
        metrics=Account(produced=10, delivered=7, dropped=3, refused=3),
        traces=Account(produced=30, dropped=30, refused=30),
    )
    text = summary_of("r", 0, tally_of({}), report).as_text()
    assert "7 of 10 points sent, 3 rejected by the receiver;" in text
    assert "0 of 30 spans sent, 30 rejected by the receiver: it does not accept traces" in text


def test_what_was_lost_and_what_waits_is_said():
    report = StreamReport(
        metrics=Account(produced=1000, delivered=700, spooled=200, dropped=100),
        files=(Path("left.otlp"),),
        recordings=(Path("all.otlp"),),
    )
    text = summary_of("r", 0, tally_of({}), report).as_text()
    assert "700 of 1,000 points sent, 100 DROPPED" in text
    assert "esper-otel resend left.otlp" in text
    assert "recorded  all.otlp" in text


def test_values_that_a_device_did_not_deliver_are_told():
    lost = summary_of("r", 0, tally_of({}), StreamReport(), lost_values=1200)
    assert "  lost      1,200 values could not be read without waiting" in lost.as_text()
    assert json.loads(lost.as_json())["lost_values"] == 1200
    none = summary_of("r", 0, tally_of({}), StreamReport())
    assert "could not be read" not in none.as_text()


@pytest.mark.parametrize(
    ("settings", "totals"),
    [
        (EsperSettings(rank=1, world_size=2), tally_of({})),
        (EsperSettings(summary=Summaries.OFF), tally_of({})),
        (EsperSettings(), None),
    ],
    ids=["another rank", "silenced", "nothing recorded"],
)
def test_where_there_is_no_summary_the_log_tells_of_them(settings, totals, caplog, capfd):
    for lost in (0, 3):
        tell_summary(settings, "r", totals, StreamReport(), lost_values=lost)
    (told,) = caplog.messages
    assert told.startswith("esper-otel: 3 values could not be read")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("bad", [inf, -inf])
def test_json_stays_json(bad):
    summary = summary_of("r", 0, tally_of({"loss": bad}), StreamReport())
    assert json.loads(summary.as_json())["run"] == "r"


def prepared(tmp_path, script):
    """Where a script lies now, and its environment."""
    (tmp_path / "train.py").write_text(script)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    env = clean | {"ESPER_SPOOL_DIR": str(tmp_path), "OTEL_METRICS_EXPORTER": "none"}
    env |= {"OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none", "ESPER_MODE": "off"}
    return {"cwd": tmp_path, "env": env, "timeout": PATIENCE_S}


def run(tmp_path, *options, steps=5):
    pytest.importorskip("torch")
    command = [ESPER, "run", *options, "train.py", str(steps)]
    done = fork_server().run(command, **prepared(tmp_path, SCRIPT))
    done.check_returncode()
    return done


def test_a_run_ends_with_its_summary_behind_the_output_of_the_script(tmp_path):
    done = run(tmp_path, "--run-id", "mine")
    first, summary = done.stderr.split("\n", 1)
    assert (first, done.stdout) == ("done", "")
    assert summary.startswith("esper-otel: run mine, 5 steps in ")


def test_machines_get_one_line(tmp_path):
    told = json.loads(run(tmp_path, "--json").stderr.splitlines()[-1])
    assert told["steps"] == 5
    assert told["slowest"] in told["phases"]


def test_nothing_is_added_when_there_is_nobody_to_hear(tmp_path):
    assert run(tmp_path, "--quiet").stderr == "done\n"


def test_a_process_without_a_step_says_so_in_one_line_and_why(tmp_path):
    done, told = run(tmp_path, steps=0).stderr.splitlines()
    assert done == "done"
    assert told.startswith(
        "esper-otel: nothing was recorded: no optimizer of torch has stepped"
    )


def test_a_forked_child_that_ends_as_python_does_tells_nothing_and_closes_nothing(tmp_path):
    command, where = [sys.executable, "train.py"], prepared(tmp_path, FORKING)
    done = subprocess.run(command, **where, capture_output=True, text=True, check=True)
    said = done.stderr
    first, second, summary = said.split("\n", 2)
    assert (first, second) == ("done", "left the others")
    assert summary.startswith("esper-otel: run ")
    assert summary.count("esper-otel: run ") == 1


def several(count):
    others = []
    for nth in range(2, count + 1):
        totals = tally_of(
            {"loss": 2.0, "nonfinite": 0.0},
            {"loss": 1.0 / nth, "step_latency_ms": 4.0, "forward_ms": 1.0, "nonfinite": 1.0},
        )
        totals.complete = True
        totals.count_decision(timeline(decision(Action.PAUSE, "a_rule"), applied=True))
        others.append((f"r-{nth}", totals))
    return others


def decision(action, reason):
    return Decision("r/1", "r", 1, 1, action, Severity.HIGH, reason)


def test_several_trainings_are_one_summary_with_a_line_for_each_of_the_first():
    first = tally_of({"loss": 9.0}, {"loss": 3.0, "step_latency_ms": 2.0, "forward_ms": 1.0})
    summary = summary_of("r", 0, first, StreamReport(), others=several(7))
    assert (summary.steps, summary.nonfinite_steps) == (14, 6)
    assert summary.step_ms == pytest.approx((2.0 + 6 * 4.0) / 7)
    assert (summary.first_loss, summary.last_loss) == (None, None)
    assert [(each.action, each.times, each.applied) for each in summary.decisions] == [
        ("PAUSE", 6, 6)
    ]
    head, _, *trainings = summary.as_text().splitlines()
    assert head == "esper-otel: run r, 7 trainings, 14 steps in 1.0 s"
    assert trainings[:6] == [
        "  training  r: 2 steps, loss 9 → 3, 2 ms a step",
        "  training  r-2: 2 steps, loss 2 → 0.5, 4 ms a step, 1 decision",
        "  training  r-3: 2 steps, loss 2 → 0.3333, 4 ms a step, 1 decision",
        "  training  r-4: 2 steps, loss 2 → 0.25, 4 ms a step, 1 decision",
        "  training  r-5: 2 steps, loss 2 → 0.2, 4 ms a step, 1 decision",
        "  training  2 more: 4 steps, 4 ms a step, 2 decisions",
    ]
    told = json.loads(summary.as_json())["trainings"]
    assert [each["run"] for each in told] == ["r", "r-2", "r-3", "r-4", "r-5", ""]


def test_one_training_has_no_line_of_its_own():
    summary = summary_of("r", 0, tally_of({"loss": 1.0}), StreamReport())
    assert summary.trainings == []
    assert "training" not in summary.as_text()


def test_of_very_many_trainings_those_that_are_over_are_added_up():
    totals = several(MOST_TOTALS + 2)
    totals[200][1].complete = False
    kept = shortened(totals)
    assert len(kept) == MOST_TOTALS // 4 + 2
    assert sum(each.runs for _, each in kept) == MOST_TOTALS + 1
    assert sum(each.steps for _, each in kept) == 2 * (MOST_TOTALS + 1)
    assert kept[-1] == totals[200]
    summary = summary_of("r", 0, tally_of({"loss": 1.0}), StreamReport(), others=kept)
    assert summary.trainings[-1].trainings == MOST_TOTALS + 2 - 5
