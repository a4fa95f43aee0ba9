"""One decision in words, from the journal, with the sidecar up or down."""

import json

import msgspec
import pytest

from esper_otel.leyline.decisions import Action, SeedOperation
from esper_tamiyo.journaling.entries import Decided, Proposed, Reported, TableInUse
from esper_tamiyo.journaling.explain import format_story
from esper_tamiyo.journaling.journal import Journal
from esper_tamiyo.journaling.stories import find_decision
from sidecar.entries_made import decided, reported, table
from sidecar.journals_made import JOURNAL, NOTICED, SPIKE
from sidecar.running import tamiyo


def test_a_decision_is_told_with_its_reasons_its_outcome_and_what_would_let_it_pass():
    assert "\n".join(format_story(find_decision(JOURNAL, "run/0/61"))) == (
        """\
run/0/61: PAUSE (HIGH)
at 2026-09-21T14:13:20.000000Z, by table t-1

loss_spike decided: loss_spike in words.
  it asks for: loss above 2 × its baseline
  loss 3, expected at most 1: 2 × its baseline of 0.5 (rolling median of the last 64)
  it held since step 60
  firing since step 61

Conservative mode is on: operations on seeds wait.
The trainer is in enforce mode.

Overridden by the stronger rule:
  loss_warning (OPTIMIZER, WARNING): loss_warning in words. [loss_delta 2.5 (before 0.1)]
  grad_variance_high: inhibited by loss_spike
  the proposal to blend seed s1

Afterwards (32 of 32 steps): improved
  loss is back to its earlier value
  loss: before 0.5, at the decision 3, after 0.6
loss_spike let go at step 70.

If that was a false alarm, a table with these lines lets it pass:
  extends: default
  rules:
    - id: loss_spike
      metric: loss
      above_baseline: 6
or, for this run alone and while it runs, say:
  tamiyo silence run loss_spike"""
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mode": "advise"}, "in advise mode: it reports decisions and applies none."),
        ({"mode": ""}, "Whether the trainer applies decisions is not known."),
        ({"reason": "conservative_mode", "findings": []}, "Conservative mode: seeds wait"),
        (
            {
                "action": Action.SEED,
                "reason": "nominal",
                "findings": [],
                "proposal": Proposed("s1", SeedOperation.BLEND),
                "seed_operation": SeedOperation.BLEND,
                "target_seed": "s1",
            },
            "granted: blend of seed s1",
        ),
        ({"parameters": {"lr_scale": 0.25}}, "lr_scale 0.25"),
        ({"observed_step": 9}, "It had already seen step 9."),
        ({}, "no outcome report yet"),
    ],
)
def test_what_is_out_of_the_ordinary_about_a_decision_is_told(changes, expected):
    assert expected in "\n".join(
        format_story(find_decision([decided(5, **changes)], "run/0/5"))
    )


SCALED = {"lr_scale": 0.25}
SKIPPED = {"skip_step": 1.0}


@pytest.mark.parametrize(
    ("parameters", "told", "expected"),
    [
        # lasting factors, from a decision about a step
        (SCALED, None, "The factor of its updates is not known yet."),
        (SCALED, {}, "Whether updates were made with a lower rate is not known."),
        (
            SCALED,
            {"lr_scale": 1.0, "scaled_from": 62, "lr_scale_after": 0.25},
            "Updates were made at 0.25 times the script's rate from step 62 on.",
        ),
        (
            SCALED,
            {"lr_scale": 1.0, "lr_scale_after": 1.0},
            "No update was made with a lower rate.",
        ),
        (
            {"lr_scale": 2.0},
            {"lr_scale": 1.0, "lr_scale_after": 1.0},
            "No update was made with a higher rate.",
        ),
        (
            SCALED,
            {"lr_scale": 0.25, "lr_scale_after": 0.25},
            "Updates were made at 0.25 times the script's rate, as before.",
        ),
        (SKIPPED, {"skipped": True}, "The update of step 61 was skipped."),
        (SKIPPED, {"skipped": False}, "The update of step 61 was not skipped."),
        (SKIPPED, {}, "Whether the update of step 61 was skipped is not known."),
        # one update
        (
            SCALED,
            {"update": True, "lr_scale": 0.0625},
            "The update of step 61 was made at 0.0625 times the script's rate.",
        ),
        (
            SCALED,
            {"update": True, "lr_scale": 1.0},
            "The update of step 61 was not made with a lower rate.",
        ),
        (
            SCALED,
            {"update": True},
            "Whether the update of step 61 was made with a lower rate is not known.",
        ),
        (
            {"max_norm": 1.0},
            {"update": True},
            "Whether gradients were scaled down to max_norm is not in the telemetry.",
        ),
    ],
)
def test_applied_is_told_only_of_what_updates_were_made_with(parameters, told, expected):
    entries = [decided(61, parameters=parameters)]
    if told is not None:
        entries.append(msgspec.structs.replace(reported(61), **told))
    words = list(format_story(find_decision(entries, "run/0/61")))
    assert expected in words
    assert not any("applies decisions" in line for line in words)


