"""Pictures of the docs: a stale one is named, and so is one that was changed by hand."""

import re
from pathlib import Path

import pytest

from ops.pictures import PICTURES, RECORD, ROOT, Picture, digest, faults, main, without_fonts

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_no_picture_is_stale():
    assert [*faults(PICTURES)] == []


def test_every_picture_of_the_docs_is_made_by_the_command():
    made = {place for picture in PICTURES.values() for place in picture.makes}
    there = {
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("docs/*.svg"), *ROOT.glob("docs/pictures/*")]
        if path.suffix in (".svg", ".png")
    }
    assert made == there


def test_every_picture_is_shown_on_a_page_and_every_one_shown_is_there():
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+\.(?:png|svg))\)", page.read_text())
    }
    made = {ROOT / place for picture in PICTURES.values() for place in picture.makes}
    assert shown == made


@pytest.mark.parametrize("place", [p for each in PICTURES.values() for p in each.makes])
def test_a_picture_asks_for_nothing_from_elsewhere(place):
    if place.endswith(".svg"):
        assert not re.search(r"url\(.?https?:", (ROOT / place).read_text())


@pytest.fixture
def drawn(tmp_path):
    """A picture of a module, noted as made from it."""
    (tmp_path / "shown.py").write_text('"""Old."""\nx = 1  # why\n')
    (tmp_path / "made.svg").write_text("<svg/>")
    picture = Picture(("made.svg",), ("shown.py",), lambda: None)
    note = tmp_path / RECORD
    note.parent.mkdir(parents=True)
    digests = {name: digest(getattr(picture, name), tmp_path) for name in ("makes", "shows")}
    note.write_text(str({"one": digests}).replace("'", '"'))
    return tmp_path, {"one": picture}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("shown.py", '"""New, and\nlonger."""\n\n# so\nx = 1  # why\n', []),
        ("shown.py", '"""Old."""\nx = 2  # why\n', ["stale"]),
        (
            "made.svg",
            "<svg>by hand</svg>",
            ["not what was made"],
        ),
    ],
)
def test_what_has_changed_is_named_with_what_to_run(drawn, name, text, told):
    folder, pictures = drawn
    (folder / name).write_text(text)
    assert [*faults(pictures, folder)] == [
        f"made.svg: {fault}; run python -m ops.pictures one" for fault in told
    ]


def test_check_draws_nothing(capsys):
    before = {path: path.stat().st_mtime_ns for path in Path(ROOT, "docs/pictures").iterdir()}
    assert main(["--check"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_name_that_is_no_picture(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["nothing"])
    assert ended.value.code == 2
    assert "nothing: expected some of demo, report" in capsys.readouterr().err


def test_fonts_of_elsewhere_are_taken_out():
    svg = "<style>\n    @font-face {\n        src: url('https://x/y');\n    }\n.a {}</style>"
    assert without_fonts(svg) == "<style>\n.a {}</style>"
