"""The demo: one script, one accident, twice; once only watched and once rescued. Then one
network that is too small for its task, and grows.

Starts a Tamiyo sidecar and runs ``digits.py``, which knows nothing of it, under
``esper-otel run``, and after that ``grow.py``, whose seeds take every step by Tamiyo's
consent. What is shown while they run is read from the OTLP that the runs record, as any
backend would get it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from examples.demo_seeds import Growing
from examples.recorded import Tail

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SCRIPT = HERE / "digits.py"
ROWS = 12
PHASES = {
    "input_wait_ms": ("input", "yellow"),
    "forward_ms": ("forward", "green"),
    "backward_ms": ("backward", "blue"),
    "optimizer_ms": ("optimizer", "magenta"),
    "hook_latency_ms": ("esper", "red"),
}
ACTION_STYLE = {"PAUSE": "red", "OPTIMIZER": "bold yellow", "UPDATE": "bold yellow"}

SHOW = os.path.relpath(BIN / "esper-otel")

console = Console()


@dataclass
class Told:
    """One decision other than CONTINUE, as its span tells it."""

    step: int
    action: str
    rule: str
    applied: bool
    values: dict[str, float]

    def seen(self) -> str:
        """The values the rule saw, in words."""
        return ", ".join(f"{key} {value:.4g}" for key, value in self.values.items())


def seen_by(span: Any, rule: str) -> dict[str, float]:
    """The values behind the finding of ``rule`` among the events of a span."""
    for event in span.events:
        finding = {a.key: a.value for a in event.attributes}
        if (
            "esper.finding.rule" in finding
            and finding["esper.finding.rule"].string_value == rule
        ):
            return {
                key.removeprefix("esper.finding.value."): value.double_value
                for key, value in finding.items()
                if key.startswith("esper.finding.value.")
            }
    return {}


def bar(values: dict[str, float], width: int) -> Text:
    """Where the step's time went, each phase in its colour."""
    total = values.get("step_latency_ms", 0.0)
    text = Text()
    if total > 0:
        for key, (_, colour) in PHASES.items():
            text.append("█" * round(width * values.get(key, 0.0) / total), style=colour)
    return text