def test_a_decision_about_an_update_says_so():
    update = decided(61, id="run/0/61/update", update=True, parameters=SKIPPED)
    words = list(
        format_story(find_decision([decided(20), update, decided(61)], "run/0/61/update"))
    )
    assert words[:2] == [
        "run/0/61/update: PAUSE (HIGH)",
        "about the update of step 61, before it was made",
    ]


def test_a_journal_of_before_there_were_checks_is_read():
    """Fields that were added since are as if nobody had said anything."""
    entry = msgspec.to_builtins(reported(61))
    for name in ("update", "lr_scale", "skipped", "scaled_from", "lr_scale_after"):
        del entry[name]
    assert msgspec.convert(entry, Reported) == reported(61)
    entry = msgspec.to_builtins(decided(61))
    del entry["update"]
    assert msgspec.convert(entry, Decided) == decided(61)


@pytest.fixture
def folder(tmp_path):
    journal = Journal(tmp_path / "j", 1_000_000, 2)
    journal.append(JOURNAL)
    journal.close()
    return tmp_path / "j"


def test_the_commands_print_a_decision_and_the_journal(folder):
    told = tamiyo("explain", "run/0/61", "--journal", folder)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("run/0/61: PAUSE (HIGH)\n")
    plain = json.loads(tamiyo("explain", "latest", "--journal", folder, "--json").stdout)
    assert plain["decision"]["id"] == "another/0/7"
    assert plain["rules"]["loss_spike"]["when"] == "loss above 2 × its baseline"
    unknown = tamiyo("explain", "run/0/62", "--journal", folder)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("tamiyo: run/0/62: the journal holds no such decision")
    shown = tamiyo("journal", "--journal", folder, "--run", "another")
    assert shown.stdout.endswith("another/0/7  PAUSE HIGH: loss_spike\n")
    assert len(shown.stdout.splitlines()) == 1
    as_written = tamiyo("journal", "--journal", folder, "--json").stdout
    assert as_written == (folder / "journal-000001.jsonl").read_text()


def test_no_journal_is_a_mistake_not_a_traceback(tmp_path):
    for command in (["explain", "latest"], ["journal"]):
        ended = tamiyo(*command, "--socket", tmp_path / "t.sock")
        assert ended.returncode == 1
        assert ended.stderr == (
            f"tamiyo: {tmp_path / 't.journal'}: there is no journal; --journal names another\n"
        )


def test_a_notice_is_told_with_each_of_its_rules():
    assert "\n".join(format_story(find_decision(NOTICED, "run/0/40"))) == (
        """\
run/0/40: notice
at 2026-09-21T14:13:20.000000Z, by table t-1

loss_drift (WARNING): loss_drift in words.
  it asks for: loss above 2 × its baseline
  loss 3, expected at most 2: 2 × its baseline of 1 (rolling median of the last 64)
jump (HIGH): jump in words.
  it asks for: loss above 2 × its baseline
  loss 3, expected at most 2: 2 × its baseline of 1 (rolling median of the last 64)

It is a notice: it requests nothing of the run.

Afterwards (32 of 32 steps): came back by itself
  loss is back to its earlier value
  loss: before 0.5, at the decision 3, after 0.6
jump let go at step 60.

If that was a false alarm, a table with these lines lets it pass:
  extends: default
  rules:
    - id: loss_drift
      metric: loss
      above_baseline: 3
or, for this run alone and while it runs, say:
  tamiyo silence run loss_drift

If that was a false alarm, a table with these lines lets it pass:
  extends: default
  rules:
    - id: jump
      metric: loss
      above_baseline: 3
or, for this run alone and while it runs, say:
  tamiyo silence run jump"""
    )


def test_the_command_takes_a_run_and_a_step(folder):
    told = tamiyo("explain", "run", "61", "--journal", folder)
    assert told.stdout.startswith("run/0/61: PAUSE (HIGH)\n")
    other = tamiyo("explain", "run", "61", "--rank", "1", "--journal", folder)
    assert (other.returncode, "run/1/61" in other.stderr) == (1, True)
    plain = json.loads(tamiyo("explain", "run", "61", "--journal", folder, "--json").stdout)
    assert plain["expected"]["loss_spike"] == [
        "loss 3, expected at most 1: 2 × its baseline of 0.5 (rolling median of the last 64)"
    ]
    assert plain["if_false_alarm"][-1] == "  tamiyo silence run loss_spike"


def test_a_journal_of_before_there_were_conditions_is_explained_as_far_as_it_goes():
    bare = msgspec.to_builtins(table("loss_spike"))
    del bare["source"], bare["window"]
    for rule in bare["rules"]:
        del rule["condition"]
    old = msgspec.convert(bare, TableInUse)
    words = list(format_story(find_decision([old, SPIKE], "run/0/61")))
    assert "  it saw: loss 3 (baseline 0.5, 6 times that)" in words
    assert "      mode: observe" in words
    assert "  extends: TABLE.yaml" in words
