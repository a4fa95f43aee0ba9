"""Writes every committed file that follows from the code; ``--check`` only compares.

The status is 1 when ``--check`` finds one that is not what the code makes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ops.generate import (
    api_page,
    commands_page,
    metrics_page,
    modules_page,
    own_metrics_page,
    prometheus_assets,
    settings_page,
    table_page,
    table_schema,
    wire_page,
)
from ops.generate.alerts import rules
from ops.generate.alerts.alert import RUNBOOK_URL
from ops.generate.dashboards import json_files
from ops.generate.files import COMMAND, ROOT, bring_up_to_date

GENERATORS = (
    api_page.files,
    commands_page.files,
    metrics_page.files,
    modules_page.files,
    settings_page.files,
    table_page.files,
    table_schema.files,
    own_metrics_page.files,
    prometheus_assets.files,
    json_files.files,
    wire_page.files,
)


def files(runbook_url: str = RUNBOOK_URL) -> dict[Path, str]:
    """All that is made, by its place in the repository."""
    made = rules.files(runbook_url)
    for generator in GENERATORS:
        made |= generator()
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Write what differs, or name it; the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--folder", type=Path, default=ROOT, help="default: %(default)s")
    parser.add_argument(
        "--runbook-url",
        type=_url,
        metavar="URL",
        help="where the links of alerts lead (default: to the copy that Prometheus serves)",
    )
    options = parser.parse_args(argv)
    everything = files(options.runbook_url or RUNBOOK_URL)
    made = {options.folder / place: fresh for place, fresh in everything.items()}
    return bring_up_to_date(made, COMMAND, check=options.check)


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")) or "#" in text:
        raise argparse.ArgumentTypeError(
            f"{text}: expected an address such as https://wiki.example/esper/runbook"
        )
    return text.rstrip("/")


if __name__ == "__main__":
    sys.exit(main())
