"""The documentation site: it builds strictly, its links hold, and its search finds things."""

import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

import esper_otel
from esper_otel.cli import command_parser as of_esper_otel
from esper_tamiyo.cli import command_parser as of_tamiyo
from ops.generate.commands_page import all_commands
from ops.stack.programs import ROOT

START = "docs/index.html"
WORDS = (
    *("circuit breaker", "backoff", "heartbeat", "overhead", "liveness", "troubleshooting"),
    *("getting started", "DDP", "audit log", "hysteresis", "silence", "loss_diverging"),
    *("Slurm", "straggler", "Bearer", "esper.decision.applied"),
)


class Page(HTMLParser):
    """What a page can be linked to at, and where it links to."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.pictures = set(), [], 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.ids |= {told[name] for name in ("id", "name") if told.get(name)}
        self.links += [told[name] for name in ("href", "src") if told.get(name)]
        self.pictures += tag == "img"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as ``make docs`` builds it."""
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site") / "html"
    done = subprocess.run(
        [sys.executable, "-m", "ops.site", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_link_within_the_site_holds(site, pages):
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if to.is_dir():
                to /= "index.html"
            is_there = to.is_file() and (
                not parts.fragment or to not in pages or parts.fragment in pages[to].ids
            )
            if not is_there:
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []
    assert len(pages) > 40


def test_every_page_is_on_the_start_page(site, pages):
    start = site / START
    linked = {(start.parent / urlsplit(link).path).resolve() for link in pages[start].links}
    made = {"genindex.html", "search.html", "index.html"}
    assert {path for path in pages if path.name not in made} - linked - {start} == set()
    assert pages[start].pictures >= 1


def test_every_public_name_has_an_entry(site):
    told = (site / "docs" / "api.html").read_text()
    missing = [
        name
        for name in esper_otel.__all__
        if name != "__version__" and not re.search(rf"<h2>{name}<", told)
    ]
    assert missing == []


def test_every_command_has_an_entry(site):
    told = (site / "docs" / "commands.html").read_text()
    commands = [each.prog for of in (of_esper_otel, of_tamiyo) for each in all_commands(of())]
    assert len(commands) > 20
    assert [name for name in commands if f"<h3>{name}<" not in told] == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served, on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def tab(browser, address):
    """A page; at the end nothing may have been complained of, nor asked of others."""
    complaints, requests = [], []
    context = browser.new_context()
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    yield page
    context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith((address, "data:"))] == []


def test_it_opens_at_the_start_page_and_leads_on(tab, address):
    tab.goto(address)
    tab.wait_for_url(f"**/{START}")
    tab.get_by_role("heading", name="Getting started").wait_for()
    tab.get_by_role("link", name="Troubleshooting").first.click()
    tab.get_by_role("heading", name="Nothing was recorded").wait_for()


def test_search_finds_what_people_look_for(tab, address):
    for word in WORDS:
        tab.goto(f"{address}search.html?q={word}")
        found = tab.locator("#search-results .search li a").first
        found.wait_for()
        assert found.inner_text(), word


def test_what_is_wrong_with_a_page_fails_the_build(tmp_path):
    """In a small copy: a link to nothing, and a page that nobody lists."""
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text())
    (docs / "index.md").write_text("# Start\n\n## All\n\n- [One](one.md): this\n")
    (docs / "one.md").write_text("# One\n\n[nowhere](two.md#there) and [a folder](../none)\n")
    (docs / "lost.md").write_text("# Lost\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(docs)]
    done = subprocess.run(
        [*command, str(tmp_path), str(tmp_path / "site")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "two.md#there" in done.stderr
    assert "../none" in done.stderr
    assert re.search(r"lost\.md.*toctree", done.stderr)
