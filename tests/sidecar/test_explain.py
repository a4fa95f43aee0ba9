"""One decision in words, from the journal, with the sidecar up or down."""

import json
from pathlib import Path

import msgspec
import pytest

from esper_otel.leyline.decisions import Action, SeedOperation, Severity
from esper_tamiyo.journaling.entries import (
    Decided,
    Proposed,
    Reported,
    Silenced,
    TableInUse,
)
from esper_tamiyo.journaling.explain import format_story
from esper_tamiyo.journaling.journal import Journal
from esper_tamiyo.journaling.lines import AGAINST, format_entry, format_values
from esper_tamiyo.journaling.stories import UnknownDecisionError, find_decision
from sidecar.entries_made import changed, decided, found, reported, table
from sidecar.running import tamiyo

SPIKE = decided(
    61,
    findings=[
        msgspec.structs.replace(
            found("loss_spike", loss=3.0, **{"baseline(loss)": 0.5}),
            pending_since=60,
            firing_since=61,
        ),
        msgspec.structs.replace(
            found("loss_warning", loss_delta=2.5, **{"previous(loss_delta)": 0.1}),
            severity=Severity.WARNING,
            action=Action.OPTIMIZER,
        ),
    ],
    silenced=[Silenced("grad_variance_high", "loss_spike")],
    proposal=Proposed("s1", SeedOperation.BLEND),
    conservative=True,
)
JOURNAL = [
    table("loss_spike", "loss_warning", "other"),
    decided(20),
    SPIKE,
    changed(70),
    reported(61),
    decided(7, run="another"),
    changed(90),
]


def test_a_decision_in_words():
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
def test_what_else_is_said(changes, expected):
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
    with pytest.raises(UnknownDecisionError, match="similar ids are run/0/61/update, run/0/20"):
        find_decision([decided(20), update], "run/0/60")
    with pytest.raises(UnknownDecisionError, match=r"it knows run$"):
        find_decision([update], "latest", "nobody")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (
            decided(61, id="run/0/61/update", update=True, parameters=SKIPPED),
            "run/0/61/update  update of step 61 to be skipped: loss_spike (PAUSE, HIGH)",
        ),
        (
            decided(
                61,
                id="run/0/61/update",
                update=True,
                parameters={"lr_scale": 0.25, "max_norm": 1.0},
            ),
            "run/0/61/update  update of step 61 to be made with lr_scale 0.25 and max_norm 1: "
            "loss_spike (PAUSE, HIGH)",
        ),
        (
            msgspec.structs.replace(reported(61), skipped=True, skipped_after=2),
            "run/0/61  afterwards, 32 steps: improved (loss is back to its earlier value); "
            "update of step 61 skipped; 2 later updates skipped",
        ),
        (
            msgspec.structs.replace(reported(61), scaled_from=62, lr_scale_after=0.25),
            "run/0/61  afterwards, 32 steps: improved (loss is back to its earlier value); "
            "updates made at 0.25 times the script's rate from step 62 on",
        ),
        (
            msgspec.structs.replace(reported(61), update=True, lr_scale=0.5),
            "run/0/61  afterwards, 32 steps: improved (loss is back to its earlier value); "
            "update of step 61 made at 0.5 times the script's rate",
        ),
    ],
)
def test_updates_on_one_line(entry, told):
    assert format_entry(entry).partition("Z  ")[2] == told


def test_a_report_that_lacks_a_number_is_told_without_it():
    half = msgspec.structs.replace(reported(61), scaled_from=62)
    assert "times the script's rate" not in format_entry(half)
    story = find_decision([*JOURNAL[:3], half], "run/0/61")
    assert list(format_story(story))


def test_a_journal_of_before_there_were_checks_is_read():
    """Fields that were added since are as if nobody had said anything."""
    entry = msgspec.to_builtins(reported(61))
    for name in ("update", "lr_scale", "skipped", "scaled_from", "lr_scale_after"):
        del entry[name]
    assert msgspec.convert(entry, Reported) == reported(61)
    entry = msgspec.to_builtins(decided(61))
    del entry["update"]
    assert msgspec.convert(entry, Decided) == decided(61)


def test_the_latest_is_that_of_the_journal_or_of_a_run():
    assert find_decision(JOURNAL, "latest").decision.id == "another/0/7"
    assert find_decision(JOURNAL, "latest", "run").decision.id == "run/0/61"


def test_of_two_decisions_with_one_id_it_is_the_last():
    again = decided(61, mode="advise")
    story = find_decision([*JOURNAL, again], "run/0/61")
    assert story.decision == again
    assert story.report is None


def test_another_seed_that_is_let_go_of_does_not_end_it():
    about_s1 = decided(61, target_seed="s1")
    of_s2, of_s1 = changed(70, seed_id="s2"), changed(80, seed_id="s1")
    assert find_decision([about_s1, of_s2], "run/0/61").ended is None
    assert find_decision([about_s1, of_s2, of_s1], "run/0/61").ended == 80


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("run/0/22", "similar ids are run/0/20, run/0/61"),
        ("rum/0/61", "run/0/61"),
        ("another/0/9", "similar ids are another/0/7"),
        ("", "similar ids are"),
        ("run/0/x", "similar ids are run/0/61, run/0/20"),
        ("run/0/" + "9" * 5000, "similar ids are"),
        ("run/0/²", "similar ids are"),
    ],
)
def test_an_unknown_id_is_told_with_those_near_it(wanted, near):
    with pytest.raises(UnknownDecisionError, match="no such decision") as caught:
        find_decision(JOURNAL, wanted)
    assert near in str(caught.value)


