"""Writes every committed file that follows from the code; ``--check`` only compares.

The status is 1 when ``--check`` finds one that is not what the code makes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ops.generate import (
    metrics_page,
    modules_page,
    own_metrics_page,
    settings_page,
    table_page,
    table_schema,
)
from ops.generate.alerts import rules
from ops.generate.dashboards import json_files
from ops.generate.files import COMMAND, ROOT, bring_up_to_date

GENERATORS = (
    metrics_page.files,
    modules_page.files,
    settings_page.files,
    table_page.files,
    table_schema.files,
    own_metrics_page.files,
    rules.files,
    json_files.files,
)


def files() -> dict[Path, str]:
    """All that is made, by its place in the repository."""
    made: dict[Path, str] = {}
    for generator in GENERATORS:
        made |= generator()
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Write what differs, or name it; the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--folder", type=Path, default=ROOT, help="default: %(default)s")
    options = parser.parse_args(argv)
    made = {options.folder / place: fresh for place, fresh in files().items()}
    return bring_up_to_date(made, COMMAND, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
