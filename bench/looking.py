"""Looking at runs: what other tools make of a small run, tried one by one (docs/peers.md).

``python -m bench.looking --tools VENV --folder FOLDER`` records two runs with each tool that is
installed in the virtual environment (and with this package), reads them back, kills one, opens
the tool's pages in the browser of the tests, and prints what it found as a table. Pictures of
the pages lie in the folder, for whoever wants to see. What cannot be told by a program (is it
laid over one another, what differs) was tried by hand on the same runs.

Each training is made where no network is but loopback, as far as the system lets one have that.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.looking_runs import STEPS
from ops.stack.programs import CHROMIUM, find

ROOT = Path(__file__).parent.parent
RUNS, READS = (ROOT / "bench" / f"looking_{what}.py" for what in ("runs", "reads"))
PATIENCE_S = 300.0
SHOWN_S = 40.0
LOADED_MS = 15_000
_CONTROL = re.compile(r"\x1b(\[[?0-9;]*[A-Za-z]|\][^\x07]*\x07|[()].|[=>])")
_NO_NETWORK = ("unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


class Tool(NamedTuple):
    """A tool: its name in the scripts, how a training begins, and where its page is.

    ``{python}``, ``{bin}``, ``{folder}``, ``{name}``, ``{port}`` and ``{script}`` are put in.
    """

    name: str
    title: str
    start: str = "{python}"
    serve: str = ""
    pages: tuple[str, ...] = ()
    terminal: str = ""
    """What shows the newest run on a terminal; with ``{script}`` it is its training."""


TOOLS = (
    Tool(
        "esper",
        "esper-otel",
        "{python} -m esper_otel run --record={folder} --name {name} --tag team=vision",
        terminal="{python} -m esper_otel top {folder}",
    ),
    Tool(
        "traceml",
        "TraceML",
        "{bin}/traceml run --mode summary --html-report --logs-dir {folder} --run-name {name} "
        "--aggregator-port {port}",
        terminal="{bin}/traceml run --mode cli --logs-dir {folder} --run-name live "
        "--aggregator-port {port} {script}",
    ),
    Tool("wandb", "W&B, offline", terminal="{bin}/wandb leet run {folder}/wandb/latest-run"),
    Tool(
        "tensorboard",
        "TensorBoard",
        serve="{bin}/tensorboard --logdir {folder} --host 127.0.0.1 --port {port}",
        pages=("/#timeseries", "/#hparams"),
    ),
    Tool(
        "aim",
        "Aim",
        serve="{bin}/aim up --repo {folder} --host 127.0.0.1 --port {port}",
        pages=("/runs", "/metrics"),
    ),
    Tool(
        "mlflow",
        "MLflow",
        serve="{bin}/mlflow server --backend-store-uri sqlite:///{folder}/mlflow.db "
        "--host 127.0.0.1 --port {port} --workers 1",
        pages=("/",),
    ),
)


class Bench:
    """One tool on the bench: its folder, and commands of its environment."""

    def __init__(self, tool: Tool, venv: Path, folder: Path) -> None:
        self.tool = tool
        self.folder = folder / tool.name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._bin = Path(sys.executable).parent if tool.name == "esper" else venv / "bin"
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.environ.get("PYTHONPATH", "") if tool.name == "esper" else "",
            "WANDB_DIR": str(self.folder),
            "WANDB_SILENT": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "ESPER_SUMMARY": "off",
            "XDG_STATE_HOME": str(self.folder / "state"),
            **{f"OTEL_{signal}_EXPORTER": "none" for signal in ("METRICS", "TRACES", "LOGS")},
        }

    def command(self, words: str, name: str = "", port: int = 0) -> list[str]:
        """The words of a command, with what is put in."""
        told = {"python": self._bin / "python", "bin": self._bin, "folder": self.folder}
        own = {"name": name, "port": str(port or free_port())}
        script = f"{RUNS} --args {self.tool.name} {self.folder} live --pause 0.05"
        return [
            word.format(**told, **own) for word in words.replace("{script}", script).split()
        ]

    def train(self, name: str, *options: str) -> tuple[int, str]:
        """Record a run; its exit status and the end of what it said."""
        begun = self.command(self.tool.start, name)
        script = [str(RUNS), self.tool.name, str(self.folder), name, *options]
        if self.tool.name == "traceml":
            script = [script[0], "--args", *script[1:]]
        done = self.run([*(_NO_NETWORK if has_namespaces() else ()), *begun, *script])
        return done.returncode, (done.stdout + done.stderr)[-2000:]

    def read(self, name: str) -> dict[str, Any]:
        """What the tool's own library reads of a run; ``error`` where it does not."""
        script = [str(READS), self.tool.name, str(self.folder), name]
        done = self.run([*self.command("{python}"), *script])
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1:]}
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A command of the tool's environment, to its end."""
        return subprocess.run(
            command,
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=900,
        )

    @contextmanager
    def serving(self) -> Iterator[str]:
        """The tool's server; its address."""
        port = free_port()
        with (
            (self.folder / "server.log").open("wb") as log,
            subprocess.Popen(
                self.command(self.tool.serve, port=port),
                env=self._environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            ) as server,
        ):
            try:
                wait_for(port)
                yield f"http://127.0.0.1:{port}"
            finally:
                os.killpg(server.pid, signal.SIGTERM)

    def in_a_terminal(self) -> dict[str, Any]:
        """What a terminal of 80 columns shows after some seconds: whether there are curves."""
        master, slave = pty.openpty()
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        process = subprocess.Popen(
            self.command(self.tool.terminal),
            env={**self._environment, "TERM": "xterm-256color"},
            cwd=self.folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        until, told = time.monotonic() + SHOWN_S, b""
        while time.monotonic() < until and process.poll() is None:
            if select.select([master], [], [], 0.2)[0]:
                told += os.read(master, 1 << 16)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        os.close(master)
        os.close(slave)
        text = _CONTROL.sub("", told.decode("utf-8", "replace"))
        (self.folder.parent / f"{self.tool.name}.txt").write_text(text)
        drawn = sum("\u2801" <= letter <= "\u28ff" for letter in text)
        return {"loss": "loss" in text, "braille": drawn, "forward": "orward" in text}

    def size(self) -> int:
        """Bytes of all that it has recorded."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)


def has_namespaces() -> bool:
    """Whether a process may have a network of its own."""
    done = subprocess.run([*_NO_NETWORK, "true"], capture_output=True)
    return done.returncode == 0


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


def wait_for(port: int) -> None:
    """Return when somebody listens there; raises ``TimeoutError``."""
    until = time.monotonic() + PATIENCE_S
    while True:
        with socket.socket() as some:
            if some.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > until:
            raise TimeoutError(f"nobody listens at port {port}")
        time.sleep(0.2)


def looked_at(browser: Any, bench: Bench, address: str) -> dict[str, Any]:
    """Open the tool's pages: what is on them, and which other hosts they ask."""
    hosts: set[str] = set()
    words = ""
    for number, page in enumerate(bench.tool.pages):
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        tab.on("request", lambda request: hosts.add(str(host_of(request.url))))
        tab.goto(address + page, timeout=1e3 * PATIENCE_S, wait_until="commit")
        tab.wait_for_timeout(LOADED_MS)
        words += tab.inner_text("body", timeout=1e3 * PATIENCE_S)
        picture = bench.folder.parent / f"{bench.tool.name}-{number}.png"
        tab.screenshot(path=str(picture), timeout=1e3 * PATIENCE_S)
        tab.close()
    return {
        "runs on its pages": [each for each in ("first", "second") if each in words],
        "other hosts asked": sorted(hosts - {"127.0.0.1", "localhost", "None", ""}),
    }


def host_of(url: str) -> str | None:
    return urllib.parse.urlsplit(url).hostname


def tried(tool: Tool, venv: Path, folder: Path, browser: Any) -> dict[str, Any]:
    """What is found out about a tool."""
    bench = Bench(tool, venv, folder)
    found: dict[str, Any] = {}
    for name, rate in (("first", "0.1"), ("second", "0.02")):
        status, said = bench.train(name, "--rate", rate)
        if status:
            return {"failed": status, "said": said}
    found["bytes"] = bench.size() // 2
    found |= bench.read("first")
    killed = Bench(tool, venv, folder / "killed")
    killed.train("killed", "--killed")
    found["kept of a killed run"] = killed.read("killed").get("steps", "nothing that is read")
    if tool.terminal:
        found["in a terminal"] = bench.in_a_terminal()
    if tool.serve:
        with bench.serving() as address:
            found |= looked_at(browser, bench, address)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", type=Path, required=True, metavar="VENV")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", default="", metavar="TOOL")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    print(f"{STEPS} steps; without a network: {has_namespaces()}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(find(CHROMIUM)))
        for tool in TOOLS:
            if options.only in ("", tool.name):
                found = tried(
                    tool, options.tools.absolute(), options.folder.absolute(), browser
                )
                print(f"{tool.title}: {json.dumps(found)}", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