def test_an_id_without_a_step_is_no_worse_than_another():
    with pytest.raises(UnknownDecisionError, match="similar ids are run/0/x, run/0/20"):
        find_decision([*JOURNAL, decided(5, id="run/0/x")], "run/0/3")


def test_nothing_to_explain():
    with pytest.raises(UnknownDecisionError, match="no decision other than CONTINUE yet"):
        find_decision([table()], "latest")
    with pytest.raises(UnknownDecisionError, match="about run nobody; it knows another, run"):
        find_decision(JOURNAL, "latest", "nobody")


def test_values_are_told_with_what_they_were_held_against():
    values = {
        "loss": 3.0,
        "baseline(loss)": 0.0,
        "peers(step_latency_ms)": 10.0,
        "step_latency_ms": 25.0,
        "baseline(loss_volatility)": 0.5,
        "silent(s)": 12.0,
    }
    assert list(format_values(values)) == [
        "loss 3 (baseline 0)",
        "step_latency_ms 25 (other ranks 10, 2.5 times that)",
        "silent(s) 12",
        "baseline 0.5 (of loss_volatility)",
    ]


def test_the_journal_is_one_line_each():
    told = [format_entry(entry).partition("Z  ")[2] for entry in JOURNAL]
    assert told == [
        "decides by table t-1, 3 rules",
        "run/0/20  PAUSE HIGH: loss_spike",
        "run/0/61  PAUSE HIGH: loss_spike (conservative)",
        "run/0/70  loss_spike: firing → inactive",
        "run/0/61  afterwards, 32 steps: improved (loss is back to its earlier value)",
        "another/0/7  PAUSE HIGH: loss_spike",
        "run/0/90  loss_spike: firing → inactive",
    ]


@pytest.fixture
def folder(tmp_path):
    journal = Journal(tmp_path / "j", 1_000_000, 2)
    journal.append(JOURNAL)
    journal.close()
    return tmp_path / "j"


def test_the_commands(folder):
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


def test_the_page_names_all_that_a_value_is_held_against():
    page = (Path(__file__).parents[2] / "docs" / "decisions.md").read_text()
    assert [name for name in AGAINST if f"`{name}(key)`" not in page] == []


# Notices.


def notice(step, *rules, **changes):
    """A CONTINUE at which these rules only told something."""
    findings = [
        msgspec.structs.replace(
            found(rule, loss=3.0, **{"baseline(loss)": 1.0}),
            action=Action.CONTINUE,
            severity=severity,
        )
        for rule, severity in zip(rules, (Severity.WARNING, Severity.HIGH), strict=False)
    ]
    ordinary = {
        "action": Action.CONTINUE,
        "severity": Severity.NORMAL,
        "reason": "nominal",
        "findings": findings,
    }
    return decided(step, **(ordinary | changes))


NOTICED = [
    table("loss_drift", "jump"),
    notice(40, "loss_drift", "jump"),
    reported(40, "came_back"),
    changed(60, "jump"),
]


def test_a_notice_in_words():
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


def test_a_notice_is_explained_at_each_step_at_which_it_goes_on():
    for step in (40, 41, 59):
        assert find_decision(NOTICED, f"run/0/{step}").decision.step == 40
    for wanted in ("run/0/39", "run/0/60", "run/1/41", "other/0/41", "run/0/41/update"):
        with pytest.raises(UnknownDecisionError):
            find_decision(NOTICED, wanted)
    acted = [*NOTICED[:2], decided(50), *NOTICED[2:]]
    assert find_decision(acted, "run/0/50").decision.action is Action.PAUSE
    assert find_decision(acted, "run/0/51").decision.step == 40


def test_a_notice_of_silence_does_not_hide_what_was_decided_about_its_step():
    behind = [decided(40), notice(40, "quiet")]
    assert find_decision(behind, "run/0/40").decision.action is Action.PAUSE
    again = [decided(40), notice(40, "quiet", instance="two")]
    assert find_decision(again, "run/0/40").decision.action is Action.CONTINUE


def test_the_latest_is_not_that_a_run_fell_silent_where_there_is_anything_else():
    silent = notice(80, "quiet", findings=[found("quiet", **{"step": 80.0, "silent(s)": 12.0})])
    assert find_decision([silent], "latest").decision == silent
    assert find_decision([silent, decided(81)], "latest").decision.step == 81
    assert find_decision([decided(79), silent], "latest").decision.step == 79
    assert find_decision([decided(79), silent], "run/0/80").decision == silent
    assert find_decision([decided(79), notice(80, "jump")], "latest").decision.step == 80


def test_notices_and_reports_on_one_line():
    told = [format_entry(entry).partition("Z  ")[2] for entry in NOTICED]
    assert told[1:3] == [
        "run/0/40  notice: loss_drift (WARNING), jump (HIGH)",
        "run/0/40  afterwards, 32 steps: came back by itself (loss is back to its earlier "
        "value)",
    ]
    more = msgspec.structs.replace(
        reported(61),
        comparison="7 of 9 such excursions of this run came back by themselves",
        rule="jump",
        saw={"loss": 3.0, "baseline(loss)": 1.0},
    )
    assert format_entry(more).partition("Z  ")[2] == (
        "run/0/61  afterwards, 32 steps: improved (loss is back to its earlier value); 7 of 9 "
        "such excursions of this run came back by themselves; jump saw loss 3 (baseline 1, 3 "
        "times that)"
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
