"""Sender: delivers one signal, by which transport, and its patience.

A request to a receiver that is there and answers needs no waiting: the draining thread hands
it to the kernel, and reads the answer an interval later, before it sends the next one. So a
healthy run wakes one thread for each interval. For everything else, the first connection and
TLS included, each sender has a thread, and sending never holds back draining: whatever a
receiver does to this thread, batches wait in the spool. Delivery is at least once: a batch
whose answer did not come is sent again.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from math import isnan

from esper_otel.stream.destination import Destination, OtlpProtocol, Signal
from esper_otel.stream.spool import BatchGroup, Spool
from esper_otel.stream.spool_files import Keeper
from esper_otel.stream.transport import (
    ImmediateTransport,
    NoTransport,
    SendResult,
    Transport,
    Verdict,
    plain,
)

log = logging.getLogger("esper_otel")

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
"""Short, so that a receiver that comes back is found soon."""

LONGEST_UNSEEN_S = 0.25
"""Over a longer interval no answer is left unread: there may be none."""

LONGEST_ASKED_S = 30.0
"""Longest pause that a receiver is granted. "The client SHOULD honour the waiting interval
specified in the Retry-After header", says the OTLP specification, and of gRPC's RetryInfo the
same; neither bounds it. A receiver that asks for an hour, by mistake or not, would leave the
run without telemetry for an hour, and one at fault could silence it for good."""


def open_transport(destination: Destination) -> Transport:
    """The transport that ``destination`` asks for; connects at the first request.

    Where it cannot be made, its requests fail and say why, as they do where nobody listens.
    """
    try:
        return _transport(destination)
    except Exception as error:  # certificates that are none, a receiver of nowhere
        return NoTransport(plain(error))


def _transport(destination: Destination) -> Transport:
    if destination.protocol is OtlpProtocol.GRPC:
        from esper_otel.stream.over_grpc import GrpcTransport

        return GrpcTransport(destination)
    from esper_otel.stream.over_http import HttpTransport

    return HttpTransport(destination)


def granted_s(asked_s: float | None) -> float | None:
    """The pause that a receiver which asks for ``asked_s`` seconds gets; None where that is no
    number."""
    if asked_s is None or isnan(asked_s):
        return None
    return min(max(asked_s, 0.0), LONGEST_ASKED_S)


class Backoff:
    """Pauses between attempts: doubling, with jitter so that ranks do not march in step.

    The jitter has its own source: the training run's random numbers are not ours.
    """

    def __init__(self) -> None:
        self._random = random.Random(os.urandom(16))
        self.failures = 0
        """Attempts in a row that have failed."""

    def reset(self) -> None:
        """The last attempt succeeded."""
        self.failures = 0

    def pause_s(self, asked_s: float | None) -> float:
        """Seconds to wait after one more failure, at least what the receiver asked for, as far
        as :data:`LONGEST_ASKED_S` allows."""
        full = min(FIRST_PAUSE_S * 2.0**self.failures, LONGEST_PAUSE_S)
        self.failures = min(self.failures + 1, 16)
        return max(full * self._random.uniform(0.5, 1.0), granted_s(asked_s) or 0.0)


class Outage:
    """Tells people that the receiver is away, once in a run, and that it is back."""

    def __init__(self, kept: str) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self.down: set[Signal] = set()
        """Signals that are not delivered now."""
        self._told = False

    def went_down(self, destination: Destination, reason: str) -> None:
        """A request of this signal could not be delivered now."""
        with self._lock:
            self.down.add(destination.signal)
            told, self._told = self._told, True
        level = logging.DEBUG if told else logging.WARNING
        log.log(
            level,
            "telemetry cannot be delivered to %s (%s); training continues, %s",
            destination.shown,
            reason,
            self._kept,
        )

    def came_back(self, destination: Destination) -> None:
        """A request of this signal was delivered."""
        if destination.signal not in self.down:
            return
        with self._lock:
            was_down = destination.signal in self.down
            self.down.discard(destination.signal)
        if was_down:
            log.info("telemetry is delivered to %s again", destination.shown)


class Sender:
    """Delivers the batches of one signal from the spool until told to finish.

    ``interval_s`` is the time between two looks of the draining thread.
    """

    def __init__(
        self,
        destination: Destination,
        spool: Spool,
        outage: Outage,
        keeper: Keeper,
        open_transport: Callable[[Destination], Transport] = open_transport,
        interval_s: float = 0.1,
    ) -> None:
        self._destination = destination
        self._spool = spool
        self._outage = outage
        self._keeper = keeper
        self._backoff = Backoff()
        self._finishing = threading.Event()
        self._deadline = float("inf")
        self._began_at_end = False
        """Whether the newest attempt began when the end had come."""
        self._told: set[str] = set()
        self._transport = open_transport(destination)
        immediate = self._transport if interval_s <= LONGEST_UNSEEN_S else None
        self._immediate = immediate if isinstance(immediate, ImmediateTransport) else None
        self.awaited: BatchGroup | None = None
        """Sent at once: the answer to it is still to be looked at."""
        self._begun: BatchGroup | None = None
        """Begun at once, and handed on to the thread."""
        self._outcome: SendResult | None = None
        """What became of that, as far as it is known."""
        self.line = spool.line(destination.signal)
        """What waits to be sent."""
        self._thread = threading.Thread(
            target=self._run, name=f"esper-send-{destination.signal}", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def look_at_answer(self) -> None:
        """Account for what was sent at once, if its answer is here; else the thread waits for
        it. On the draining thread."""
        group, self.awaited = self.awaited, None
        if group is None or self._immediate is None:
            return
        outcome = None
        try:
            outcome = self._immediate.answer_at_once()
            if outcome is not None:
                self._delivered(group, outcome)
                return
        except Exception:  # the thread meets it as well, and tells of it
            log.debug("the fault", exc_info=True)
        self._hand_on(group, outcome)

    def send_at_once(self) -> None:
        """Send what waits, as far as that needs no waiting, and have the thread do the rest. On
        the draining thread."""
        signal = self._destination.signal
        if self._immediate is None or self.awaited is not None:
            self._spool.wake(signal)
            return
        group = self._spool.take_at_once(signal)
        if group is None:
            self._spool.wake(signal)
            return
        try:
            if self._immediate.send_at_once(group.body()):
                self.awaited = group
                return
        except Exception:
            log.debug("the fault", exc_info=True)
        self._hand_on(group)

    def _hand_on(self, group: BatchGroup, outcome: SendResult | None = None) -> None:
        self._begun, self._outcome = group, outcome
        self._spool.hand_on(group)

    def finish_by(self, deadline: float) -> None:
        """Send what waits until ``deadline`` (of :func:`time.monotonic`), then stop."""
        self._deadline = deadline
        self._finishing.set()

    def join(self) -> None:
        """Wait for the thread until the deadline, then let go of it and its connection."""
        if self._thread.ident is not None:  # else it could not be started
            self._thread.join(max(self._deadline - time.monotonic(), 0.0))
        self._transport.close()

    def _run(self) -> None:
        signal = self._destination.signal
        while (group := self._spool.next_group(signal)) is not None:
            timeout_s = min(self._destination.timeout_s, self._deadline - time.monotonic())
            if timeout_s <= 0:
                self._spool.put_back(group)
                return
            try:
                if not self._settle(group, self._send(group, timeout_s)):
                    return
            except Exception as error:
                # A fault of our own must not end what delivers this signal.
                self._spool.put_back(group)
                self._warn_once("fault", "sending to %s failed in esper-otel itself: %r", error)
                log.debug("the fault", exc_info=True)
                if self._finishing.wait(LONGEST_PAUSE_S):
                    return

    def _send(self, group: BatchGroup, timeout_s: float) -> SendResult:
        self._began_at_end = self._finishing.is_set()
        try:
            if group is self._begun and self._immediate is not None:
                self._begun = None
                return self._outcome or self._immediate.finish_begun(timeout_s)
            return self._transport.send(group.body(), timeout_s)
        except Exception as error:
            # A transport that raises has a fault of its own; what it carried is kept.
            log.debug("sending failed", exc_info=True)
            return SendResult(Verdict.RETRY, f"{type(error).__name__}: {error}")

    def _settle(self, group: BatchGroup, outcome: SendResult) -> bool:
        """Account for ``group``, pause where that is due; False to stop sending."""
        match outcome.verdict:
            case Verdict.DELIVERED:
                self._delivered(group, outcome)
            case Verdict.REFUSED:
                self._refuse(group, outcome)
            case Verdict.UNSUPPORTED:
                return self._unsupported(group, outcome)
            case Verdict.RETRY | Verdict.UNREACHABLE:
                return self._try_later(group, outcome)
        return True

    def _delivered(self, group: BatchGroup, outcome: SendResult) -> None:
        self._spool.deliver(group, outcome.rejected)
        self._keeper.settled(group.batches)
        if self._backoff.failures:
            self._backoff.reset()
        if self._outage.down:
            self._outage.came_back(self._destination)
        if outcome.rejected:
            self._warn_refused(f"{outcome.rejected} items", outcome.reason)
        elif outcome.reason:
            taken = f"%s has taken {self._destination.signal}, and says: %s"
            self._warn_once("taken", taken, outcome.reason)

    def _refuse(self, group: BatchGroup, outcome: SendResult) -> None:
        self._backoff.reset()
        if self._spool.refuse(group):
            self._keeper.settled(group.batches)
            self._warn_refused("a request", outcome.reason)

    def _warn_refused(self, what: str, reason: str) -> None:
        self._warn_once(
            "refused",
            f"%s refused {what} of {self._destination.signal} for good (%s); such telemetry is "
            "dropped and counted",
            reason,
        )

    def _warn_once(self, kind: str, message: str, told: object) -> None:
        """Say ``message`` of the receiver and ``told``, the first time of its kind."""
        if kind not in self._told:
            self._told.add(kind)
            log.warning(message, self._destination.shown, told)

    def _unsupported(self, group: BatchGroup, outcome: SendResult) -> bool:
        """No such endpoint: only without metrics is a run not whole."""
        signal = self._destination.signal
        if signal is Signal.METRICS:
            self._refuse(group, outcome)
            return True
        self._spool.close_line(signal)
        self._keeper.settled(group.batches)
        log.info("%s does not accept %s (%s)", self._destination.shown, signal, outcome.reason)
        return False

    def _try_later(self, group: BatchGroup, outcome: SendResult) -> bool:
        self._spool.put_back(group)
        self._keeper.look()
        if time.monotonic() >= self._deadline:  # our own end closed the connection
            self._outage.went_down(self._destination, "no answer by the end of the run")
            return False
        self._outage.went_down(self._destination, outcome.reason)
        if self._finishing.is_set() and outcome.verdict is Verdict.UNREACHABLE:
            # Nobody is there: waiting for the deadline would only hold up the exit.
            return False
        asked_s = outcome.retry_after_s
        pause_s = self._backoff.pause_s(asked_s)
        if not self._finishing.is_set():
            began = time.monotonic()
            if not self._finishing.wait(pause_s) or asked_s is None:
                return True
            pause_s -= time.monotonic() - began
        if asked_s is not None and asked_s > LONGEST_ASKED_S and not self._began_at_end:
            return True  # it was not granted in full: at the end there is one attempt more
        # The end has come during the pause, or before it. A receiver that named its pause
        # gets it where time allows; else this was the last attempt.
        if time.monotonic() + pause_s >= self._deadline:
            return False
        time.sleep(max(pause_s, 0.0))
        return True
