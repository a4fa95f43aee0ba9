"""The demo: one script with one injected fault, run twice: recorded only, and corrected. Then
a network that is too small for its task, and grows.

It starts a Tamiyo sidecar and runs the unchanged ``digits.py`` under ``esper-otel run``, and
after that ``grow.py``, whose seeds need Tamiyo's consent for every operation. While they run,
it shows the picture of ``esper-otel top``, made from the OTLP that the runs record, as any
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from esper_otel.leyline.stages import Stage
from esper_otel.report.rulings import CONTINUE, Ruling
from esper_otel.top.choice import Choice
from esper_otel.top.picture import snapshot
from esper_otel.top.screen import text_of
from esper_otel.top.sources import RecordedSource
from esper_otel.top.watched import WatchedRun

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SCRIPT = HERE / "digits.py"
EVERY_S = 0.25
ROWS = 24
TITLES = {
    "digits-advise": "digits, advise: decisions are only reported",
    "digits-enforce": "digits, enforce: decisions are applied",
    "grow": "a network too small, growing",
}

TOOL = os.path.relpath(BIN / "esper-otel")

console = Console()


@dataclass
class Ended:
    """A run that is over: what its telemetry said, and the test accuracies that it printed."""

    run: WatchedRun
    accuracies: list[float]

    @property
    def told(self) -> dict[int, Ruling]:
        """The decisions other than CONTINUE, by step."""
        return {each.step: each for each in self.run.rulings if each.action != CONTINUE}

    @property
    def accident(self) -> int | None:
        """The first step at which the script's own rate is the faulty one."""
        rates, scales = self._values("optimizer_lr"), self._values("lr_scale")
        own = [(step, rate / scales.get(step, 1.0)) for step, rate in rates.items()]
        for (_, before), (step, after) in pairwise(own):
            if after > 10 * before:
                return step
        return None

    def _values(self, key: str) -> dict[int, float]:
        curve = self.run.lead and self.run.lead.curve(key)
        if not curve:
            return {}
        steps, values = curve.points()
        return dict(zip(steps.tolist(), values.tolist(), strict=True))


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


def train(
    name: str, options: list[str], script: list[str], folder: Path, sidecar: tuple[Path, str]
) -> Ended:
    """Run a script, instrumented, with a live picture of its telemetry; what it said."""
    socket, otlp = sidecar
    command = [str(BIN / "esper-otel"), "run", "--socket", str(socket), "--run-id", name]
    command += ["--record", str(folder), *options, *script]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{otlp}"}
    environment |= {"PYTHONPATH": str(HERE.parent)}
    source = RecordedSource([folder])
    console.print(f"[bold]{TITLES[name]}[/bold]", highlight=False)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the demo, which ends its own
    )
    try:
        with Live(console=console, auto_refresh=False) as live:
            running = True
            while running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(EVERY_S)
                running = process.poll() is None
                source.refresh(name, 0, time.monotonic())
                mine = [run for run in source.runs() if run.name == name]
                rows = snapshot(mine, Choice(name), console.width, min(console.height, ROWS))
                live.update(text_of(rows), refresh=True)
        assert process.stdout is not None
        output = process.stdout.read()
    finally:
        ended(process)
    if process.returncode:
        raise SystemExit(f"{' '.join(script)} ended with {process.returncode}:\n{output}")
    console.print()
    return Ended(mine[0], [float(t.split()[0]) for t in output.split("test accuracy")[1:]])


def steps(count: int) -> str:
    """So many steps, in words."""
    return f"{count} step" + ("" if count == 1 else "s")


def seen(ruling: Ruling) -> str:
    """The values that the rule saw, in words."""
    for ground in ruling.findings:
        if ground.rule == ruling.reason:
            return ", ".join(f"{key} {value:.4g}" for key, value in ground.values.items())
    return ""


def summary(runs: list[Ended], folder: Path) -> None:
    """Both runs side by side, and how the second was rescued."""
    table = Table(title="The same script, seed and accident", title_justify="left")
    for column in ("mode", "test accuracy", "decisions", "applied", "noticed after"):
        table.add_column(column, justify="right")
    for each in runs:
        accident, told = each.accident, each.told
        after = [step for step in told if accident is not None and step >= accident]
        table.add_row(
            each.run.name.removeprefix("digits-"),
            f"{each.accuracies[-1]:.1%}",
            str(len(told)),
            str(sum(bool(ruling.applied) for ruling in told.values())),
            steps(min(after) - accident) if accident is not None and after else "-",
        )
    console.print(table)
    rescued = runs[-1]
    accident = rescued.accident
    if accident is not None:
        console.print(
            f"The schedule multiplied the learning rate by 50 at step {accident}. "
            f"Tamiyo's first answers in enforce:"
        )
        first = [ruling for step, ruling in sorted(rescued.told.items()) if step >= accident]
        for ruling in first[:6]:
            console.print(
                f"  step {ruling.step} (+{ruling.step - accident})  "
                f"{'UPDATE' if ruling.of_update else ruling.action}  "
                f"[bold]{ruling.reason}[/bold]  {seen(ruling)}",
                highlight=False,
                soft_wrap=True,
            )
    console.print(f"\nRecorded OTLP: {folder}", highlight=False)
    console.print(f"Look at it:    {TOOL} top {folder}", highlight=False)


def tell_growth(grown: Ended) -> None:
    """What became of the network that was too small, in a line."""
    seeds = grown.run.lead.seeds() if grown.run.lead else []
    fossils = [seed.name for seed in seeds if seed.stages[-1][0] is Stage.FOSSILIZED]
    if grown.accuracies:
        console.print(
            f"\nThe network that was too small: seeds germinated: {len(seeds)}, "
            f"became part of it: {len(fossils)} ({', '.join(fossils) or 'none'}); "
            f"test accuracy {grown.accuracies[0]:.1%} when the first germinated, "
            f"{grown.accuracies[-1]:.1%} at the end.",
            highlight=False,
        )


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
    digits = [str(SCRIPT), "--epochs", str(options.epochs)]
    growing = ["-m", "examples.grow", "--asked", "--epochs", str(options.growing_epochs)]
    try:
        with tempfile.TemporaryDirectory() as run_folder, sidecar(Path(run_folder)) as running:
            runs = [
                train(f"digits-{mode}", ["--mode", mode], digits, folder, running)
                for mode in ("advise", "enforce")
            ]
            grown = train("grow", ["--mode", "enforce"], growing, folder, running)
    except KeyboardInterrupt:
        console.print("\nended; the recordings are in", str(folder))
        return 130
    summary(runs, folder)
    tell_growth(grown)
    if options.picture:
        console.save_svg(options.picture, title="make demo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
