"""Makes docker/grafana/dashboards, and the same for import by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from ops.generate.dashboards.seeds import seeds
from ops.generate.dashboards.tamiyo import tamiyo
from ops.generate.dashboards.training import training

FOLDER = Path("docker/grafana/dashboards")
BY_HAND = Path("docker/grafana/import")
"""Those that ask for their data source when somebody imports them, which provisioning cannot
answer."""
_INPUT = "DS_PROMETHEUS"
DASHBOARDS = {"training": training, "seeds": seeds, "tamiyo": tamiyo}


def files() -> dict[Path, str]:
    """What is written, by its place in the repository."""
    made = {name: text(make()) for name, make in DASHBOARDS.items()}
    return {FOLDER / f"{name}.json": board for name, board in made.items()} | {
        BY_HAND / f"{name}.json": by_hand(board) for name, board in made.items()
    }


def text(made: Dashboard) -> str:
    """The dashboard as Grafana reads it."""
    built = made.build()
    for number, panel in enumerate(built.panels or (), start=1):
        panel.id_val = number
    return JSONEncoder(indent=1, sort_keys=True).encode(built) + "\n"


def by_hand(board: str) -> str:
    """A dashboard that asks for its data source, and is of no fixed id."""
    told: dict[str, Any] = json.loads(board)
    (source,) = (v for v in told["templating"]["list"] if v["type"] == "datasource")
    kind = source["query"]
    told["__inputs"] = [
        {
            "name": _INPUT,
            "label": source["label"],
            "description": "The Prometheus that has the metrics of trainers and Tamiyo.",
            "type": "datasource",
            "pluginId": kind,
            "pluginName": kind.capitalize(),
        }
    ]
    panels = sorted({panel["type"] for panel in told["panels"] if panel["type"] != "row"})
    told["__requires"] = [
        {"type": "datasource", "id": kind, "name": kind.capitalize(), "version": "1.0.0"},
        *({"type": "panel", "id": panel, "name": panel, "version": ""} for panel in panels),
    ]
    source["current"] = {"text": f"${{{_INPUT}}}", "value": f"${{{_INPUT}}}"}
    told["id"] = None
    return json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
