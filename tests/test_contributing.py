"""CONTRIBUTING names files, names in them, targets and terms that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", PAGE)
PATHS = sorted(
    {code for code in CODE if re.fullmatch(r"\.?[\w-]+/[\w./-]*|[\w-]+\.toml", code)}
)
NAMES = sorted(set(re.findall(r"`(\w+)`(?:, which [\w ]+,)? of\s+`([\w./-]+)`", PAGE)))
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
TERMS = re.findall(r"^\| (?!term \||---)([^|]+) \| ", GLOSSARY, re.MULTILINE)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_named_is_there(path):
    assert (ROOT / path).exists()


def test_the_pattern_finds_paths():
    assert {"testkit/framework_loops.py", "src/esper_otel/leyline/metrics.py"} <= {*PATHS}
    assert len(PATHS) > 30


@pytest.mark.parametrize(("name", "path"), NAMES)
def test_a_name_that_is_said_to_be_in_a_file_is_there(name, path):
    assert re.search(rf"\b{name}\b", (ROOT / path).read_text())


def test_the_pattern_finds_names():
    assert ("CONTRACT", "tests/leyline/test_registry.py") in NAMES
    assert len(NAMES) > 7


def test_every_target_and_module_that_is_to_be_run_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {
        *re.findall(r"\bmake ([a-z-]+)\b(?! of)", " ".join(CODE) + PAGE[: PAGE.index("##")])
    } <= targets
    for module in re.findall(r"python -m ([\w.]+)", PAGE):
        path = ROOT / module.replace(".", "/")
        assert (path / "__main__.py").exists() or path.with_suffix(".py").exists()


def test_the_glossary_has_each_of_our_words_once():
    ours = {"Tolaria", "Kasmina", "Tamiyo", "Leyline", "garden", "slot", "seed", "blueprint"}
    ours |= {"kernel", "gate", "fossil", "stage", "journal", "check", "guard"}
    ours |= {"decision engine (decide)", "receiver (ingest)", "journal writer (scribe)"}
    ours |= {"finding", "factor", "table (rule set)", "decision request (ask)"}
    ours |= {"outcome report (field report)", "circuit breaker", "heartbeat", "overhead"}
    assert ours <= {*TERMS}
    assert len(TERMS) == len({*TERMS})
