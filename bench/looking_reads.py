"""What a tool gives back of the runs that ``bench.looking_runs`` recorded.

``python bench/looking_reads.py TOOL FOLDER NAME`` prints a line of JSON: the version of the
tool, how many steps have a loss, and what is read of the one that was NaN. By the tool's own
library, in the environment that it is installed in.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

Losses = list[object]
"""Of each step its loss, as it is read."""


def esper(folder: Path, name: str) -> Losses:
    """A step whose loss was not finite has none, and a count of what was left out."""
    from esper_otel.stream import read_frames

    path = min(folder.rglob("*.metrics.otlp"))  # the first that was begun
    left_out = "left out and counted"
    return [
        frame.values.get("loss", left_out if frame.values.get("nonfinite") else "absent")
        for frame in read_frames(path)
    ]


def traceml(folder: Path, name: str) -> Losses:
    """It is told no loss: the steps that its summary is about."""
    told = json.loads((folder / name / "final_summary.json").read_text())
    count = int(told["step_time"]["global"]["window"]["steps_analyzed"])
    return ["takes no losses"] * count


def wandb(folder: Path, name: str) -> Losses:
    """By ``wandb leet inspect``, which prints the records of a run as JSON."""
    program = Path(sys.executable).with_name("wandb")
    found: Losses = []
    for path in sorted(folder.rglob("*.wandb")):
        told = subprocess.check_output([program, "leet", "inspect", "--json", path], text=True)
        lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
        title = [str(line) for line in lines if line["type"] == "run"]
        if title and repr(name) not in title[0]:
            continue
        for line in lines:
            if line["type"] == "history" and "loss" in (item := line["history"]["item"]):
                found.append(item["loss"])
    return found


def tensorboard(folder: Path, name: str) -> Losses:
    module: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / name), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


def aim(folder: Path, name: str) -> Losses:
    tool: Any = import_module("aim")
    sequences: Any = import_module("aim.storage.context")
    for run in tool.Repo(str(folder)).iter_runs():
        if run.name == name:
            metric = run.get_metric("loss", sequences.Context({}))
            _, values = metric.values.sparse_numpy()
            return list(values.tolist())
    return []


def mlflow(folder: Path, name: str) -> Losses:
    tool: Any = import_module("mlflow")
    client = tool.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'looking'")
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return {
        each.step: each.value for each in client.get_metric_history(run.info.run_id, "loss")
    }


READERS: dict[str, tuple[str, Callable[[Path, str], Losses]]] = {
    "esper": ("esper-otel", esper),
    "traceml": ("traceml-ai", traceml),
    "wandb": ("wandb", wandb),
    "tensorboard": ("tensorboard", tensorboard),
    "aim": ("aim", aim),
    "mlflow": ("mlflow", mlflow),
}
"""Tool → its distribution, and how it is read."""


def main() -> None:
    tool, folder, name = sys.argv[1:4]
    distribution, read = READERS[tool]
    found = read(Path(folder).resolve(), name)
    odd = {str(loss) for loss in found if not isinstance(loss, float) or loss != loss}
    told = {
        "version": metadata.version(distribution),
        "steps": len(found),
        "of one that was NaN": sorted(odd),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
