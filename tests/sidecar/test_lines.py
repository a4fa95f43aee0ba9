"""An entry of the journal on one line."""

from pathlib import Path

import msgspec
import pytest

from esper_tamiyo.journaling.explain import format_story
from esper_tamiyo.journaling.lines import AGAINST, format_entry, format_values
from esper_tamiyo.journaling.stories import find_decision
from sidecar.entries_made import decided, reported
from sidecar.journals_made import JOURNAL, NOTICED


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (
            decided(61, id="run/0/61/update", update=True, parameters={"skip_step": 1.0}),
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
def test_what_is_done_to_updates_is_told_on_one_line(entry, told):
    assert format_entry(entry).partition("Z  ")[2] == told


def test_a_report_that_lacks_a_number_is_told_without_it():
    half = msgspec.structs.replace(reported(61), scaled_from=62)
    assert "times the script's rate" not in format_entry(half)
    story = find_decision([*JOURNAL[:3], half], "run/0/61")
    assert list(format_story(story))


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


def test_each_entry_of_a_journal_is_told_on_one_line():
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


def test_the_page_names_all_that_a_value_is_held_against():
    page = (Path(__file__).parents[2] / "docs" / "decisions.md").read_text()
    assert [name for name in AGAINST if f"`{name}(key)`" not in page] == []


def test_notices_and_reports_are_told_on_one_line():
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
