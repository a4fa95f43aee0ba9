"""Pages written by hand that list names of the code: each is there, and none is missing."""

import re

import pytest
import yaml

from esper_otel.leyline import events
from esper_otel.leyline.trace_ids import DECIDE_SPAN, STEP_SPAN
from esper_otel.stream.spans import FINDING_EVENT, STEP_ATTRIBUTES
from ops.stack.programs import ROOT

DOCS = ROOT / "docs"
SOURCES = ("src/esper_otel/stream/spans.py", "sidecar/esper_tamiyo/journaling/own_telemetry.py")
SPANS = re.compile(
    r'"((?:train|kasmina|tamiyo)\.(?:\w+))", (?:began|mark|since|asked_for|before)'
)


def attributes_in(path):
    """Names of attributes and events in a module; a part that varies is an ``…``."""
    text = (ROOT / path).read_text()
    text = re.sub(r"(?<=\.)\{\w+\}", "…", text)
    return set(re.findall(r'"(esper\.[\w.…]+)"', text))


def named_in(page):
    """Names in code of a page, whose ``NAME`` and ``KEY`` stand for a part that varies."""
    text = (DOCS / page).read_text()
    return set(re.findall(r"`([\w.…]+)`", re.sub(r"\b(?:NAME|KEY)\b", "…", text)))


def test_the_page_of_spans_has_every_attribute():
    named = named_in("spans.md")
    wanted = set.union(*map(attributes_in, SOURCES)) - {"esper.…"}
    wanted |= {FINDING_EVENT, *(f"esper.{key}" for key in STEP_ATTRIBUTES)}
    assert wanted - named == set()
    others = {name for name in named if re.match(r"esper\.(decision|update|finding)\.", name)}
    assert others - wanted == set()


def test_the_page_of_spans_has_every_span():
    recorder = (ROOT / "src" / "esper_otel" / "tolaria").glob("*.py")
    made = {name for path in recorder for name in SPANS.findall(path.read_text())}
    assert {"train.forward", "train.seeds", "kasmina.apply"} <= made
    assert {STEP_SPAN, DECIDE_SPAN, *made} <= named_in("spans.md")


def test_every_event_is_on_a_page():
    names = {
        value
        for value in vars(events).values()
        if isinstance(value, str) and re.fullmatch(r"esper\.\w+\.\w+", value)
    }
    assert len(names) > 12
    assert names - named_in("spans.md") - named_in("kasmina.md") - {"esper.seed.id"} == set()


def test_the_page_of_examples_has_every_script():
    scripts = {
        path.stem for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text()
    } - {"demo"}
    listed = set(re.findall(r"-m examples\.(\w+)", (DOCS / "examples.md").read_text()))
    assert listed == scripts


def test_the_guide_to_slow_training_names_rules_of_the_default_table():
    table = yaml.safe_load((ROOT / "sidecar/esper_tamiyo/tables/default.yaml").read_text())
    rules = {rule["id"] for rule in table["rules"]}
    named = set(
        re.findall(r"runbook\.md#(\w+)", (DOCS / "how-to/slow-training.md").read_text())
    )
    assert len(named) > 5
    assert named <= rules


@pytest.mark.parametrize("page", ["installing.md", "faq.md"])
def test_settings_and_extras_on_a_page_are_there(page):
    text = (DOCS / page).read_text()
    settings = (DOCS / "settings.md").read_text()
    for name in re.findall(r"\b(?:ESPER|OTEL)_[A-Z_]+", text):
        assert name in settings or name in {"OTEL_TRACES_EXPORTER", "OTEL_LOGS_EXPORTER"}
    project = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r"^\| `(\w+)` \| ", text, re.MULTILINE):
        assert re.search(rf"^{name} = \[", project, re.MULTILINE)
