"""How Sphinx makes the documentation site: ``make docs``, or ``python -m ops.site``.

The pages are plain Markdown, which a repository's own viewer shows as well, so nothing in
them is Sphinx's: the navigation is the lists of links on the start page. The source folder is
the repository, as pages of its root (ARCHITECTURE.md and others) are part of the site.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parent.parent

project = "esper-otel"
author = copyright = "The esper-otel authors"  # noqa: A001
html_title = project

extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/**", "*.md", "bench/RESULTS.md"]
exclude_patterns = ["README.md", "docs/pictures/*.md", "docs/conf.py", "build", ".*", "src"]
exclude_patterns += ["sidecar", "tests", "testkit", "examples", "recordings", "deploy"]
source_suffix = {".md": "markdown"}

nitpicky = True
myst_heading_anchors = 4
highlight_language = "none"

html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}

_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
_PAGE = re.compile(r"^- \[([^]]+)\]\(([^)#:]+)\.md\)", re.MULTILINE)


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Have the lists of pages under the start page's headings be the navigation."""
    if name != root_doc:
        return
    _, *sections = _SECTION.split(source[0])
    for heading, text in zip(sections[::2], sections[1::2], strict=True):
        if pages := _PAGE.findall(text):
            listed = "\n".join(f"{text} <{page}>" for text, page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{listed}\n```\n"


class FoldersOfTheRepository(SphinxTransform):
    """Shows links to folders, which no site has, as their text; a folder has to be there."""

    default_priority = 5

    def apply(self, **_: object) -> None:
        """Take those links out of the page."""
        here = Path(self.env.doc2path(self.env.docname)).parent
        for link in list(self.document.findall(pending_xref)):
            target = link.get("reftarget", "")
            if link.get("reftype") == "myst" and target and (here / target).is_dir():
                link.replace_self(nodes.inline("", "", *link.children))


def lead_to_start(app: Sphinx, error: Exception | None) -> None:
    """Have the site's folder open at its start page."""
    if error is None and app.builder.format == "html":
        to = f"{root_doc}.html"
        Path(app.outdir, "index.html").write_text(
            f'<!doctype html><title>{project}</title><meta http-equiv="refresh" '
            f'content="0; url={to}"><a href="{to}">{project}</a>\n'
        )


def setup(app: Sphinx) -> None:
    """Tell Sphinx of the above."""
    app.connect("source-read", add_navigation)
    app.connect("build-finished", lead_to_start)
    app.add_transform(FoldersOfTheRepository)
