"""A running part of the stack: started, known to be ready, and ended for certain."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from pathlib import Path

from ops.stack.services import Service, clean_environment

READY_S = 60.0


class StartError(Exception):
    """A part that did not come up: which, and its last words, in one line."""


class Process:
    """One service as a process of its own session; what it says goes to a file.

    A session of its own, because Ctrl-C is for whoever started the stack: that one ends
    the parts, and in order.
    """

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.log = folder / f"{service.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, None when it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def exit_status(self) -> int | None:
        """How it ended, None while it runs."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Start it, as often as it was ended before; :meth:`wait` says when it is ready."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.service.command,
                env=clean_environment(self.service.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, longest_s: float = READY_S) -> None:
        """Return when it is ready; raises :class:`StartError` when that does not happen."""
        deadline = time.monotonic() + longest_s
        while not self._is_ready():
            if self.exit_status is not None:
                raise StartError(
                    f"{self.service.name} ended with {self.exit_status}: {self.last_words()} "
                    f"(all of it: {self.log})"
                )
            if time.monotonic() > deadline:
                raise StartError(
                    f"{self.service.name} was not ready after {longest_s:.0f} s: "
                    f"{self.last_words()} (all of it: {self.log})"
                )
            time.sleep(0.05)

    def last_words(self) -> str:
        """The last line it said."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line]
        return lines[-1] if lines else "it said nothing"

    def kill(self) -> None:
        """End it at once, as a machine that fails would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def ask_to_end(self) -> None:
        """Tell it to end, and do not wait for it."""
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        """End it, politely and then not."""
        if self._process is None:
            return
        self.ask_to_end()
        try:
            self._process.wait(self.service.ending_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def _is_ready(self) -> bool:
        if not self.service.ready.startswith("http"):
            return self.service.ready in self.log.read_text(errors="replace")
        try:
            with urllib.request.urlopen(self.service.ready, timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
