"""The page's process: reads the stored data of runs, and serves it over HTTP.

A process of its own, for two reasons: making a page holds the interpreter for a second, and
whoever looks may be slow. It costs the process that decides nothing: steps come out of the
segments that its state writer appends to, decisions out of the journal, and its heartbeat is
handed on by the journal writer, which has it anyway. It ends when its pipe does.

Run as ``python -m esper_tamiyo.showing.ui FD ORDERS``, the orders as JSON.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from esper_otel.leyline.terminal import log_to_stderr
from esper_tamiyo.child_process import BY_SUPERVISORS, become_child, rss_mb
from esper_tamiyo.journaling.journal_writer_child import MAX_MESSAGE
from esper_tamiyo.journaling.messages import Distribution, Heartbeat, decode_messages
from esper_tamiyo.receiving.credentials import BearerAuth, Certificates, CredentialsError
from esper_tamiyo.showing.live_runs import LiveRun, LiveRuns
from esper_tamiyo.showing.tails import JournalTail, StepsTail
from esper_tamiyo.showing.ui_child import UiBeat, UiOrders
from esper_tamiyo.showing.web_pages import WebPages

log = logging.getLogger("tamiyo")

BEAT_S = 1.0
LOOK_S = 0.5
"""Between two looks at the files, where the last found nothing new."""

SCRAPED_S = 300.0
"""After so long without a step a rank's newest values are told to scrapers no more."""

STALE_AFTER_S = 5.0
"""A sidecar whose heartbeat has not come for so long is said to be silent."""

HELD_S = 2.0
"""How long a packed run is given to others who ask for it; they get what is newer at once."""

STOP_GRACE_S = 0.3
NICE = 10


class LiveData:
    """All that is shown, and the one thread on which it is read and packed."""

    def __init__(self, orders: UiOrders) -> None:
        self.runs = LiveRuns()
        self.error = ""
        self._steps = StepsTail(orders.state) if orders.state else None
        self._journal = JournalTail(orders.journal) if orders.journal else None
        self._report: Mapping[str, Any] = {}
        self._distributions: Mapping[str, Distribution] = {}
        self._beat_at: float | None = None
        self._packed: dict[tuple[str, ...], tuple[float, bytes]] = {}

    def read_on(self) -> bool:
        """Read on in the files; whether there was anything."""
        is_new = False
        if self._journal is not None:
            more, lines = self._journal.read()
            is_new |= more
            for line in lines:
                self.runs.take_line(line)
        if self._steps is not None:
            more, bodies = self._steps.read()
            is_new |= more
            for body in bodies:
                for frame in body.frames:
                    self.runs.take_frame(frame, body.at_unix_nano)
        tails = (self._steps, self._journal)
        self.error = "; ".join(tail.error for tail in tails if tail is not None and tail.error)
        return is_new

    def take_pulse(self, data: bytes) -> None:
        """Take in a heartbeat of the process that decides, by way of the journal writer."""
        with suppress(msgspec.MsgspecError):
            for message in decode_messages(data):
                if isinstance(message, Heartbeat):
                    self._report = {**message.report, "beat": message.beat}
                    self._distributions = message.distributions
                    self._beat_at = time.monotonic()

    @property
    def is_silent(self) -> bool:
        """Whether the process that decides has said nothing for a while."""
        return self._beat_at is not None and time.monotonic() - self._beat_at > STALE_AFTER_S

    def index(self) -> dict[str, Any]:
        """The runs, the newest first, and how the sidecar is."""
        engine = self._report.get("engine") or {}
        states = {
            (run.get("run", ""), run.get("rank", 0)): str(run.get("state", ""))
            for run in engine.get("runs") or ()
        }
        return {
            "runs": self.runs.index(states, time.time_ns()),
            "problems": self.problems(),
            "table": (self._report.get("table") or {}).get("version", ""),
            "uptime_s": self._report.get("uptime_s"),
        }

    def problems(self) -> list[str]:
        """What is not as it should be, one line each."""
        found = [self.error] if self.error else []
        if self.is_silent:
            found.append("the decide process has sent no heartbeat for some seconds")
        for part, what in (("state", "steps"), ("scribe", "decisions")):
            error = (self._report.get(part) or {}).get("error")
            if error:
                found.append(f"new {what} do not show: {error}")
        if self.runs.left_out:
            found.append(f"{self.runs.left_out:,} steps of ranks beyond the limit are omitted")
        return found

    def pack(self, ids: tuple[str, ...]) -> bytes | None:
        """The data of these runs; None when none of them is known."""
        runs = self.runs.named(ids)
        if not runs:
            return None
        now = time.monotonic()
        self._packed = {k: v for k, v in self._packed.items() if now - v[0] < HELD_S}
        if ids not in self._packed:
            self._packed[ids] = time.monotonic(), self.runs.pack(runs, self._told_of(runs))
        return self._packed[ids][1]

    def news(self, ids: tuple[str, ...], since: int) -> bytes | None:
        """What is newer than a version, b"" for nothing; None: all has to be loaded again."""
        runs = self.runs.named(ids)
        return self.runs.news(runs, since) if runs else None

    def metrics(self, openmetrics: bool) -> bytes:
        """The answer to a scrape."""
        from esper_tamiyo.showing.exposition import exposition

        # A counter that stands still is how an alert knows of a sidecar that hangs.
        since = time.time_ns() - int(SCRAPED_S * 1e9)
        ranks = self.runs.newest(since)
        return exposition(self._report, self._distributions, ranks, openmetrics)

    def _told_of(self, runs: list[LiveRun]) -> list[str]:
        found = self.problems()
        for run in runs:
            story = self.runs.stories.story_of(run.name)
            if story is not None and story.forgotten:
                found.append(
                    f"run {run.name}: the oldest {story.forgotten:,} decisions, outcomes and "
                    "changes of rules are omitted; the journal has them"
                )
            seeds = sum(len(trainer.left_out) for trainer in run.trainers.values())
            if seeds:
                found.append(f"run {run.name}: {seeds:,} seeds beyond the limit are omitted")
        return found


