"""The picture of a report in the docs: ``python -m ops.report_picture RUN … [-o FILE]``.

Makes the report, opens it in the browser of the tests, chooses a decision and takes a
screenshot of what a person sees first. ``make demo`` leaves recordings for it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from esper_otel.report import ReportError, write_report
from ops.stack.programs import CHROMIUM, ROOT, MissingError, find

PICTURE = ROOT / "docs" / "pictures" / "report.png"
WIDTH, HEIGHT = 1600, 1150


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", dest="output", type=Path, default=PICTURE)
    options = parser.parse_args()
    try:
        take(options.runs, options.output)
    except (ReportError, MissingError, ImportError) as error:
        print(f"report_picture: {error}", file=sys.stderr)
        return 1
    print(options.output)
    return 0


def take(runs: list[Path], to: Path) -> None:
    """Write the picture; raises when there is no browser or nothing to show."""
    from playwright.sync_api import sync_playwright

    program = find(CHROMIUM)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder, "report.html")
        write_report(runs, page)
        browser = playwright.chromium.launch(executable_path=str(program))
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        tab.goto(page.as_uri())
        tab.wait_for_selector("html[data-drawn=all]", state="attached")
        tab.keyboard.press("n")
        tab.screenshot(path=str(to))
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
