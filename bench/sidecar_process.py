"""A real ``tamiyo serve`` for benches: its processes, what they take, and how they end."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import Status, StatusRequest

DECIDE = "decide"
CHILDREN = {
    "esper_tamiyo.receiving.ingest": "ingest",
    "esper_tamiyo.journaling.journal_writer": "scribe",
    "esper_tamiyo.serving.table_watch": "table watch",
    "esper_tamiyo.keeping.writer": "state writer",
}
PROCESSES = (DECIDE, *CHILDREN.values())

STATED_MB = 512.0
"""What ``docs/limits.md`` says that all processes take together at most, with the defaults."""

SAMPLE_S = 0.05
END_PATIENCE_S = 15.0


class SidecarProcess:
    """A sidecar with the default limits, that watches a table file of its own.

    So all of its processes are there. It can be killed and started again, at the same
    addresses, as a supervisor does.
    """

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "tamiyo.sock"
        self.table = folder / "table.yaml"
        self.log = folder / "log"
        self.words: dict[str, str] = {}
        """Of the ready line."""
        self._process: subprocess.Popen[str] | None = None
        self.write_table(0)

    def write_table(self, version: int) -> None:
        """Have the table file say another thing than before: the version, and one rule."""
        new = self.table.with_suffix(".new")
        new.write_text(
            f"version: bench-{version}\nextends: default\n"
            f"rules: [{{id: loss_spike, cooldown: {100 + version % 2}}}]\n"
        )
        new.rename(self.table)

    def __enter__(self) -> SidecarProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the process that decides."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        addresses = [self.words.get(name, "127.0.0.1:0") for name in ("otlp_grpc", "otlp_http")]
        argv = [str(Path(sys.executable).with_name("tamiyo")), "serve"]
        argv += ["--socket", str(self.socket), "--table", str(self.table)]
        argv += ["--otlp-grpc", addresses[0], "--otlp-http", addresses[1]]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("tamiyo ready "):
            raise RuntimeError(f"did not start: {line!r}\n{self.log.read_text()[-2000:]}")
        self.words = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)

    def kill(self) -> None:
        """End the process that decides without a word; the others end by themselves."""
        assert self._process is not None
        self._process.kill()
        with self._process:
            pass

    def stop(self) -> None:
        """End all of it."""
        assert self._process is not None
        with self._process as process:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(END_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()

    def processes(self) -> dict[str, int]:
        """The process ids by name, of those that run."""
        found = {DECIDE: self.pid}
        with suppress(psutil.Error):
            for child in psutil.Process(self.pid).children():
                with suppress(psutil.Error):
                    for word in child.cmdline():
                        if word in CHILDREN:
                            found[CHILDREN[word]] = child.pid
        return found

    def status(self) -> dict[str, Any]:
        """What ``tamiyo status`` tells."""
        answer = reply_to(StatusRequest(), self.socket)
        assert isinstance(answer, Status)
        return answer.report

    def tracebacks(self) -> int:
        """How many its log has."""
        return self.log.read_text(errors="replace").count("Traceback (most recent call last)")


class Taken(NamedTuple):
    """What one process takes now: resident memory and its peak in MB (2**20 bytes), open
    descriptors."""

    rss_mb: float
    peak_mb: float
    descriptors: int


def taken_by(pid: int) -> Taken | None:
    """What a process takes; None when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return None
    kb = dict.fromkeys(("VmRSS", "VmHWM"), 0)
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in kb:
            kb[name] = int(value.split()[0])
    return Taken(kb["VmRSS"] / 1024, kb["VmHWM"] / 1024, descriptors) if kb["VmHWM"] else None


class Peaks:
    """The peak of each process of a sidecar, looked at many times a second by a thread.

    The kernel keeps the peak, so nothing between two looks is missed while a process lives.
    """

    def __init__(self, sidecar: SidecarProcess) -> None:
        self.peaks: dict[str, dict[str, float]] = defaultdict(dict)
        """MB of each process, for each phase."""
        self.replaced: dict[str, set[str]] = defaultdict(set)
        """Processes that became others, for each phase."""
        self._sidecar = sidecar
        self._phase = ""
        self._pids: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def begin(self, phase: str) -> None:
        """From now on peaks are of this phase; the kernel forgets those of before."""
        with self._lock:
            self._look()
            for pid in self._sidecar.processes().values():
                with suppress(OSError):
                    Path(f"/proc/{pid}/clear_refs").write_text("5")
            self._phase = phase

    def together(self, phases: Sequence[str]) -> float:
        """The sum of all processes' peaks in a phase, which is more than was ever taken at
        once; the largest of these phases."""
        return max(sum(self.peaks[phase].values()) for phase in phases)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            with self._lock:
                self._look()

    def _look(self) -> None:
        if not self._phase:
            return
        pids = self._sidecar.processes()
        for name, pid in pids.items():
            if self._pids.get(name, pid) != pid:
                self.replaced[self._phase].add(name)
            taken = taken_by(pid)
            if taken is not None:
                peaks = self.peaks[self._phase]
                peaks[name] = max(peaks.get(name, 0.0), taken.peak_mb)
        self._pids |= pids