@dataclass
class Observed:
    """What the recording of one run has told so far."""

    mode: str
    folder: Path
    steps: list[dict[str, float]] = field(default_factory=list)
    told: dict[int, Told] = field(default_factory=dict)
    accuracy: float | None = None

    def __post_init__(self) -> None:
        stem = f"digits-{self.mode}-rank0"
        self.metrics = Tail(self.folder / f"{stem}.metrics.otlp")
        self.traces = Tail(self.folder / f"{stem}.traces.otlp")

    @property
    def accident(self) -> int | None:
        """The first step at which the script's own rate is the faulty one."""
        rates = [step["optimizer_lr"] / step.get("lr_scale", 1.0) for step in self.steps]
        for before, after, step in zip(rates, rates[1:], self.steps[1:], strict=False):
            if after > 10 * before:
                return int(step["step"])
        return None

    def newest(self) -> list[dict[str, float]]:
        """Every 20th step, and every one with a decision."""
        worth = [s for s in self.steps if s["step"] % 20 == 0 or int(s["step"]) in self.told]
        return worth[-ROWS:]

    def story(self) -> list[dict[str, float]]:
        """The steps around the accident, those with the decisions after it, and the end."""
        accident = self.accident
        if accident is None:
            return self.newest()
        decided = [step for step in sorted(self.told) if step > accident][: ROWS - 6]
        steps = {accident - 1, accident, *decided}
        last = [s for s in self.steps if s["step"] % 20 == 0][len(steps) - ROWS :]
        before = [s for s in self.steps if s["step"] in steps and s["step"] < last[0]["step"]]
        return before + last

    def read(self) -> None:
        """Take in what has been recorded since last time."""
        for body in self.metrics:
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scope in resource.scope_metrics:
                    values = {
                        metric.name.removeprefix("tolaria."): metric.gauge.data_points[
                            0
                        ].as_double
                        for metric in scope.metrics
                    }
                    if "step" in values:
                        self.steps.append(values)
        for body in self.traces:
            for spans in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope_spans in spans.scope_spans:
                    for span in scope_spans.spans:
                        if span.name == "tamiyo.decide":
                            self._take_decision(span)
                        elif span.name == "train.step":
                            self._take_update(span)

    def _take_decision(self, span: Any) -> None:
        said = {a.key: a.value for a in span.attributes}
        action = said["esper.decision.action"].string_value
        if action == "CONTINUE":
            return
        rule = said["esper.decision.reason"].string_value
        values = seen_by(span, rule)
        step = int(said["esper.decision.id"].string_value.rsplit("/", 1)[1])
        applied = said["esper.decision.applied"].bool_value
        self.told[step] = Told(step, action, rule, applied, values)

    def _take_update(self, span: Any) -> None:
        """What was decided about the update of a step before it was made."""
        said = {a.key: a.value for a in span.attributes}
        if "esper.update.reason" not in said:
            return
        rule, step = said["esper.update.reason"].string_value, said["esper.step"].int_value
        self.told[step] = Told(step, "UPDATE", rule, True, seen_by(span, rule))

    def picture(self, *, ended: bool = False) -> Group:
        """The newest steps, oldest first; once it has ended, how it came to its end."""
        legend = Text("step time: ")
        for name, colour in PHASES.values():
            legend.append(f"█ {name} ", style=colour)
        how = {"advise": "decisions are only reported", "enforce": "decisions are applied"}
        table = Table(title=f"digits, {self.mode}: {how[self.mode]}", title_justify="left")
        # Where there is little room the numbers stay whole, and the rest makes do.
        wide = console.width >= 110
        for column in ("step", "loss", "gradient", "lr", "ms"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("step time", min_width=26 if wide else 12, no_wrap=True)
        table.add_column("Tamiyo", min_width=34 if wide else 16)
        for values in self.story() if ended else self.newest():
            told = self.told.get(int(values["step"]))
            table.add_row(
                f"{values['step']:.0f}",
                f"{values['loss']:.4f}" if "loss" in values else "not finite",
                f"{values['gradient_norm']:.3g}" if "gradient_norm" in values else "not finite",
                f"{values['optimizer_lr']:.2g}",
                f"{values['step_latency_ms']:.2f}" if "step_latency_ms" in values else "",
                bar(values, 24 if wide else 10),
                Text(f"{told.action}  {told.rule}", style=ACTION_STYLE.get(told.action, ""))
                if told
                else Text("CONTINUE", style="dim"),
            )
        return Group(table, legend, Text())


def ended(process: subprocess.Popen[str]) -> None:
    """End a process of ours, politely and then not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def sidecar(folder: Path) -> Iterator[tuple[Path, str]]:
    """A living sidecar: its socket and the address of its OTLP receiver."""
    socket = folder / "tamiyo.sock"
    command = [str(BIN / "tamiyo"), "serve", "--socket", str(socket)]
    command += ["--otlp-http", "127.0.0.1:0", "--otlp-grpc", "127.0.0.1:0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit("the sidecar did not start")
        status = subprocess.run(
            [str(BIN / "tamiyo"), "status", "--json", "--socket", str(socket)],
            check=True,
            capture_output=True,
            text=True,
        )
        yield socket, json.loads(status.stdout)["ingest"]["otlp_http"]
    finally:
        ended(process)


class Shown(Protocol):
    """A run as its recording tells of it."""

    def read(self) -> None:
        """Take in what has been recorded since last time."""

    def picture(self, *, ended: bool = False) -> Group:
        """What there is to see of it."""


def train(mode: str, epochs: int, folder: Path, socket: Path, otlp: str) -> Observed:
    """Run the script under ``mode``; what its telemetry said."""
    run = Observed(mode, folder)
    options = ["--mode", mode, "--run-id", f"digits-{mode}"]
    output = show(run, options, [str(SCRIPT), "--epochs", str(epochs)], folder, socket, otlp)
    run.accuracy = float(output.rsplit("test accuracy", 1)[1].split()[0])
    return run


def grow(epochs: int, folder: Path, socket: Path, otlp: str) -> Growing:
    """Let a network grow by Tamiyo's consent; what its telemetry said."""
    run = Growing(folder / "grow-rank0.metrics.otlp")
    options = ["--mode", "enforce", "--run-id", "grow"]
    script = ["-m", "examples.grow", "--asked", "--epochs", str(epochs)]
    output = show(run, options, script, folder, socket, otlp)
    run.accuracies = [float(told.split()[0]) for told in output.split("test accuracy")[1:]]
    return run


def show(
    run: Shown, options: list[str], script: list[str], folder: Path, socket: Path, otlp: str
) -> str:
    """Run a script, instrumented, with a live picture of its telemetry; its output."""
    command = [str(BIN / "esper-otel"), "run", "--socket", str(socket)]
    command += ["--record", str(folder), *options, *script]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{otlp}"}
    environment |= {"PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the demo, which ends its own
    )
    try:
        with Live(run.picture(), console=console, refresh_per_second=10) as live:
            while process.poll() is None:
                time.sleep(0.1)
                run.read()
                live.update(run.picture())
            run.read()
            live.update(run.picture(ended=True))
        assert process.stdout is not None
        output = process.stdout.read()
    finally:
        ended(process)
    if process.returncode:
        raise SystemExit(f"{' '.join(script)} ended with {process.returncode}:\n{output}")
    return output


def steps(count: int) -> str:
    """So many steps, in words."""
    return f"{count} step" + ("" if count == 1 else "s")


def summary(runs: list[Observed]) -> None:
    """Both runs side by side, and how the second was rescued."""
    table = Table(title="The same script, seed and accident", title_justify="left")
    for column in ("mode", "test accuracy", "decisions", "applied", "noticed after"):
        table.add_column(column, justify="right")
    for run in runs:
        accident = run.accident
        after = [step for step in run.told if accident is not None and step >= accident]
        table.add_row(
            run.mode,
            f"{run.accuracy:.1%}",
            str(len(run.told)),
            str(sum(told.applied for told in run.told.values())),
            steps(min(after) - accident) if accident is not None and after else "-",
        )
    console.print(table)
    rescued = runs[-1]
    accident = rescued.accident
    if accident is not None:
        console.print(
            f"The schedule multiplied the learning rate by 50 at step {accident}. "
            f"Tamiyo's first answers in {rescued.mode}:"
        )
        for told in [told for step, told in sorted(rescued.told.items()) if step >= accident][
            :6
        ]:
            console.print(
                f"  step {told.step} (+{told.step - accident})  {told.action}  "
                f"[bold]{told.rule}[/bold]  {told.seen()}",
                highlight=False,
                soft_wrap=True,
            )
    console.print(f"\nRecorded OTLP: {rescued.folder}", highlight=False)
    console.print(f"Look at it:    {SHOW} show {rescued.metrics.path}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="of each of the two runs")
    parser.add_argument("--growing-epochs", type=int, default=80, help="of the run that grows")
    parser.add_argument("--picture", metavar="FILE", help="also write the output as SVG")
    options = parser.parse_args()
    console.record = options.picture is not None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path("recordings") / f"demo-{stamp}"
    folder.mkdir(parents=True)
    try:
        with (
            tempfile.TemporaryDirectory() as run_folder,
            sidecar(Path(run_folder)) as (socket, otlp),
        ):
            runs = [
                train(mode, options.epochs, folder, socket, otlp)
                for mode in ("advise", "enforce")
            ]
            grown = grow(options.growing_epochs, folder, socket, otlp)
    except KeyboardInterrupt:
        console.print("\nended; what was recorded lies in", str(folder))
        return 130
    summary(runs)
    grown.tell(console)
    if options.picture:
        console.save_svg(options.picture, title="make demo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
