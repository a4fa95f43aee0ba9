"""What Prometheus itself serves beside its page, below ``/user`` (``--web.user-assets``).

The runbook, so that the links of alerts lead somewhere wherever Prometheus runs. And what
metrics mean: what comes by remote write or OTLP has no help in Prometheus, which takes it from
what it scrapes alone, so it scrapes this file of itself: help and types without a sample.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt

from esper_otel.leyline.metrics import CUSTOM, RUN_ENDED, SEED_METRICS, STEP_METRICS
from esper_tamiyo.journaling.own_metrics import OWN_METRICS
from ops.generate.files import ROOT
from ops.generate.prometheus_names import prometheus_name, series_name

FOLDER = Path("docker/prometheus/assets")
HELP, RUNBOOK_PAGE = FOLDER / "help.txt", FOLDER / "runbook.html"
RUNBOOK = Path("docs/runbook.md")


def files() -> dict[Path, str]:
    """What is written, by its place in the repository."""
    runbook = (ROOT / RUNBOOK).read_text(encoding="utf-8")
    return {HELP: "\n".join(_help()) + "\n", RUNBOOK_PAGE: page(runbook)}


def _help() -> Iterator[str]:
    """Help and type of every metric, in Prometheus' text format."""
    for metric in (*STEP_METRICS, *SEED_METRICS, CUSTOM, RUN_ENDED):
        always = metric.when == "always"
        meaning = metric.meaning if always else f"{metric.meaning} ({metric.when})"
        yield from _described(prometheus_name(metric), meaning, "gauge")
    for own in OWN_METRICS:
        name = series_name(own.name, own.unit, own.kind.value)
        yield from _described(name, own.meaning, own.kind.value)


def _described(name: str, meaning: str, kind: str) -> Iterator[str]:
    told = meaning.replace("\\", r"\\").replace("\n", " ")
    yield f"# HELP {name} {told}"
    yield f"# TYPE {name} {kind}"


def anchor(heading: str) -> str:
    """What a link to a heading names, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def page(markdown: str) -> str:
    """Markdown as a page whose headings can be linked to; links to other files are words."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(markdown)
    title = "Runbook"
    for token, inside in pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", anchor(inside.content))
            title = inside.content if token.tag == "h1" else title
    for token in tokens:
        for inner in token.children or ():
            target = str(inner.attrGet("href") or "")
            if inner.type == "link_open" and target and not target.startswith(("#", "http")):
                # There is no such file beside the page: its place in the repository is told.
                inner.attrs = {"title": target.removeprefix("../")}
            if inner.type == "image":
                inner.attrs = {"src": "", "alt": ""}
    body = reader.renderer.render(tokens, reader.options, {})
    return _PAGE.format(title=html.escape(title), body=body)


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46em; margin: 2em auto }}
code, pre {{ font-size: 0.9em }}
pre {{ overflow-x: auto; padding: 0.5em; border: 1px solid #8886 }}
table {{ border-collapse: collapse }}
td, th {{ border: 1px solid #8886; padding: 0.2em 0.5em; text-align: left }}
:target {{ background: #fc05 }}
</style>
<body>
{body}</body>
</html>
"""
