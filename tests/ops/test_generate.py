"""``python -m ops.generate``: what is committed is what the code makes, or is named."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from ops.generate import __main__, commands_page, own_metrics_page
from ops.generate.__main__ import files, main
from ops.generate.files import COMMAND, ROOT, with_section

made = cache(files)
"""It takes seconds; not when this is collected, which each process of the tests does."""


def test_what_is_committed_is_what_the_code_makes() -> None:
    assert len(made()) > 10
    for place, text in made().items():
        assert (ROOT / place).read_text(encoding="utf-8") == text, f"{place}: run {COMMAND}"


def test_whose_files_are_made_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/4711")
    for place, text in commands_page.files().items():
        assert text == (ROOT / place).read_text(encoding="utf-8")


def test_it_writes_compares_and_complains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "files", lambda url: made())
    check = ["--folder", str(tmp_path), "--check"]
    assert main(check) == 1
    assert [*tmp_path.iterdir()] == [], "--check wrote something"
    assert capsys.readouterr().err.count(f"out of date; run {COMMAND}") == len(made())
    assert main(["--folder", str(tmp_path)]) == 0
    assert main(check) == 0
    page = tmp_path / "docs" / "metrics.md"
    page.write_text(page.read_text() + "an edit by hand\n")
    capsys.readouterr()
    assert main(check) == 1
    complaint = capsys.readouterr().err
    assert complaint == f"{page}: out of date; run {COMMAND}\n"
    assert page.read_text().endswith("an edit by hand\n"), "--check wrote something"


def test_the_page_of_decisions_lists_tamiyos_own_metrics() -> None:
    assert own_metrics_page.markdown() in made()[own_metrics_page.PAGE]


def test_a_section_is_replaced_between_its_marks_and_nothing_else() -> None:
    assert with_section("a\n<b>\nold\n<e>\nz\n", "<b>", "<e>", "new") == "a\n<b>\nnew\n<e>\nz\n"


def test_an_address_of_the_runbook_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--folder", str(tmp_path), "--runbook-url", "docs/runbook.md"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "docs/runbook.md: expected an address such as https://" in told
    assert [*tmp_path.iterdir()] == []
