"""What the demo shows of a network that grows: where each seed is in its life."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from esper_otel.leyline.stages import Stage
from examples.recorded import Tail

STYLES = {Stage.BLENDING: "yellow", Stage.FOSSILIZED: "bold green", Stage.CULLED: "red"}


@dataclass
class Seen:
    """One seed, as its gauges told of it."""

    alpha: float = 0.0
    newest: int = 0
    stages: list[tuple[Stage, int]] = field(default_factory=list)
    """Each stage it has been in, and the step from which on."""


@dataclass
class Growing:
    """What the recording of a growing run has told so far."""

    path: Path
    seeds: dict[str, Seen] = field(default_factory=dict)
    step: int = 0
    loss: float = 0.0
    accuracies: list[float] = field(default_factory=list)
    """Test accuracy as the script printed it, at every change and at the end."""

    def __post_init__(self) -> None:
        self._tail = Tail(self.path)

    def read(self) -> None:
        """Take in what has been recorded since last time."""
        for body in self._tail:
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scope in resource.scope_metrics:
                    self._take(scope.metrics)

    def _take(self, metrics: Any) -> None:
        """The gauges of one step: of the step itself, or of one of its seeds."""
        for metric in metrics:
            for point in metric.gauge.data_points:
                seed = next((a.value.string_value for a in point.attributes), "")
                if metric.name == "tolaria.step":
                    self.step = int(point.as_double)
                elif metric.name == "tolaria.loss_ewma":
                    self.loss = point.as_double
                elif metric.name == "kasmina.seed.alpha":
                    self._seen(seed).alpha = point.as_double
                elif metric.name == "kasmina.seed.stage":
                    seen, stage = self._seen(seed), Stage(int(point.as_double))
                    seen.newest = self.step
                    if not seen.stages or seen.stages[-1][0] is not stage:
                        seen.stages.append((stage, self.step))

    def _seen(self, seed: str) -> Seen:
        return self.seeds.setdefault(seed, Seen())

    def picture(self, *, ended: bool = False) -> Group:
        """Every seed so far, its stage, how much of it is blended in, and its past."""
        table = Table(
            title=f"a network too small, growing: step {self.step}, loss {self.loss:.4f}",
            title_justify="left",
        )
        table.add_column("seed", min_width=16)
        table.add_column("stage", min_width=12)
        table.add_column("alpha", justify="right")
        table.add_column("blended", min_width=12)
        table.add_column("since step")
        for name, seen in self.seeds.items():
            if not seen.stages:
                continue
            stage = seen.stages[-1][0]
            gone = self.step - seen.newest > 1
            told = Text("culled", "red") if gone else Text(stage.name, STYLES.get(stage, ""))
            past = " → ".join(f"{each.name.lower()} {since}" for each, since in seen.stages)
            blended = "" if gone else "█" * round(12 * seen.alpha)
            table.add_row(name, told, f"{seen.alpha:.2f}", Text(blended, "green"), past)
        return Group(table, Text())

    def tell(self, console: Console) -> None:
        """What became of it, in a line."""
        fossils = [
            name
            for name, seen in self.seeds.items()
            if seen.stages and seen.stages[-1][0] is Stage.FOSSILIZED
        ]
        if self.accuracies:
            console.print(
                f"\nThe network that was too small: seeds germinated: {len(self.seeds)}, "
                f"became part of it: {len(fossils)} ({', '.join(fossils) or 'none'}); "
                f"test accuracy {self.accuracies[0]:.1%} when the first germinated, "
                f"{self.accuracies[-1]:.1%} at the end.",
                highlight=False,
            )
