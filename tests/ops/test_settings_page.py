"""The page of settings: every one of them, as the code has it."""

from __future__ import annotations

from esper_otel.settings import EsperSettings
from ops.generate.settings_page import page


def rows() -> dict[str, list[str]]:
    lines = [line for line in page().splitlines() if line.startswith("| `")]
    return {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    }


def test_every_setting_has_a_row_that_says_what_it_is_for() -> None:
    told = rows()
    assert len(told) == len(EsperSettings.__struct_fields__)
    assert [variable for variable, (*_, meaning) in told.items() if not meaning] == []


def test_defaults_ranges_and_choices_are_those_of_the_code() -> None:
    told = rows()
    assert told["`ESPER_SPOOL_MB`"][:2] == ["`64`", "a number from 0.01 to 65536"]
    assert told["`ESPER_RING_STEPS`"][1] == "a whole number from 16 to 4194304"
    default, choices, meaning = told["`ESPER_FOSSILS`"]
    assert (default, choices) == ("`join`", "`join`, `stay`")
    assert "`stay`: The seed's own." in meaning
    assert told["`ESPER_RANK`, `RANK`"][0] == "`0`"
