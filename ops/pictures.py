"""Makes the pictures of the docs anew: ``python -m ops.pictures [NAME …]``; all take minutes.

Beside the pictures lies ``made_from.json``: of each, a digest of the picture and of the files
that decide what it shows. ``--check`` compares, and names a picture that is stale, or was
changed by hand; it draws nothing. Docstrings, comments and blank lines of Python are no part
of a digest.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ops.stack.programs import CHROMIUM, MissingError, find

ROOT = Path(__file__).parent.parent
COMMAND = "python -m ops.pictures"
RECORD = Path("docs/pictures/made_from.json")
RECORDINGS = ROOT / "recordings"
BIN = Path(sys.executable).parent

WIDTH, ROWS = 110, 34
"""Of the terminal that is drawn, in characters."""

_TOP = tuple(
    f"src/esper_otel/top/{name}.py" for name in ("picture", "charts", "rows", "screen")
)


class PictureError(Exception):
    """A picture that cannot be made: what to do, in one line."""


class Picture(NamedTuple):
    """What is drawn at once: the files it makes, what they show, and how they are made."""

    makes: tuple[str, ...]
    shows: tuple[str, ...]
    make: Callable[[], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Make pictures, or compare; the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}")
    parser.add_argument("--check", action="store_true", help="compare, and draw nothing")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in PICTURES]:
        parser.error(f"{unknown[0]}: expected some of {', '.join(PICTURES)}")
    wanted = {name: PICTURES[name] for name in options.names or PICTURES}
    if options.check:
        stale = list(faults(wanted))
        for fault in stale:
            print(fault, file=sys.stderr)
        return 1 if stale else 0
    for name, picture in wanted.items():
        try:
            picture.make()
        except (
            MissingError,
            PictureError,
            ImportError,
            subprocess.CalledProcessError,
        ) as error:
            print(f"pictures: {name}: {error}", file=sys.stderr)
            return 1
        _note(name, picture)
        print("\n".join(picture.makes))
    return 0


def faults(pictures: Mapping[str, Picture], root: Path = ROOT) -> Iterator[str]:
    """What is wrong with pictures, each in a line that says what to run."""
    record = json.loads((root / RECORD).read_text(encoding="utf-8"))
    for name, picture in pictures.items():
        noted = record.get(name, {})
        if noted.get("shows") != digest(picture.shows, root):
            yield f"{', '.join(picture.makes)}: stale; run {COMMAND} {name}"
        elif noted.get("makes") != digest(picture.makes, root):
            yield f"{', '.join(picture.makes)}: not what was made; run {COMMAND} {name}"


def digest(places: Sequence[str], root: Path = ROOT) -> str:
    """Of the content of files, in short; a file that is missing counts as empty."""
    made = hashlib.sha256()
    for place in places:
        path = root / place
        data = path.read_bytes() if path.exists() else b""
        made.update(_code_of(data.decode()) if path.suffix == ".py" else data)
        made.update(b"\0")
    return made.hexdigest()[:16]


def _code_of(source: str) -> bytes:
    """Lines of Python that do something."""
    lines: list[str | None] = list(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and _is_text(node.value):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = None
    kept = (line for line in lines if line and line.strip() and line.strip()[0] != "#")
    return "\n".join(kept).encode()


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _note(name: str, picture: Picture) -> None:
    path = ROOT / RECORD
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record[name] = {"makes": digest(picture.makes), "shows": digest(picture.shows)}
    told = json.dumps({name: record[name] for name in sorted(record)}, indent=2)
    path.write_text(f"{told}\n", encoding="utf-8")


# How each is made.

_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For trainings this small; several threads only wait for one another on a busy machine."""


def _demo() -> None:
    """The output of ``make demo``, which leaves the recordings that others are drawn from."""
    path = ROOT / "docs" / "demo.svg"
    command = [sys.executable, "-m", "examples.demo", "--picture", str(path)]
    environment = os.environ | {"COLUMNS": "100", "LINES": "40", **_ONE_THREAD}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)
    path.write_text(without_fonts(path.read_text(encoding="utf-8")), encoding="utf-8")


def without_fonts(svg: str) -> str:
    """A picture of rich's that fetches no font from elsewhere."""
    return re.sub(r"\s*@font-face \{.*?\n    \}", "", svg, flags=re.DOTALL)


