"""Delivery: takes OTLP out of the spool, to receivers or into files.

Its parts are a sender of each signal, the keeper of what waits for a receiver, and the
redelivery of what earlier processes have left. Each starts, fails and ends on its own: without
a sender its signal waits in the spool and is left in files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from esper_otel.leyline.faults import alone, end_each
from esper_otel.settings import EsperSettings
from esper_otel.stream.destination import Destination, Signal, destinations
from esper_otel.stream.redelivery import EarlierProcesses
from esper_otel.stream.sender import Outage, Sender
from esper_otel.stream.spool import Batch, Spool
from esper_otel.stream.spool_files import Keeper, resend_words

log = logging.getLogger("esper_otel")


_NO_FILES: Any = SimpleNamespace(
    look=lambda: None, settled=lambda batches: None, finish=lambda batches, end: ()
)
"""In place of a keeper that cannot be: what is unsent waits in memory."""


class Delivery:
    """Delivers what is in ``spool``. Nothing here raises."""

    def __init__(
        self,
        settings: EsperSettings,
        spool: Spool,
        *,
        stem: str,
        pid: int,
        environ: Mapping[str, str] | None,
    ) -> None:
        """``stem`` and ``pid`` say whose files are; ``environ`` where telemetry goes."""
        self._spool = spool
        self._interval_s = settings.stream_interval_ms / 1e3
        self._folder = settings.spool_path
        self.keeper: Keeper = (
            alone(
                "files of unsent telemetry",
                lambda: Keeper(spool, self._folder, f"{stem}-{pid}"),
            )
            or _NO_FILES
        )
        self._receivers = alone("telemetry", lambda: destinations(environ)) or {}
        outage = Outage(f"up to {settings.spool_mb:g} MB are kept in {self._folder}")
        self.senders = [
            sender
            for each in self._receivers.values()
            if (sender := alone(f"sending {each.signal}", partial(self._sender, each, outage)))
        ]
        self._earlier = alone("delivery of earlier processes' files", partial(self._of, stem))

    @property
    def sent(self) -> frozenset[Signal]:
        """The signals that a receiver is to get."""
        return frozenset(self._receivers)

    def start(self) -> None:
        """Begin to deliver."""
        for sender in self.senders:
            alone("a sender of telemetry", sender.start)
        if self._earlier is not None:
            alone("delivery of earlier processes' files", self._earlier.start)

    def stop_redelivery(self) -> None:
        """The run ends: what earlier processes left can wait."""
        if self._earlier is not None:
            end_each([self._earlier.stop])

    def finish_by(self, deadline: float) -> None:
        """Deliver what is there until ``deadline`` (of :func:`time.monotonic`), and stop."""
        end_each(partial(sender.finish_by, deadline) for sender in self.senders)
        end_each(sender.join for sender in self.senders)

    def leave_in_files(self, batches: list[Batch], end: float) -> tuple[Path, ...]:
        """Leave ``batches``, all that is unsent, in files, which hold most of it already.

        Until ``end``, or a little later; returns the files.
        """
        files = (
            alone("files of unsent telemetry", lambda: self.keeper.finish(batches, end)) or ()
        )
        lost = [batch for batch in batches if batch.segment is None]
        for batch in lost:
            self._spool.drop_spooled(batch.signal, batch.items)
        for signal in sorted({batch.signal for batch in lost}):
            items = sum(batch.items for batch in lost if batch.signal is signal)
            log.warning(
                "unsent %s are lost: %d could not be written to %s", signal, items, self._folder
            )
        if files:
            log.warning(
                "unsent telemetry is in files; deliver it with: esper-otel resend %s",
                resend_words(files),
            )
        return files

    def _sender(self, destination: Destination, outage: Outage) -> Sender:
        return Sender(
            destination, self._spool, outage, self.keeper, interval_s=self._interval_s
        )

    def _of(self, stem: str) -> EarlierProcesses:
        return EarlierProcesses(self._folder, stem, self._receivers)
