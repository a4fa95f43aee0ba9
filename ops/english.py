"""Counts sentences that hide their subject or verb; the target is under 2 % of all.

``python -m ops.english`` prints the share for each source, and the sentences. The status is 1
when the share is above the target. A sentence has more than four words, and counts when it

- has a *what* (or *whatever*) clause: any such word, except in a question;
- uses *tell, told, tells, telling*, *hear, heard, hears* or *judge, judged, judges* where the
  field reports, receives and evaluates;
- says *held against* (*hold*, *holds*, *holding*), where the field compares or validates.

Sentences come from three sources. *docs*: README, ARCHITECTURE, CONTRIBUTING, CHANGELOG and the
pages in ``docs/``, including generated ones: paragraphs, list items and table cells, without
code; also the comments of the configurations in ``collector/``, ``deploy/`` and ``docker/``.
*texts*: all strings of the two packages and of ``ops`` that have more than four
words, except docstrings; this covers help texts, messages, metric descriptions, alerts and
dashboards. The rule texts of the shipped tables and the help of the Makefile count as well.
*docstrings*: those of the names that ``esper_otel`` exports, of their public methods, and of
their base classes.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import esper_otel

ROOT = Path(__file__).parent.parent
TARGET = 0.02
"""Largest share of such sentences among all."""

FEWEST_WORDS = 5
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md")
CONFIGURATIONS = ("collector/*.yaml", "deploy/kubernetes/*.yaml", "docker/**/*.y*ml")
CODE = ("src/esper_otel", "sidecar/esper_tamiyo", "ops")

HANGING = re.compile(
    r"\b(?:what|whatever)\b"
    r"|\b(?:tell|tells|told|telling|hear|hears|heard|judge|judges|judged)\b"
    r"|\b(?:held|hold|holds|holding)\b(?: [\w`,'-]+){0,6}? against\b",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^ *```.*?^ *```[^\S\n]*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`+[^`]*`+")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_END = re.compile(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*]*[A-Z\x00])")
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
_WORD = re.compile(r"[\w\x00][\w'’-]*")


class Sentence(NamedTuple):
    """One sentence that people read, and the file that it is in."""

    source: str
    place: str
    text: str

    def hangs(self) -> bool:
        """Whether it is of the kind that is counted."""
        if self.text.rstrip("\"')*").endswith("?"):
            return False
        return HANGING.search(self.text) is not None


def sentences(text: str) -> Iterator[str]:
    """The sentences of one paragraph, cell or string that have more than four words."""
    for sentence in _END.split(" ".join(text.split())):
        if len(_WORD.findall(sentence)) >= FEWEST_WORDS:
            yield sentence.replace("\x00", "…")


def blocks(page: str) -> Iterator[str]:
    """Paragraphs, list items, headings and table cells of a Markdown page, without code."""
    page = _LINK.sub(r"\1", _CODE.sub("\x00", _COMMENT.sub("", _FENCE.sub("\n", page))))
    block: list[str] = []
    for line in [*page.splitlines(), ""]:
        starts = not line.strip() or _ITEM.match(line) or line.lstrip().startswith(("|", "#"))
        if starts and block:
            yield " ".join(block)
            block = []
        if line.lstrip().startswith("|"):
            yield from (cell for cell in line.strip().strip("|").split("|"))
        elif line.strip():
            block.append(_ITEM.sub("", line))


def strings(tree: ast.AST) -> Iterator[str]:
    """Texts of a module other than docstrings; values within an f-string are left out."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented):
            bare = [each for each in node.body if isinstance(each, ast.Expr)]
            skipped |= {each.value for each in bare}
        if isinstance(node, ast.JoinedStr):
            skipped |= {*node.values}
            if node not in skipped:
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "\x00"
                    for part in node.values
                )
        elif isinstance(node, ast.Constant) and node not in skipped:
            yield node.value if isinstance(node.value, str) else ""


def _of_docs() -> Iterator[Sentence]:
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            place = str(path.relative_to(ROOT))
            for block in blocks(path.read_text(encoding="utf-8")):
                yield from (Sentence("docs", place, each) for each in sentences(block))
    for pattern in CONFIGURATIONS:
        for path in sorted(ROOT.glob(pattern)):
            place = str(path.relative_to(ROOT))
            comments = re.sub(r"^(?! *#).*$|^ *# ?", "", path.read_text(), flags=re.MULTILINE)
            for block in blocks(comments):
                yield from (Sentence("docs", place, each) for each in sentences(block))


def _of_texts() -> Iterator[Sentence]:
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = str(path.relative_to(ROOT))
            for text in strings(ast.parse(path.read_text(encoding="utf-8"))):
                for block in blocks(text):
                    yield from (Sentence("texts", place, each) for each in sentences(block))
    for path in sorted((ROOT / "sidecar/esper_tamiyo/tables").glob("*.yaml")):
        place = str(path.relative_to(ROOT))
        for text in re.findall(r"^ +text: (.+(?:\n {6,}.+)*)", path.read_text(), re.MULTILINE):
            yield from (Sentence("texts", place, each) for each in sentences(text))
    makefile = (ROOT / "Makefile").read_text()
    for text in re.findall(r"^[a-z-]+:.*##(.*)$", makefile, re.MULTILINE):
        yield from (Sentence("texts", "Makefile", each) for each in sentences(text))


def _of_docstrings() -> Iterator[Sentence]:
    package = ROOT / "src" / "esper_otel"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")]
    defined: dict[str, ast.ClassDef | ast.FunctionDef] = {
        node.name: node
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    for name in sorted(esper_otel.__all__):
        node = defined.get(name)
        bases = node.bases if isinstance(node, ast.ClassDef) else []
        owners = [node, *(defined.get(getattr(base, "id", "")) for base in bases)]
        for text in (each for owner in owners if owner for each in docstrings(owner)):
            for block in blocks(text):
                yield from (Sentence("docstrings", name, one) for one in sentences(block))


def docstrings(node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """The docstring of a class or function, those of public methods, and of fields."""
    yield ast.get_docstring(node) or ""
    for each in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
            yield ast.get_docstring(each) or ""
        elif each is not node.body[0] and isinstance(each, ast.Expr):
            yield str(each.value.value) if isinstance(each.value, ast.Constant) else ""


def collect() -> list[Sentence]:
    """All sentences of the three sources, in the order of their files."""
    return [*_of_docs(), *_of_texts(), *_of_docstrings()]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the sentences that count, and the share; 1 when it is above the target."""
    parser = argparse.ArgumentParser(prog="python -m ops.english", description=__doc__)
    parser.add_argument("place", nargs="*", help="only files whose path begins so")
    options = parser.parse_args(argv)
    every = collect()
    if options.place:
        every = [each for each in every if each.place.startswith(tuple(options.place))]
    hanging = [each for each in every if each.hangs()]
    for each in hanging:
        print(f"{each.place}: {each.text}")
    for source in dict.fromkeys(each.source for each in every):
        of_all = sum(each.source == source for each in every)
        found = sum(each.source == source for each in hanging)
        print(f"{source}: {found} of {of_all} sentences, {found / of_all:.1%}")
    share = len(hanging) / max(1, len(every))
    print(f"all: {len(hanging)} of {len(every)} sentences, {share:.1%} (target {TARGET:.0%})")
    return int(share > TARGET)


if __name__ == "__main__":
    sys.exit(main())