def _recording() -> Path:
    """What the newest demo has recorded."""
    found = sorted(RECORDINGS.glob("demo-*"))
    if not found:
        raise PictureError(f"no recording of the demo; run {COMMAND} demo")
    return found[-1]


def _report() -> None:
    from ops.report_picture import PICTURE, take

    take([_recording()], PICTURE)


def _top() -> None:
    """The live view of the run that was rescued, as a terminal shows it."""
    from rich.console import Console

    from esper_otel.top.choice import Choice
    from esper_otel.top.picture import snapshot
    from esper_otel.top.screen import text_of
    from esper_otel.top.sources import RecordedSource

    source = RecordedSource([_recording()])
    source.read(0.0, lambda _: None)
    runs = [run for run in source.runs() if run.name == "digits-enforce"]
    rows = snapshot(runs, Choice("digits-enforce"), WIDTH, ROWS)
    console = Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True)
    console.print(text_of(rows))
    svg = console.export_svg(title="esper-otel top")
    (ROOT / "docs" / "pictures" / "top.svg").write_text(without_fonts(svg), encoding="utf-8")


def _page() -> None:
    """The sidecar's page of a run that has been trained before it."""
    from playwright.sync_api import sync_playwright

    program = find(CHROMIUM)
    with _sidecar() as (socket, otlp, page), sync_playwright() as playwright:
        environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{otlp}"}
        environment |= {"OTEL_TRACES_EXPORTER": "none", **_ONE_THREAD}
        command = [str(BIN / "esper-otel"), "run", "--socket", socket, "--run-id", "digits"]
        command += ["--enforce", "--quiet", "-m", "examples.digits", "--epochs", "40"]
        subprocess.run(
            command, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL
        )
        browser = playwright.chromium.launch(executable_path=str(program))
        tab = browser.new_page(viewport={"width": 1300, "height": 1000})
        tab.goto(page)
        tab.get_by_role("link", name="digits", exact=True).click()
        tab.wait_for_selector("html[data-drawn=all]", state="attached")
        tab.keyboard.press("n")
        tab.screenshot(path=str(ROOT / "docs" / "pictures" / "ui.png"))
        browser.close()


@contextmanager
def _sidecar() -> Iterator[tuple[str, str, str]]:
    """A sidecar: its socket, where it takes OTLP, and the address of its page."""
    with tempfile.TemporaryDirectory() as folder:
        socket = str(Path(folder, "t.sock"))
        command = [str(BIN / "tamiyo"), "serve", "--socket", socket, "--ui", "127.0.0.1:0"]
        command += ["--otlp-http", "127.0.0.1:0", "--otlp-grpc", "127.0.0.1:0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            words = dict(word.partition("=")[::2] for word in ready.split() if "=" in word)
            yield socket, words["otlp_http"], words["ui"]
        finally:
            process.terminate()
            process.wait(10)


def _dashboards() -> None:
    from ops.generate.dashboards import pictures

    if pictures.main([]):
        raise PictureError("the stack cannot run here")


_PAGE_FILES = tuple(
    f"src/esper_otel/report/page/{name}"
    for name in ("page.html", "report.css", "elements.js", "report.js")
)
_DEMO = ("examples/demo.py", "examples/digits.py", "examples/grow.py")
_DASHBOARDS = ("seeds", "tamiyo", "training")

PICTURES = {
    "demo": Picture(
        ("docs/demo.svg",), ("examples/demo.py", "examples/digits.py", *_TOP), _demo
    ),
    "report": Picture(("docs/pictures/report.png",), _PAGE_FILES, _report),
    "top": Picture(("docs/pictures/top.svg",), _TOP, _top),
    "page": Picture(("docs/pictures/ui.png",), _PAGE_FILES, _page),
    "dashboards": Picture(
        tuple(f"docs/pictures/{name}.png" for name in _DASHBOARDS),
        (
            *(f"docker/grafana/dashboards/{name}.json" for name in _DASHBOARDS),
            "ops/generate/dashboards/pictures.py",
            "ops/generate/dashboards/sample_run.py",
        ),
        _dashboards,
    ),
}
"""What there is, in the order in which it is made: the first records what others show."""


if __name__ == "__main__":
    sys.exit(main())
