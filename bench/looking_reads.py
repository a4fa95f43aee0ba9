"""What a tool gives back of the runs that ``bench.looking_runs`` recorded.

``python bench/looking_reads.py TOOL FOLDER NAME`` prints a line of JSON: the version of the
tool, how many steps have a loss, and what is read of the one that was NaN. By the tool's own
library, in the environment that it is installed in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

NAN_AT = 200

Losses = dict[int, object]
"""Step → loss, as it is read."""


def esper(folder: Path, name: str) -> Losses:
    """A step whose loss was not finite has none, and a count of what was left out."""
    from esper_otel.stream import read_frames

    found: Losses = {}
    for path in sorted(folder.rglob("*.metrics.otlp")):
        for frame in read_frames(path):
            left_out = f"left out, {frame.values.get('nonfinite', 0.0):g} counted"
            found[frame.step] = frame.values.get("loss", left_out)
    return found


def traceml(folder: Path, name: str) -> Losses:
    """It is told no loss: the steps that its summary is about."""
    (path,) = folder.rglob("final_summary.json")
    told = json.loads(path.read_text())
    count = int(told["step_time"]["global"]["window"]["steps_analyzed"])
    return dict.fromkeys(range(count), "not told")


def wandb(folder: Path, name: str) -> Losses:
    store: Any = import_module("wandb.sdk.internal.datastore").DataStore()
    records: Any = import_module("wandb.proto.wandb_internal_pb2")
    found: Losses = {}
    for path in folder.rglob("*.wandb"):
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = records.Record()
            record.ParseFromString(data)
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if "loss" in items:
                found[int(items["_step"])] = items["loss"]
    return found


def tensorboard(folder: Path, name: str) -> Losses:
    module: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / name), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def aim(folder: Path, name: str) -> Losses:
    tool: Any = import_module("aim")
    sequences: Any = import_module("aim.storage.context")
    for run in tool.Repo(str(folder)).iter_runs():
        if run.name == name:
            metric = run.get_metric("loss", sequences.Context({}))
            steps, values = metric.values.sparse_numpy()
            return dict(zip(map(int, steps), values.tolist(), strict=True))
    return {}


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
    told = {
        "version": metadata.version(distribution),
        "steps": len(found),
        "nan": str(found.get(NAN_AT, "no such step")),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
