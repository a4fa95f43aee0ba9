"""Writes docker/grafana/dashboards; with ``--check`` only says whether that is due."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards.seeds import seeds
from dashboards.tamiyo import tamiyo
from dashboards.training import training
from esper_otel.leyline.generated import bring_up_to_date

FOLDER = Path(__file__).parent.parent / "docker" / "grafana" / "dashboards"
DASHBOARDS = {"training": training, "seeds": seeds, "tamiyo": tamiyo}


def text(made: Dashboard) -> str:
    """The dashboard as Grafana reads it."""
    built = made.build()
    for number, panel in enumerate(built.panels or (), start=1):
        panel.id_val = number
    return JSONEncoder(indent=1, sort_keys=True).encode(built) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write what differs, or name it; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dashboards", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    options = parser.parse_args(argv)
    made = {options.folder / f"{name}.json": text(make()) for name, make in DASHBOARDS.items()}
    return bring_up_to_date(made, "python -m dashboards", check=options.check)


if __name__ == "__main__":
    sys.exit(main())