async def serve(pipe: socket.socket, orders: UiOrders) -> None:
    """Serve until the pipe ends."""
    reader, writer = await asyncio.open_connection(sock=pipe)
    loop = asyncio.get_running_loop()
    worker = ThreadPoolExecutor(1, "runs")
    data = LiveData(orders)
    certificates = Certificates(orders.credentials) if orders.credentials.tls_cert else None
    pages = WebPages(data, worker, BearerAuth(orders.credentials.token_file), certificates)
    loop.set_exception_handler(pages.on_exception)
    pulse = socket.socket(fileno=orders.pulse)
    pulse.setblocking(False)
    loop.add_reader(pulse, _take_pulse, pulse, data)
    pages.serve_at(socket.socket(fileno=orders.listening))
    tasks = [
        asyncio.create_task(_look(data, worker)),
        asyncio.create_task(_beat(writer, data, pages, orders.memory_mb)),
    ]
    with suppress(OSError):
        await reader.read()  # nothing is ever sent this way: it returns when the pipe ends
    for task in tasks:
        task.cancel()
    await pages.stop(STOP_GRACE_S)


def _take_pulse(pulse: socket.socket, data: LiveData) -> None:
    with suppress(BlockingIOError, ConnectionResetError):
        data.take_pulse(pulse.recv(MAX_MESSAGE))


async def _look(data: LiveData, worker: ThreadPoolExecutor) -> None:
    loop = asyncio.get_running_loop()
    told = ""
    while True:
        try:
            is_new = await loop.run_in_executor(worker, data.read_on)
        except Exception as error:  # what is odd in a file must not end the page
            is_new, problem = False, repr(error)
            if problem != told:
                log.error("the page cannot read the saved data: %.200s", problem)
                told = problem
        await asyncio.sleep(0 if is_new else LOOK_S)


async def _beat(
    pipe: asyncio.StreamWriter, data: LiveData, pages: WebPages, memory_mb: float
) -> None:
    """Say about once a second that the loop turns, and end when too much memory is held."""
    while True:
        rss = rss_mb()
        if rss > memory_mb:
            log.error(
                "the page's process has %.0f MB, more than its limit of %.0f MB: it restarts",
                rss,
                memory_mb,
            )
            sys.stderr.flush()
            os._exit(1)
        how = UiBeat(
            data.runs.count,
            len(pages.connections),
            pages.requests,
            pages.unauthorized,
            pages.failures,
            rss,
            data.error,
        )
        if pipe.transport.get_write_buffer_size() == 0:
            pipe.write(msgspec.json.encode(how) + b"\n")
        await asyncio.sleep(BEAT_S)


def main() -> None:
    """Entry point of the process."""
    fd, told = sys.argv[1:3]
    # Nothing that it has is not in files.
    pipe = become_child(fd, ignored=BY_SUPERVISORS, at_parents_death=signal.SIGKILL, nice=NICE)
    log_to_stderr(logging.WARNING)
    for other in ("asyncio", "aiohttp"):  # what a stranger brings about is counted
        logging.getLogger(other).setLevel(logging.CRITICAL)
    orders = msgspec.json.decode(told, type=UiOrders, dec_hook=_path)
    try:
        asyncio.run(serve(pipe, orders))
    except CredentialsError as error:  # they could be used when the sidecar began
        log.error("%s", error)
    sys.stderr.flush()
    os._exit(0)  # a thread that waits for a disk needs no goodbye


def _path(kind: type, text: object) -> object:
    return Path(str(text)) if kind is Path else kind(text)


if __name__ == "__main__":
    main()
