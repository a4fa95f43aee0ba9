"""Makes docker/grafana/dashboards."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from ops.generate.dashboards.seeds import seeds
from ops.generate.dashboards.tamiyo import tamiyo
from ops.generate.dashboards.training import training

FOLDER = Path("docker/grafana/dashboards")
DASHBOARDS = {"training": training, "seeds": seeds, "tamiyo": tamiyo}


def files() -> dict[Path, str]:
    """What is written, by its place in the repository."""
    return {FOLDER / f"{name}.json": text(make()) for name, make in DASHBOARDS.items()}


def text(made: Dashboard) -> str:
    """The dashboard as Grafana reads it."""
    built = made.build()
    for number, panel in enumerate(built.panels or (), start=1):
        panel.id_val = number
    return JSONEncoder(indent=1, sort_keys=True).encode(built) + "\n"
