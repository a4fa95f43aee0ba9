"""Page: one HTML file that shows runs, with nothing outside it and nothing run but its own.

The file may be opened from a mail: a content security policy in it forbids every address,
and every script and style but the five that are written here, by their hashes. What was
recorded is data in it, never markup: compressed, in base64, and put into the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from string import Template

from esper_otel.leyline.terminal import printable
from esper_otel.report.packing import BYTES, Rules, packed
from esper_otel.report.runs import ShownRun

SCRIPTS = ("uplot/uPlot.iife.min.js", "elements.js", "report.js")
STYLES = ("uplot/uPlot.min.css", "report.css")

_MOST_NAMED = 3
_LONGEST_NAME = 200


def page_of(
    runs: Sequence[ShownRun], rules: Rules, problems: Sequence[str], most: int = BYTES
) -> str:
    """The page of ``runs``, with ``problems`` above them; about ``most`` bytes of data."""
    data = base64.b64encode(packed(runs, rules, problems, most)).decode()
    return _page(_title(runs), data)


@lru_cache(64)
def live_page(source: str) -> str:
    """The page without data, which gets them, and what is new, from below the path ``source``.

    For whoever serves it; it may ask nobody else.
    """
    return _page("esper-otel", "", source)


def _page(title: str, data: str, source: str = "") -> str:
    scripts, styles = ([_part(name) for name in names] for names in (SCRIPTS, STYLES))
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    ) + ("; connect-src 'self'" if source else "")
    return Template(_part("page.html")).substitute(
        title=html.escape(title),
        live=f' data-live="{html.escape(source, quote=True)}"' if source else "",
        policy=html.escape(policy, quote=True),
        styles="\n".join(f"<style>{style}</style>" for style in styles),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
        data=data,
    )


def _title(runs: Sequence[ShownRun]) -> str:
    names = [printable(run.title)[:_LONGEST_NAME] or "(no name)" for run in runs[:_MOST_NAMED]]
    more = f" and {len(runs) - _MOST_NAMED} more" if len(runs) > _MOST_NAMED else ""
    return f"{', '.join(names)}{more} · esper-otel report"


def _part(name: str) -> str:
    return files("esper_otel.report").joinpath("page", name).read_text("utf-8")


def _hashes(parts: Sequence[str]) -> str:
    return " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
        for part in parts
    )
